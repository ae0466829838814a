"""One job at a time in a run folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsv4_jax.errors import UserError, check_writable
from sharding.distributed import from_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
"""The file in a run folder that says which process is at work there; locked as long as it is."""

LEASE, PAUSE = 120.0, 5.0
"""Seconds to wait for a lock of another machine, and between tries: an NFS server keeps those of a dead one for 90."""

log = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other jobs out of a run folder inside the `with` block; process 0 holds the lock for its whole job.

    The system lets go of the lock when the process ends, however it ends, and a network disk lets go of it some time
    after a machine died, for which a job on another machine waits: a killed job does not block its restart. Where the
    file system has no locks a warning is logged, and the block runs.

    Raises:
        UserError: nothing can be written there, or another job is at work, with its machine and process.
    """
    held: list[int] = []
    made = not folder.exists()
    from_first(lambda: held.extend(_taken(folder)))
    try:
        yield
    finally:
        for lock in held:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)
            if made:
                with suppress(OSError):
                    folder.rmdir()  # if nothing came into it


def _taken(folder: Path) -> list[int]:
    """The lock's file, open; nothing where there are no locks."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, last = folder / LOCK, time.monotonic() + LEASE
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(lock)
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = _holder(path)
                if holder.get("host") == socket.gethostname() or time.monotonic() > last:
                    raise UserError(_in_use(path, holder)) from error
                log.warning("%s is locked by %s: perhaps that machine is gone, so this job waits", path, holder)
                time.sleep(PAUSE)
                continue
            path.unlink(missing_ok=True)
            log.warning(
                "%s: this file system has no locks (%s), so see to it that no second job runs there", path, error
            )
            return []
        if _leads_to(path, lock):
            holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T %Z")}
            with suppress(OSError):  # of a full disk: the lock holds without a name
                os.ftruncate(lock, 0)
                os.write(lock, json.dumps(holder).encode())
            return [lock]
        os.close(lock)  # whoever held it before deleted it meanwhile: what was locked is no file any more


def _lock(file: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "Windows")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leads_to(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, Any]:
    """What the holder of the lock wrote; nothing where that cannot be read, or not yet."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    who = "process {process} on {host}, since {since}".format(**holder) if holder else "another job"
    return (
        f"{path.parent} is in use by {who}: wait for it, end it, or give this run another --out. (If that machine is "
        f"gone and a network disk still keeps its lock: delete {path})"
    )
