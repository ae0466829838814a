"""Endless batches of numbered rows: shared out to processes, resumed from a number."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    """Endless iterator over one process's rows of every batch.

    Its state is the number of batches taken: a small JSON dictionary, the same on every process and for any number of
    processes.

    Args:
        rows: a pure function of the row's number.
        batch_size: rows of a batch, over all processes together.
        identity: what the rows are made of, by part; JSON. A state of another identity is refused.
        own: which of a batch's rows this process makes, in this order (`Placement.own_rows`); None: all.
    """

    def __init__(self, rows: NumberedRows, batch_size: int, identity: dict[str, Any], own: Sequence[int] | None = None):
        """Begins at batch 0; `set_state` moves it."""
        own = range(batch_size) if own is None else own
        if not own or min(own) < 0 or max(own) >= batch_size:
            raise UserError(f"rows {list(own)} are to be made of batches whose rows are 0 to {batch_size - 1}")
        self._identity = {part: _plain(value) for part, value in identity.items()}
        source = _OwnRows(rows, batch_size, own)
        # `ReadAhead` reads in the background: grain's threads would keep a process alive whose source has stalled.
        at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(at_once))
        self.step = 0

    def __iter__(self) -> RowBatches:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch: [own rows, seq_len] int32 arrays."""
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


class _OwnRows:
    """Batch `index` of one process, as grain wants a source."""

    def __init__(self, rows: NumberedRows, batch_size: int, own: Sequence[int]):
        self._rows, self._batch_size, self._own = rows, batch_size, own

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = int(index) * self._batch_size
        rows = [self._rows.row(first + number) for number in self._own]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def filled(batch: Batch, rows: int) -> Batch:
    """The batch with padding behind its own rows, up to `rows`: zeros, so no text and no answers."""
    return {name: np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}


def _plain(value: Any) -> Any:
    """As it looks after a trip through JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _changes(saved: Any, now: dict[str, Any]) -> str:
    saved = saved if isinstance(saved, dict) else {}
    names = [name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)]
    return ", ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in sorted(names))
