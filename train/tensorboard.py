"""Scalars for TensorBoard, written by the thread that has them, so that a full disk is an error and nothing worse."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Curves:
    """One event file of scalars.

    tensorboardX's own `SummaryWriter` hands events to a thread. When the disk is full that thread dies, and the next
    event waits for it for ever; its `EventsWriter`, used here, raises the OSError where it happens.

    Args:
        folder: created.
        resume_step: TensorBoard hides what earlier files say about the steps behind it.
        flush_every: seconds between writes to the disk.

    Raises:
        ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: Path, resume_step: int, flush_every: float = 30.0):
        """See the class."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._scalar = summary.scalar
        self._events: Any = event_pb2
        self._writer, self._flush_every = EventsWriter(str(folder / "events")), flush_every
        self._next_flush = time.monotonic() + flush_every
        restart = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=resume_step + 1, session_log=restart)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve. Raises OSError."""
        self._write(step=step, summary=self._scalar(name, value))
        if time.monotonic() > self._next_flush:
            self._writer.flush()
            self._next_flush = time.monotonic() + self._flush_every

    def close(self) -> None:
        """Writes what is left. Raises OSError."""
        self._writer.close()

    def _write(self, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), **what))
