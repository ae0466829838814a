"""Which tiles of entries a tile of queries sees, where every query sees a range of entries, and the reverse."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 8  # of one tile


class Band(NamedTuple):
    """How far ranges reach; static.

    tile: entries per tile.
    span: no tile of queries sees more than `span` entries between its first and its last one. None: any number.
    """

    tile: int
    span: int | None = None

    def steps(self, tiles: int) -> int:
        """Tiles of entries, of `tiles`, that a tile of queries can see."""
        return tiles if self.span is None else min(tiles, (self.span + self.tile - 2) // self.tile + 1)

    def visits(self, tiles: int) -> int:
        """Tiles of queries, of `tiles`, that can see into a tile of entries, where query t sees up to about entry t."""
        return tiles if self.span is None else min(tiles, (self.span + self.tile + 2 * QUERIES) // QUERIES + 1)


RANGE = Band(512)  # where all entries up to some are attended


def tiles_seen(bounds: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of entries that each tile of queries sees, and how many, [B, S / QUERIES] each."""
    lo, hi = _extent(bounds)
    first = lo // tile
    return first, jnp.where(lo < hi, -(-hi // tile) - first, 0)


def tiles_seen_by(bounds: jax.Array, tile: int, tiles: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of queries that sees into each tile of entries, and how many up to the last, [B, T / tile]."""
    lo, hi = (x[..., None] for x in _extent(bounds))
    start = jnp.arange(tiles, dtype=jnp.int32) * tile
    sees = (lo < hi) & (lo < start + tile) & (hi > start)  # [B, S / QUERIES, T / tile]
    number = jnp.arange(sees.shape[1], dtype=jnp.int32)[:, None]
    first = jnp.where(sees, number, sees.shape[1]).min(1)
    return jnp.minimum(first, sees.shape[1] - 1), jnp.maximum(jnp.where(sees, number + 1, 0).max(1) - first, 0)


def _extent(bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From the first to behind the last entry that each tile of queries sees; (0, 0) for none."""
    lo, hi = (x.reshape(x.shape[0], -1, QUERIES) for x in (bounds[..., 0], bounds[..., 1]))
    any_seen = (lo < hi).any(-1)
    last = jnp.where(lo < hi, hi, 0).max(-1)
    return jnp.where(any_seen, jnp.where(lo < hi, lo, jnp.iinfo(jnp.int32).max).min(-1), 0), last
