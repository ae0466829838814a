"""What the indexer's loss compares, of chosen entries, in plain XLA: chunks of queries gather theirs.

This states the mathematics; `tpu_loss.py` and `gpu_loss.py` are the kernels of the same two functions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands


def forward(
    operands: IndexOperands, q: jax.Array, entries: jax.Array, lse: jax.Array, choice: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention mass and index scores of each query's chosen entries.

    Args:
        operands: of the index scores.
        q: attention queries [B, S, H, K].
        entries: [B, T, K].
        lse: joint log-sum-exp [B, S, H] of the layer's attention.
        choice: [B, S, k] int32, -1 is unused.
        scale: factor of the attention scores.

    Returns:
        mass [B, S, k] float32, `sum_h exp(scale q_h . e - lse_h)`, and scores [B, S, k] float32 as of
        `IndexOperands.scores`; both are 0 where unused.
    """
    chunk = _chunk(choice, max(q.shape[2], operands.weights.shape[-1], entries.shape[-1]))

    def one(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, lse, choice, queries, weights = args
        seen = choice >= 0
        mass = mass_of(q, _taken(entries, choice), lse, seen, scale)
        return mass, jnp.where(seen, IndexOperands(queries, _taken(operands.keys, choice), weights).scores(), 0.0)

    by_query = split((q, lse), chunk), split(choice, chunk, fill=-1), split((operands.queries, operands.weights), chunk)
    return join(jax.lax.map(one, (*by_query[0], by_query[1], *by_query[2])), choice.shape[1])


def backward(operands: IndexOperands, choice: jax.Array, d_scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the operands, in their dtypes, from the cotangent [B, S, k] of the chosen entries' scores.

    Keys are chosen by many queries: their gradients are added up in float32, in the order of queries.
    """
    queries, keys, weights = operands
    chunk = _chunk(choice, max(weights.shape[-1], keys.shape[-1]))

    def one(total: jax.Array, args: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        queries, weights, choice, d_scores = args
        _, differentiate = jax.vjp(lambda *x: IndexOperands(*x).scores(), queries, _taken(keys, choice), weights)
        d_queries, d_keys, d_weights = differentiate(jnp.where(choice >= 0, d_scores, 0.0))
        add = jax.vmap(lambda total, index, rows: total.at[index].add(rows, mode="drop"))
        nowhere = jnp.where(choice >= 0, choice, keys.shape[1])
        return add(total, nowhere, d_keys.astype(jnp.float32)), (d_queries, d_weights)

    by_query = *split((queries, weights), chunk), split(choice, chunk, fill=-1), split(d_scores, chunk)
    d_keys, by_query = jax.lax.scan(one, jnp.zeros(keys.shape, jnp.float32), by_query)
    d_queries, d_weights = join(by_query, choice.shape[1])
    return d_queries, d_keys.astype(keys.dtype), d_weights


def mass_of(q: jax.Array, entries: jax.Array, lse: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """Attention probability of entries [B, n, K] (of all queries) or [B, S, n, K], summed over heads: [B, S, n]."""
    own = "bqnk" if entries.ndim == 4 else "bnk"
    logits = jnp.einsum(f"bqhk,{own}->bqhn", q, entries, preferred_element_type=jnp.float32) * scale
    mass = jnp.where(seen[..., None, :], jnp.exp(logits - lse[..., None]), 0.0).sum(2)
    return jax.lax.stop_gradient(mass)


def _chunk(choice: jax.Array, per_entry: int) -> int:
    """Queries of a chunk, which holds `per_entry` numbers for each of a query's entries."""
    batch, length, k = choice.shape
    return chunk_length(length, batch * k * per_entry)


def _taken(rows: jax.Array, choice: jax.Array) -> jax.Array:
    """[B, T, n] and [B, S, k] -> [B, S, k, n]; some row where unused."""
    return jax.vmap(lambda rows, index: rows[index])(rows, jnp.maximum(choice, 0))
