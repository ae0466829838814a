"""Top-k in plain XLA: queries in chunks, keys in tiles, a running best; the score matrix is never whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands

KEY_TILE = 8192


def index_topk(operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int) -> jax.Array:
    """Indices of the best entries of each query; no gradient passes.

    Args:
        operands: queries, keys and weights of the scores.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.

    Returns:
        int32 [B, S, min(k, T)], best first, ties by position; -1 where fewer are visible.
    """
    # The barrier ties the bounds to the operands. By themselves they are the same in every layer of a scan, and its
    # differentiation would compute their masks, queries x entries, before the loop and keep them.
    operands, lo, hi = jax.lax.optimization_barrier(jax.lax.stop_gradient((operands, lo, hi)))
    batch, length, heads, _ = operands.queries.shape
    entries = operands.keys.shape[1]
    k, tile = min(k, entries), min(KEY_TILE, entries)
    keys = split(operands.keys, tile)  # [tiles, B, tile, di]

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        queries, weights, lo, hi = args

        def step(best, numbered):
            number, keys = numbered
            index = number * tile + jnp.arange(tile, dtype=jnp.int32)
            seen = (index >= lo[..., None]) & (index < jnp.minimum(hi, entries)[..., None])
            scores = jnp.where(seen, IndexOperands(queries, keys, weights).scores(), -jnp.inf)
            return keep_best(best, scores, jnp.broadcast_to(index, scores.shape), k), None

        shape = (*lo.shape, k)
        none = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))
        (scores, index), _ = jax.lax.scan(step, none, (jnp.arange(keys.shape[0], dtype=jnp.int32), keys))
        return jnp.where(jnp.isfinite(scores), index, -1)

    chunk = chunk_length(length, batch * heads * tile)
    chunks = split((operands.queries, operands.weights, lo, hi), chunk)
    return join(jax.lax.map(one, chunks), length)


def keep_best(best: tuple[jax.Array, jax.Array], scores: jax.Array, index: jax.Array, k: int):
    """The k best of what was kept and a new tile; earlier entries stand first, so ties go to them."""
    scores = jnp.concatenate([best[0], scores], axis=-1)
    index = jnp.concatenate([best[1], index], axis=-1)
    top, at = jax.lax.top_k(scores, k)
    return top, jnp.take_along_axis(index, at, axis=-1)
