"""Which blocks the rows of a batch hold: bookkeeping on the host, and the table that a forward reads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.errors import UserError
from dsv4_jax.inference.block_pool import BlockPool


@dataclass
class Row:
    """One sequence: its tokens in pieces, its blocks, how many tokens it has seen, and `Cache.sealed`."""

    pieces: list[np.ndarray]
    blocks: list[int]
    length: int
    sealed: int = 0

    @property
    def filled(self) -> int:
        """Tokens whose entries its blocks hold."""
        return max(self.length, self.sealed)


class BlockTables:
    """The rows of a batch and their blocks.

    Attributes:
        pool: where the blocks lie.
        columns: blocks that a row has room for.
        rows: what each row holds, None where nobody is. Change it by `put` and `advance` alone.
    """

    def __init__(self, pool: BlockPool, rows: int, columns: int):
        """`rows` empty rows."""
        self.pool, self.columns = pool, columns
        self.rows: list[Row | None] = [None] * rows
        self._on_device: jax.Array | None = None  # until a row's blocks change

    @property
    def taken(self) -> np.ndarray:
        """Where somebody is, bool [rows]."""
        return np.array([row is not None for row in self.rows])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int32 [rows]."""
        return np.array([row.length if row else 0 for row in self.rows], np.int32)

    @property
    def sealed(self) -> np.ndarray:
        """See `Cache.sealed`, int32 [rows]."""
        return np.array([row.sealed if row else 0 for row in self.rows], np.int32)

    @property
    def tables(self) -> np.ndarray:
        """Block numbers, int32 [rows, columns], 0 where a row has none."""
        tables = np.zeros((len(self.rows), self.columns), np.int32)
        for line, row in zip(tables, self.rows, strict=True):
            if row:
                line[: len(row.blocks)] = row.blocks
        return tables

    def on_device(self) -> jax.Array:
        """`tables` as the model takes them; given to the device again only when they have changed."""
        if self._on_device is None:
            self._on_device = jnp.asarray(self.tables)
        return self._on_device

    def put(self, number: int, row: Row | None) -> None:
        """Let row `number` be this one, which has its blocks already, or nobody's."""
        self.rows[number], self._on_device = row, None

    def advance(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Count the first `counts` [rows] of tokens [rows, S] in; blocks that the others alone needed go back."""
        for row, given, count in zip(self.rows, tokens, counts, strict=True):
            if row is None:
                continue
            row.pieces.append(given[:count].copy())
            row.length += int(count)
            needed = self._columns(row.filled)
            if len(row.blocks) > needed:
                self.pool.release(row.blocks[needed:])
                del row.blocks[needed:]
                self._on_device = None

    def make_room(self, counts: np.ndarray) -> None:
        """Give every row the blocks that its tokens need, and its own copy of a shared block that it would write to.

        Raises:
            OutOfBlocks: when the pool has no room; nothing has changed then.
            UserError: when a row would exceed its capacity.
        """
        after, capacity = self.lengths + counts, self.columns * self.pool.block_tokens
        if (after > capacity).any():
            row = int(np.argmax(after))
            raise UserError(f"row {row} would hold {after[row]} tokens; rows have room for {capacity}")
        growing = [(row, int(length)) for row, length, n in zip(self.rows, after, counts, strict=True) if row and n]
        torn = [row for row, _ in growing if self._writes_to_shared(row)]
        wanted = [max(0, self._columns(length) - len(row.blocks)) for row, length in growing]
        fresh = iter(self.pool.allocate(len(torn) + sum(wanted)))
        self._copy_torn(torn, list(itertools.islice(fresh, len(torn))))
        for (row, _), count in zip(growing, wanted, strict=True):
            row.blocks += itertools.islice(fresh, count)
        if torn or any(wanted):
            self._on_device = None

    def _columns(self, length: int) -> int:
        return -(-length // self.pool.block_tokens)

    def _writes_to_shared(self, row: Row) -> bool:
        """Whether the next entry goes to a block that others hold too."""
        column = row.filled // self.pool.block_tokens
        return column < len(row.blocks) and self.pool.holders(row.blocks[column]) > 1

    def _copy_torn(self, rows: list[Row], blocks: list[int]) -> None:
        """Replace the incomplete blocks of `rows` by copies in `blocks`."""
        if not rows:
            return
        source = np.zeros(len(self.rows), np.int32)  # one shape for any number of torn blocks
        target = np.full(len(self.rows), -1, np.int32)
        columns = [row.filled // self.pool.block_tokens for row in rows]
        shared = [row.blocks[column] for row, column in zip(rows, columns, strict=True)]
        source[: len(rows)], target[: len(rows)] = shared, blocks
        self.pool.copy(source, target)
        self.pool.release(shared)
        for row, column, block in zip(rows, columns, blocks, strict=True):
            row.blocks[column] = block
