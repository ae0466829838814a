"""Undoing the last steps of a run: newer checkpoints and log lines are set aside, nothing is deleted.

A rollback is written down before it begins, with the episode (see `Watch`) that begins there. A run that is killed at
any moment of it, or after it, goes on where the rollback led.
"""

from __future__ import annotations

import json
from typing import Any

import jax

from train.checkpoint_files import on_all_processes
from train.checkpointing import Checkpoints
from train.metrics import read_metrics
from train.recipe_json import read_json
from train.run_folder import RunFolder

JOURNAL = "rollback.json"
ASIDE = "rolled-back"


def begin_rollback(folder: RunFolder, checkpoints: Checkpoints, step: int, episode: dict[str, Any] | None) -> None:
    """Makes the checkpoint of `step` the newest; the steps behind it stay on disk under other names.

    Args:
        folder: of the run.
        checkpoints: of the run; the save in progress is waited for.
        step: of a checkpoint.
        episode: `Watch.episode`, which a run that goes on from there is in (see `episode_after`).
    """
    checkpoints.close()
    undone = [newer for newer in checkpoints.steps if newer > step]
    if jax.process_index() == 0:
        _set_lines_aside(folder, step)
    folder.write_json(JOURNAL, {"step": step, "undone": undone, "finished": False, "episode": episode})
    finish_rollback(folder, checkpoints)


def finish_rollback(folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Completes a rollback that was begun; does nothing where there is none."""
    on_all_processes(True)
    journal = _journal(folder)
    if journal and not journal["finished"]:
        if jax.process_index() == 0:
            for step in [s for s in journal["undone"] if s in checkpoints.steps]:
                (folder.checkpoints / str(step)).rename(_unused(folder, step))
        folder.write_json(JOURNAL, journal | {"finished": True})
    on_all_processes(True)


def episode_after(folder: RunFolder, step: int) -> dict[str, Any] | None:
    """The episode of the rollback that led to the checkpoint of `step`; None if none did."""
    journal = _journal(folder)
    return journal["episode"] if journal and journal["step"] == step else None


def _journal(folder: RunFolder) -> dict[str, Any] | None:
    path = folder.root / JOURNAL
    return read_json(path) if path.is_file() else None


def _unused(folder: RunFolder, step: int) -> Any:
    name = f"{ASIDE}-{step}"
    taken = [path.name for path in folder.checkpoints.iterdir()]
    names = [name, *(f"{name}-{i}" for i in range(len(taken)))]
    return folder.checkpoints / next(n for n in names if n not in taken)


def _set_lines_aside(folder: RunFolder, step: int) -> None:
    """Copies the log of the steps behind `step`; the log itself drops them when it is opened again."""
    undone = [line for line in read_metrics(folder.metrics) if line["step"] > step]
    with folder.metrics.with_name(f"metrics.{ASIDE}.jsonl").open("a") as kept:
        kept.write("".join(json.dumps(line) + "\n" for line in undone))
