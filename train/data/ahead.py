"""Batches read in the background, looked at before they are taken, and waited for only so long."""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Any

from dsv4_jax.errors import UserError
from train.data.batches import Batch, RowBatches


class DataSourceError(UserError):
    """The source of the data gave no batch in time, or failed; the message names it."""


class ReadAhead:
    """The batches of a `RowBatches`, a few of which are read in a thread of their own while the device works.

    Args:
        batches: where they come from; nobody else may use it from now on.
        source: what a person calls the source of the text.
        timeout: seconds to wait for a batch; 0 waits for ever.
        depth: batches that are read ahead.
    """

    def __init__(self, batches: RowBatches, source: str, timeout: float = 0.0, depth: int = 4):
        """See the class; the thread is a daemon, so that a source which never answers cannot keep a process alive."""
        self._batches, self._source, self._timeout = batches, source, timeout
        self._taken, self._peeked = batches.step, deque[Batch]()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        threading.Thread(target=self._read, name="read-ahead", daemon=True).start()

    def __next__(self) -> Batch:
        """The next batch. Raises DataSourceError, and whatever reading it raised."""
        self.peek(0)
        self._taken += 1
        return self._peeked.popleft()

    def peek(self, ahead: int) -> Batch:
        """The batch that `ahead` others come before; none is taken. Raises as `__next__` does."""
        while len(self._peeked) <= ahead:
            self._peeked.append(self._wait())
        return self._peeked[ahead]

    def get_state(self) -> dict[str, Any]:
        """`RowBatches.get_state` behind the batches that were taken, not those that were read."""
        return self._batches.get_state() | {"step": self._taken}

    def close(self) -> None:
        """Ends the thread, unless it hangs in the source."""
        self._closed.set()
        while not self._ready.empty():
            self._ready.get_nowait()

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                found: Batch | BaseException = next(self._batches)
            except BaseException as error:  # whatever it is, the thread that wants the batch has to see it
                found = error
            self._ready.put(found)
            if isinstance(found, BaseException):
                return

    def _wait(self) -> Batch:
        try:
            found = self._ready.get(timeout=self._timeout or None)
        except queue.Empty:
            raise DataSourceError(
                f"no batch of {self._source} came within {self._timeout:g} s (cadence.data_timeout): it has stalled at "
                f"batch {self._taken + len(self._peeked):,} of its stage. Is its disk or network still there?"
            ) from None
        if isinstance(found, OSError):
            raise DataSourceError(f"{self._source} could not be read: {found}") from found
        if isinstance(found, BaseException):
            raise found
        return found
