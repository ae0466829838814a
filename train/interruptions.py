"""What ends a run from outside: a request to terminate, and a disk that takes no more."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from dsv4_jax.errors import UserError
from train.metrics import MetricsWriter

Made = TypeVar("Made")


class Terminated(SystemExit):
    """The run was asked to end and has saved itself; the process ends with 128 + the signal, as schedulers expect."""

    def __init__(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Of the signal that asked."""
        self.signal = number
        super().__init__(128 + number)


class DiskError(UserError):
    """The run's log could not be written."""


class Termination:
    """Whether SIGTERM or SIGINT (Ctrl-C) came. Inside a `with` block the first only asks; the next acts as outside.

    In a run of several processes JAX hears SIGTERM, wherever it arrives, and lets all agree on the step to save; SIGINT
    is handed to it as SIGTERM.

    Args:
        say: told at once that the signal was heard.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        """Not asked yet."""
        self._say, self._calls = say, 0
        self._heard: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> signal.Signals | None:
        """Call once a step, on all processes: the signal, if this is the step to save and end."""
        self._calls += 1
        if jax.process_count() == 1:
            return self._heard
        agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return (self._heard or signal.SIGTERM) if agreed else None

    def during(self, work: Callable[[], Made]) -> Made:
        """What `work` gives, done in a thread: Python hears no signal while its main thread compiles.

        Raises:
            Terminated: when a signal came, at once; several processes would have to agree, and go on.
        """
        if not self._before:
            return work()
        future: Future[Made] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not wait([future], timeout=0.2).done:
            if self._heard and jax.process_count() == 1:
                raise Terminated(self._heard)
        return future.result()

    def __enter__(self) -> Termination:
        """Begins to listen; only the main thread may. What is ignored (as behind nohup) stays so."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM)[: 2 if jax.process_count() == 1 else 1]:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        """Puts back what listened before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        self._heard = signal.Signals(number)
        self.__exit__()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        with suppress(RuntimeError):  # the signal came in the middle of other words
            self._say(f"{self._heard.name}: saving after this step{again}")


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
