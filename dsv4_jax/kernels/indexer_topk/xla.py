"""Top-k in plain XLA: queries in chunks, keys in tiles, a running best; the score matrix is never whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import EXACT, IndexOperands, Search

KEY_TILE = 8192


def index_topk(operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int, search: Search = EXACT) -> jax.Array:
    """Indices of the best entries of each query.

    Args:
        operands: queries, keys and weights of the scores.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.
        search: exact or not.

    Returns:
        int32 [B, S, min(k, T)], best first, ties by position; -1 where fewer are visible.
    """
    batch, length, heads, _ = operands.queries.shape
    entries = operands.keys.shape[1]
    k = min(k, entries)
    levels = search.levels(entries, k)
    tile = -(-min(KEY_TILE, entries) // (1 << levels)) * (1 << levels) if levels > 1 else min(KEY_TILE, entries)
    keys = split(operands.keys, tile)  # [tiles, B, tile, di]

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        queries, weights, lo, hi = args

        def best_of(rivals: int) -> jax.Array:
            def step(best, numbered):
                number, keys = numbered
                index = number * tile + jnp.arange(tile, dtype=jnp.int32)
                seen = (index >= lo[..., None]) & (index < jnp.minimum(hi, entries)[..., None])
                scores = jnp.where(seen, IndexOperands(queries, keys, weights).scores(search.bf16), -jnp.inf)
                return keep_best(best, *candidates(scores, index, rivals), k), None

            shape = (*lo.shape, k)
            none = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))
            (scores, index), _ = jax.lax.scan(step, none, (jnp.arange(keys.shape[0], dtype=jnp.int32), keys))
            return jnp.where(jnp.isfinite(scores), index, -1)

        return by_visible(best_of, hi - lo, search.candidates * k, levels)

    chunk = chunk_length(length, batch * heads * tile)
    chunks = split((operands.queries, operands.weights, lo, hi), chunk)
    return join(jax.lax.map(one, chunks), length)


def by_visible(best_of: Callable[[int], jax.Array], visible: jax.Array, enough: int, levels: int) -> jax.Array:
    """`best_of(rivals)` with as many rivals as leave `enough` candidates to every query that sees anything."""
    if levels == 1:
        return best_of(1)
    least = jnp.where(visible > 0, visible, enough << levels).min()
    level = sum((least >= enough << i).astype(jnp.int32) for i in range(1, levels))
    return jax.lax.switch(level, [partial(best_of, 1 << i) for i in range(levels)])


def candidates(scores: jax.Array, index: jax.Array, rivals: int) -> tuple[jax.Array, jax.Array]:
    """Of scores [.., n] and their entries [n]: the best of every `rivals` that lie n / rivals apart, each [.., n']."""
    if rivals == 1:
        return scores, jnp.broadcast_to(index, scores.shape)
    scores = scores.reshape(*scores.shape[:-1], rivals, -1)
    best = jnp.argmax(scores, axis=-2)
    column = jnp.arange(scores.shape[-1])
    return scores.max(-2), index.reshape(rivals, -1)[best, column]


def keep_best(best: tuple[jax.Array, jax.Array], scores: jax.Array, index: jax.Array, k: int):
    """The k best of what was kept and a new tile; earlier entries stand first, so ties go to them."""
    scores = jnp.concatenate([best[0], scores], axis=-1)
    index = jnp.concatenate([best[1], index], axis=-1)
    top, at = jax.lax.top_k(scores, k)
    return top, jnp.take_along_axis(index, at, axis=-1)
