"""Top-k over the indexer keys in a cache's pages: a running best over tiles, up to the longest sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import EXACT, IndexOperands, Search
from dsv4_jax.kernels.indexer_topk.xla import KEY_TILE, by_visible, candidates, keep_best
from dsv4_jax.kernels.pages import Pages


def index_topk(
    queries: jax.Array, pages: Pages, weights: jax.Array, hi: jax.Array, k: int, search: Search = EXACT
) -> jax.Array:
    """The best entries i < hi_t of each query's own sequence: int32 [B, S, k], -1 where fewer are visible.

    Args:
        queries: [B, S, Hi, di].
        pages: the indexer keys.
        weights: of the heads, [B, S, Hi].
        hi: one past the last visible entry, [B, S].
        k: how many to choose, at most the pages' capacity.
        search: exact or not.
    """
    batch, length, heads, _ = queries.shape
    columns = pages.columns_of(KEY_TILE)
    tile = columns * pages.per_block
    levels = min(search.levels(pages.capacity, k), (tile & -tile).bit_length())

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        queries, weights, hi = args

        def best_of(rivals: int) -> jax.Array:
            def add_tile(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                index, keys = pages.tile(i, columns, queries.dtype)
                seen = (index >= i * tile) & (index < hi[..., None])
                scores = jnp.where(seen, IndexOperands(queries, keys, weights).scores(search.bf16), -jnp.inf)
                return keep_best(best, *candidates(scores, index, rivals), k)

            shape = (*hi.shape, k)
            none = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))
            scores, index = jax.lax.fori_loop(0, pages.tiles_until(hi, columns), add_tile, none)
            return jnp.where(jnp.isfinite(scores), index, -1)

        return by_visible(best_of, hi, search.candidates * k, levels)

    chunk = chunk_length(length, batch * heads * tile)
    return join(jax.lax.map(one, split((queries, weights, hi), chunk)), length)
