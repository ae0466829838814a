"""Listing and reading the steps of a checkpoint folder; a step is returned only when every checksum agrees."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dsv4_jax.paths import local_path
from sharding.distributed import from_first
from train import checkpoint_record as records
from train.checkpoint_record import CheckpointError, DamagedError, Record

log = logging.getLogger("train.checkpointing")

PAUSES = (1.0, 5.0, 20.0)
"""Seconds before each further try to read what storage does not give now."""

_FINE, _DAMAGED, _UNREADABLE = range(3)
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_STORAGE = re.compile(
    r"os_error_code|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED)\b"
)
"""In a message of TensorStore: that storage failed, rather than that what it gave is wrong."""


def newest_good(
    folder: epath.Path, step: int | None, wanted: Callable[[Record], dict[str, jax.ShapeDtypeStruct]]
) -> tuple[dict[str, jax.Array], Record]:
    """Arrays by name and record of the newest step that verifies (or of `step`), reading what `wanted` picks.

    Raises:
        FileNotFoundError: there is no checkpoint, or not that one; MismatchError: as `wanted` does.
        CheckpointError: all are damaged, or one that is not known to be damaged cannot be read now.
    """
    found = from_first(lambda: committed_steps(folder))
    if not found or (step is not None and step not in found):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {folder}"
            + (f", which holds {listed(found)}" if found else "")
        )
    reasons = []
    for candidate in [step] if step is not None else found[::-1]:
        try:
            return _verified(folder, candidate, wanted)
        except DamagedError as error:
            reasons.append(f"step {candidate}: {error}")
            log.warning("skipping the damaged checkpoint of step %d in %s: %s", candidate, folder, error)
    raise CheckpointError(f"no checkpoint in {folder} can be used:\n  " + "\n  ".join(reasons))


def _verified(folder: epath.Path, step: int, wanted: Callable) -> tuple[dict[str, jax.Array], Record]:
    path = folder / str(step)
    record = _agreed(lambda: _read_record(path, step), path)
    targets = wanted(record)
    arrays = _agreed(lambda: _read_arrays(path, targets), path)
    _agreed(lambda: records.check_values(record, arrays), path)
    return arrays, record


def _read_record(path: epath.Path, step: int) -> Record:
    _look_at(path / "host")
    record = ocp.JsonCheckpointHandler().restore(path / "host", args=ocp.args.JsonRestore())
    records.check_whole(record, step)
    return record


def _read_arrays(path: epath.Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads through Orbax's handlers, which hold no barriers: one process that fails does not leave others waiting."""
    arrays = {}
    for item, leaves in grouped(targets).items():
        _look_at(path / item)
        restore = ocp.args.StandardRestore(records.nested(leaves))
        arrays |= records.named(ocp.StandardCheckpointHandler().restore(path / item, args=restore))
    return {name: arrays[name] if name in arrays else _empty(target) for name, target in targets.items()}


def _look_at(folder: epath.Path) -> None:
    """Raises what keeps a folder from being looked at: Orbax takes every such failure for a missing file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            entry.stat()


def _agreed(read: Callable[[], Any], path: epath.Path) -> Any:
    """Runs `read` in every process. What failed in one counts in all: they skip the same steps, try again together.

    Raises:
        DamagedError: what was read is wrong, or missing.
        CheckpointError: storage does not give it, several times over. That says nothing about what it holds.
    """
    for pause in (*PAUSES, None):
        result, problem = None, None
        try:
            result = read()
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            problem = _of_storage(error) or error
        verdict = _worst(_FINE if problem is None else _UNREADABLE if _of_storage(problem) else _DAMAGED)
        if verdict == _FINE:
            return result
        reason = first_line(problem) if problem else "another process could not read it"
        if verdict == _DAMAGED:
            raise DamagedError(reason) from problem
        if pause is None:
            raise CheckpointError(
                f"the checkpoint {path} could not be read now, and nothing was changed: {reason}. The same command "
                "goes on when its storage answers again. Rename that folder to go on from an older step instead."
            ) from problem
        log.warning("%s cannot be read now, another try in %g s: %s", path, pause, reason)
        time.sleep(pause)


def _of_storage(error: BaseException | None) -> BaseException | None:
    """Of an error and its causes the one which says that a file could not be read: not missing, not wrong."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, _GONE) or _STORAGE.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def grouped(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The Orbax item of each array. Arrays without elements are in none: Orbax refuses them, the record suffices."""
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        if 0 not in leaf.shape:
            groups.setdefault("params" if name.split("/")[0] == "params" else "training", {})[name] = leaf
    return groups


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(target.shape, target.dtype, device=target.sharding)


def on_all_processes(good: bool) -> bool:
    """Whether `good` holds in every process; also a barrier."""
    return _worst(int(not good)) == 0


def _worst(verdict: int) -> int:
    """The greatest `verdict` of all processes."""
    if jax.process_count() == 1:
        return verdict
    return int(np.max(multihost_utils.process_allgather(np.array(verdict))))


def committed_steps(folder: epath.Path) -> list[int]:
    """The steps that Orbax finished, ascending, from the names in the folder alone.

    Raises:
        CheckpointError: the folder cannot be read now, which does not mean that it holds none.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints in {folder} could not be read now: {error}") from error
    return sorted(int(n) for n in names if n.isdigit() and ocp.utils.is_checkpoint_finalized(folder / n))


def absolute(folder: str | os.PathLike) -> epath.Path:
    """The folder as Orbax wants it. Raises UserError for an address instead of a path."""
    return epath.Path(os.path.abspath(local_path(folder)))


def listed(steps: list[int]) -> str:
    """Steps in words."""
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(map(str, steps))


def first_line(error: BaseException) -> str:
    """The part of an error that a person reads: what failed, and at the end of a long line why."""
    lines = str(error).partition(" [tensorstore_spec")[0].strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 600 else f"{text[:200]} ... {text[-400:]}"
