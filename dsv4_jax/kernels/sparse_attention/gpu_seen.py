"""Which tiles of entries a program adds up gradients of, and which queries see them.

In a kernel the arrays are references to global memory. See `gpu_choice.py` for what a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.kernels.sparse_attention.gpu_choice import NEVER, Chosen, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, fetch_run
from dsv4_jax.kernels.sparse_attention.gpu_tiles import iota


@partial(jax.tree_util.register_dataclass, data_fields=["choice"], meta_fields=["parts"])
@dataclass(frozen=True)
class OneByOne:
    """Programs with a part of the tiles of one query each, one tile after the other.

    Attributes:
        choice: entries of each query.
        parts: programs of a query.
    """

    choice: Chosen
    parts: int
    name = Chosen.name
    one_query = True

    def queries(self, program: Any) -> tuple[Any, Any]:
        """The first query that sees a program's tiles, and behind the last one."""
        query = lax.div(program, self.parts)
        return query, query + 1

    def tiles(self, program: Any) -> Any:
        """How many tiles a program has."""
        query, first = self._place(program)
        return jnp.clip(self.choice.used[query] - first, 0, self._most)

    def number(self, program: Any, i: Any) -> Any:
        """That of a program's tile in the result."""
        query, first = self._place(program)
        return query * self.choice.index.shape[1] + first + i

    def fetch(self, program: Any, i: Any, rows: Any, tile: Any, interpret: Any) -> None:
        """A program's tile into shared memory; see `gpu_fetch.fetch`."""
        query, first = self._place(program)
        self.choice.of(query).fetch((rows,), first + i, tile, interpret)

    def unseen(
        self, program: Any, i: Any, query: Any, begin: int, count: int, layout: Any, interpret: Any
    ) -> jax.Array:
        """What to add to scores of a query with `count` entries of a tile: float32 `NEVER` where it sees none."""
        first = self._place(program)[1]
        return self.choice.of(query).unseen(first + i, layout, interpret, begin, count)

    @property
    def _most(self) -> int:
        return -(-self.choice.index.shape[1] // self.parts)

    def _place(self, program: Any) -> tuple[Any, Any]:
        """The query, and the first tile."""
        return lax.div(program, self.parts), lax.rem(program, self.parts) * self._most


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["run", "begin", "end"],
    meta_fields=["per_row", "entries", "parts"],
)
@dataclass(frozen=True)
class Together:
    """Programs with one tile each of the rows of entries, and a part of the queries that see it; as `OneByOne`.

    Attributes:
        run: the entries that each query sees.
        begin: the first query of each program, int32 [programs].
        end: behind the last one.
        per_row: tiles of a row.
        entries: of a row.
        parts: programs of a tile.
    """

    run: Run
    begin: Any
    end: Any
    per_row: int
    entries: int
    parts: int
    name = Run.name
    one_query = False

    def queries(self, program: Any) -> tuple[Any, Any]:
        """As of `OneByOne`."""
        return self.begin[program], self.end[program]

    def tiles(self, program: Any) -> Any:
        """As of `OneByOne`."""
        del program
        return 1

    def number(self, program: Any, i: Any) -> Any:
        """As of `OneByOne`."""
        del i
        return program

    def fetch(self, program: Any, i: Any, rows: Any, tile: Any, interpret: Any) -> None:
        """As of `OneByOne`."""
        del i
        row, first = self._place(program)
        fetch_run((rows,), first, row + self.entries, self.run.blocks, self.run.per_block, tile, interpret)

    def unseen(
        self, program: Any, i: Any, query: Any, begin: int, count: int, layout: Any, interpret: Any
    ) -> jax.Array:
        """As of `OneByOne`."""
        del i
        entry = self._place(program)[1] + begin + iota(count, layout, interpret)
        return jnp.where(entry < self.run.first[query], NEVER, jnp.where(entry < self.run.end[query], 0.0, NEVER))

    def _place(self, program: Any) -> tuple[Any, Any]:
        """Where the row begins, and the tile."""
        tile = lax.div(program, self.parts)
        row = lax.div(tile, self.per_row) * self.entries
        return row, row + lax.rem(tile, self.per_row) * ENTRIES
