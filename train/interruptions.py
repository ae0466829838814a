"""What ends a run from outside: a request to terminate, and a disk that takes no more."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from dsv4_jax.errors import UserError
from train.metrics import MetricsWriter


class Terminated(SystemExit):
    """The run was asked to end (SIGTERM) and has saved itself; the process ends with 143, as schedulers expect."""

    def __init__(self) -> None:
        """128 + SIGTERM."""
        super().__init__(128 + signal.SIGTERM)


class DiskError(UserError):
    """The run's log could not be written."""


class Termination:
    """Whether SIGTERM came. Inside a `with` block the first one only asks; the next, as outside, acts as ever.

    In a run of several processes JAX hears the signal, wherever it arrives, and lets all agree on the step to save.
    """

    def __init__(self) -> None:
        """Not asked yet."""
        self._asked, self._calls, self._before = False, 0, None

    def asked(self) -> bool:
        """Call once a step, on all processes: whether this is the step to save and end."""
        self._calls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked

    def __enter__(self) -> Termination:
        """Begins to listen; only the main thread may."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        """Puts back what listened before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, self._before)


class RunLog(MetricsWriter):
    """A `MetricsWriter` whose disk errors say what was not written and from where the run can go on.

    Args:
        folder: of the run.
        resume_step: the step it goes on from.
        newest: the step of the newest checkpoint.
    """

    def __init__(self, folder: Path, resume_step: int, newest: Callable[[], int | None]):
        """See the class."""
        self._newest = newest
        with self._in_words(folder):
            super().__init__(folder, resume_step=resume_step)

    def __enter__(self) -> RunLog:
        """Closes itself at the end of a ``with`` block."""
        return self

    def flush(self) -> dict[str, Any] | None:
        """As the writer's. Raises DiskError."""
        with self._in_words(self.path.parent):
            return super().flush()

    def close(self) -> None:
        """As the writer's. Raises DiskError."""
        with self._in_words(self.path.parent):
            super().close()

    @contextmanager
    def _in_words(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise DiskError(
                f"cannot write the log of the run in {folder}: {error.strerror or error}{_free(error, folder)}. "
                f"{_intact(self._newest())}. Make room, then the same command goes on from there"
            ) from error


def _free(error: OSError, folder: Path) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    with suppress(OSError):
        return f" ({shutil.disk_usage(os.fspath(folder)).free / 2**20:,.1f} MiB free there)"
    return ""


def _intact(newest: int | None) -> str:
    return "There is no checkpoint yet" if newest is None else f"The newest checkpoint, step {newest:,}, is intact"
