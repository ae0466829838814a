"""A task as data of a run: numbered rows for the trainer, held-out batches, and what identifies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.batches import Batch, RowBatches
from train.data.manifest import Manifest
from train.data.tasks.task import Task, TaskRow

TASKS_VERSION = "1"
"""Changes when the same options and seed give other rows."""


@dataclass(frozen=True)
class TaskSource:
    """A task by name, as a run sees it; the counterpart of a `TokenStore`.

    Attributes:
        name: of the task.
        answers_only: whether the loss counts the answers alone, or every token.
    """

    name: str
    answers_only: bool = True

    @property
    def manifest(self) -> Manifest:
        """Name and version: there are no files, and the options are part of every stage's identity."""
        return Manifest(f"task {self.name}", {"tasks": TASKS_VERSION})

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint records."""
        return {"manifest": self.manifest.hash}


@dataclass(frozen=True)
class TaskRows:
    """The training rows of a stage: row i is row `start + i` of the task's seed.

    Attributes:
        task: with the options of the stage.
        length: tokens of a row.
        seed: of the run.
        start: rows of the stages before.
        answers_only: gives each row a "loss_mask" on its answers.
    """

    task: Task
    length: int
    seed: int = 0
    start: int = 0
    answers_only: bool = True

    def row(self, index: int) -> Batch:
        """Row `index` as a batch entry without the batch axis."""
        row = self.task.row(self.length, self.seed, self.start + index)
        entry = as_entry(row)
        return entry | {"loss_mask": _marked(row, np.ones_like(row.answers))} if self.answers_only else entry


def task_batches(source: TaskSource, rows: TaskRows, batch_size: int, own: Sequence[int] | None = None) -> RowBatches:
    """Endless batches of a stage, of each a process's `own` rows (see `RowBatches`)."""
    stage = {**dataclasses.asdict(rows), "batch_size": batch_size}
    return RowBatches(rows, batch_size, {"data": source.identity, "stage": stage}, own)


def evaluation_batches(task: Task, length: int, batch_size: int, rows: int, seed: int = 0) -> Iterator[Batch]:
    """The first `rows` held-out rows: batches as in training, of which the last can have fewer rows.

    Each has also "answers" (bool), "distances" and "needles" (int32), all [B, S].
    """
    for first in range(0, rows, batch_size):
        numbers = range(first, min(first + batch_size, rows))
        made = [task.row(length, seed, number, heldout=True) for number in numbers]
        entries = [as_entry(row) | _questions(row) for row in made]
        yield {name: np.stack([entry[name] for entry in entries]) for name in entries[0]}


def as_entry(row: TaskRow) -> dict[str, np.ndarray]:
    """The row as one document: "tokens", "segment_ids" and "positions", int32 [S]."""
    positions = np.arange(len(row.tokens), dtype=np.int32)
    return {"tokens": row.tokens, "segment_ids": np.ones_like(row.tokens), "positions": positions}


def _questions(row: TaskRow) -> dict[str, Any]:
    answers = _marked(row, np.ones_like(row.answers)) != 0
    return {"answers": answers, "distances": _marked(row, row.distances), "needles": _marked(row, row.needles)}


def _marked(row: TaskRow, values: np.ndarray) -> np.ndarray:
    """int32 [S]: the values at the places of the answers, 0 elsewhere."""
    marked = np.zeros(len(row.tokens), np.int32)
    marked[row.answers] = values
    return marked
