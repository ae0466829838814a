"""Listing and reading the steps of a checkpoint folder; a step is returned only when every checksum agrees."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from train import checkpoint_record as records
from train.checkpoint_record import CheckpointError, DamagedError, Record

log = logging.getLogger("train.checkpointing")


def newest_good(
    folder: epath.Path, step: int | None, wanted: Callable[[Record], dict[str, jax.ShapeDtypeStruct]]
) -> tuple[dict[str, jax.Array], Record]:
    """Arrays by name and record of the newest step that verifies (or of `step`), reading what `wanted` picks."""
    found = committed_steps(folder)
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
    record = _agreed(lambda: _read_record(folder / str(step), step))
    targets = wanted(record)
    arrays = _agreed(lambda: _read_arrays(folder / str(step), targets))
    _agreed(lambda: records.check_values(record, arrays))
    return arrays, record


def _read_record(path: epath.Path, step: int) -> Record:
    record = ocp.JsonCheckpointHandler().restore(path / "host", args=ocp.args.JsonRestore())
    records.check_whole(record, step)
    return record


def _read_arrays(path: epath.Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads through Orbax's handlers, which hold no barriers: one process that fails does not leave others waiting."""
    arrays = {}
    for item, leaves in grouped(targets).items():
        restore = ocp.args.StandardRestore(records.nested(leaves))
        arrays |= records.named(ocp.StandardCheckpointHandler().restore(path / item, args=restore))
    return {name: arrays[name] if name in arrays else _empty(target) for name, target in targets.items()}


def _agreed(read: Callable[[], Any]) -> Any:
    """Runs `read`; whatever fails in one process counts as damage in all, so that they skip the same steps."""
    result, problem = None, None
    try:
        result = read()
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        problem = error
    if not on_all_processes(problem is None):
        raise DamagedError(first_line(problem) if problem else "another process could not read it") from problem
    return result


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
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def committed_steps(folder: epath.Path) -> list[int]:
    """The steps that Orbax finished, ascending, from the names in the folder alone."""
    if not folder.exists():
        return []
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
    )


def absolute(folder: str | os.PathLike) -> epath.Path:
    """The folder as Orbax wants it; addresses with a scheme stay as they are."""
    text = os.fspath(folder)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def listed(steps: list[int]) -> str:
    """Steps in words."""
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(map(str, steps))


def first_line(error: BaseException) -> str:
    """The part of an error that a person reads."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:400]
