"""Endless batches of numbered rows: sharded over processes, resumed from a number."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import grain
import numpy as np

from dsv4_jax.errors import UserError

Batch = dict[str, np.ndarray]
"""`tokens`, `segment_ids` (1, 2, ... for each piece of a document, 0 padding) and `positions` (from 0 in each piece),
all int32 [batch, sequence]."""


class NumberedRows(Protocol):
    """Anything that knows each of its rows by number."""

    def row(self, index: int) -> Batch:
        """Row `index` as a batch entry without the batch axis."""
        ...


class RowBatches:
    """Endless iterator over one process's part of every batch.

    Its state is the number of batches taken: a small JSON dictionary, the same on every process and for any number of
    processes. Rows [p * b, (p + 1) * b) of a batch belong to process p, b = batch_size / process_count.

    Args:
        rows: a pure function of the row's number.
        batch_size: rows of a batch, over all processes together.
        identity: what the rows are made of, by part; JSON. A state of another identity is refused.
        process_index: this process.
        process_count: all of them.
    """

    def __init__(
        self,
        rows: NumberedRows,
        batch_size: int,
        identity: dict[str, Any],
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Begins at batch 0; `set_state` moves it."""
        if batch_size % process_count or not 0 <= process_index < process_count:
            found = f"process {process_index} of {process_count}, batch_size {batch_size}"
            raise UserError(f"{found}: the number of processes must divide the batch, and the index lie below it")
        self._identity = {part: _plain(value) for part, value in identity.items()}
        share = batch_size // process_count
        source = _Share(rows, batch_size, process_index * share, share)
        # `ReadAhead` reads in the background: grain's threads would keep a process alive whose source has stalled.
        at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(at_once))
        self.step = 0

    def __iter__(self) -> RowBatches:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch: [batch_size / process_count, seq_len] int32 arrays."""
        batch = next(self._iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        """Lets go of the iterator."""
        self._iterator.close()

    def get_state(self) -> dict[str, Any]:
        """Batches taken, and what they were made of; JSON."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the place of a state; UserError when it belongs to other data or another stage."""
        for part, own in self._identity.items():
            if state.get(part) != own:
                raise UserError(f"the saved state is of other {part}: {_changes(state.get(part), own)}")
        self.step = int(state["step"])
        self._iterator.set_state({"next_index": self.step})


class _Share:
    """Batch `index` of one process, as grain wants a source."""

    def __init__(self, rows: NumberedRows, batch_size: int, first: int, count: int):
        self._rows, self._batch_size, self._first, self._count = rows, batch_size, first, count

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = int(index) * self._batch_size + self._first
        rows = [self._rows.row(first + i) for i in range(self._count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _plain(value: Any) -> Any:
    """As it looks after a trip through JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _changes(saved: Any, now: dict[str, Any]) -> str:
    saved = saved if isinstance(saved, dict) else {}
    names = [name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in sorted(names))
