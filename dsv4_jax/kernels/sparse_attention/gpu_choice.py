"""Which entries each query attends on a GPU, in tiles of 64: chosen ones by their numbers, or a run of them.

A unit is a query, or one part of its entries. In a kernel the arrays are references to global memory, and `of` gives a
single unit, whose numbers are then in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, fetch, fetch_run
from dsv4_jax.kernels.sparse_attention.gpu_tiles import iota, load

NEVER = -1e30  # added to a score that no query sees


@partial(jax.tree_util.register_dataclass, data_fields=["index", "used"], meta_fields=[])
@dataclass(frozen=True)
class Chosen:
    """Entries by their numbers.

    Attributes:
        index: rows of what is stored, int32 [units, tiles, 64]; negative is unused.
        used: how many tiles of each unit to look at, int32 [units]; the others hold nothing used.
    """

    index: Any
    used: Any
    name = "gather_attention"

    @property
    def units(self) -> int:
        """Queries, or parts of them."""
        return self.used.shape[0]

    def of(self, unit: Any) -> Chosen:
        """A single unit, for which alone the following is."""
        return Chosen(self.index.at[unit], self.used[unit])

    @property
    def tiles(self) -> jax.Array:
        """How many tiles there are."""
        return self.used

    def fetch(self, stored: tuple[Any, ...], i: Any, tile: Any, interpret: Any) -> None:
        """Tile `i` into shared memory; see `gpu_fetch.fetch`."""
        fetch(stored, self.index.at[i], tile, interpret)

    def unseen(self, i: Any, layout: Any, interpret: Any, first: int = 0, count: int = ENTRIES) -> jax.Array:
        """What to add to scores with `count` entries of tile `i`: float32 `NEVER` where there is none, else zero."""
        return jnp.where(load(self.index.at[i, pl.ds(first, count)], layout, interpret) < 0, NEVER, 0.0)


@partial(jax.tree_util.register_dataclass, data_fields=["first", "end", "blocks"], meta_fields=["per_block"])
@dataclass(frozen=True)
class Run:
    """The entries first <= n < end of each unit, int32 [units] both; none where the end is not above the first.

    Attributes:
        first: the first entry.
        end: behind the last one.
        blocks: entry n is row `blocks[n // per_block] + n % per_block` of what is stored; int32.
        per_block: entries of a block.
    """

    first: Any
    end: Any
    blocks: Any
    per_block: int
    name = "range_attention"

    @property
    def units(self) -> int:
        """Queries, or parts of them."""
        return self.first.shape[0]

    def of(self, unit: Any) -> Run:
        """A single unit, for which alone the following is."""
        return replace(self, first=self.first[unit], end=self.end[unit])

    @property
    def tiles(self) -> jax.Array:
        """How many tiles there are."""
        return lax.div(jnp.maximum(self.end - self.first, 0) + (ENTRIES - 1), ENTRIES)

    def fetch(self, stored: tuple[Any, ...], i: Any, tile: Any, interpret: Any) -> None:
        """Tile `i` into shared memory; see `gpu_fetch.fetch_run`."""
        fetch_run(stored, self.first + i * ENTRIES, self.end, self.blocks, self.per_block, tile, interpret)

    def unseen(self, i: Any, layout: Any, interpret: Any, first: int = 0, count: int = ENTRIES) -> jax.Array:
        """What to add to scores with `count` entries of tile `i`: float32 `NEVER` where there is none, else zero."""
        end = self.end - self.first - i * ENTRIES - first
        return jnp.where(iota(count, layout, interpret) < end, 0.0, NEVER)
