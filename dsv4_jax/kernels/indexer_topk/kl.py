"""The loss that teaches the indexer: KL from the attention's own distribution to the index scores' (training spec)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands


class IndexLoss(NamedTuple):
    """Per token [B, S]: the divergence, the share of attention mass on the chosen entries, and whether it counts.

    A token without a visible entry does not count; its other values are 0.
    """

    kl: jax.Array
    recall: jax.Array
    counts: jax.Array


def index_loss(
    operands: IndexOperands, q: jax.Array, entries: jax.Array, lse: jax.Array, choice: jax.Array, scale: float, k: int
) -> IndexLoss:
    """KL(p || softmax(index scores)) per token; only `operands` receive a gradient.

    p is the attention's probability of each compressed entry under the layer's JOINT softmax (window, entries and sink
    share its log-sum-exp), summed over heads, then normalised over the entries compared.

    Args:
        operands: of the index scores; the only differentiated argument.
        q: attention queries [B, S, H, K].
        entries: compressed entries [B, T, K].
        lse: joint log-sum-exp [B, S, H] of the layer's attention.
        choice: chosen indices [B, S, k] (-1 unused) to compare over the chosen entries (`recall` is then 1), or bounds
            [B, S, 2] (lo, hi) to compare over all visible ones.
        scale: factor of the attention scores.
        k: top-k whose recall is measured in the dense case; 0 when `choice` holds chosen indices.
    """
    q, entries, lse = jax.lax.stop_gradient((q, entries, lse))
    width = choice.shape[-1] if not k else entries.shape[1]
    per_query = width * max(q.shape[2], operands.weights.shape[-1], *(() if k else (entries.shape[-1],)))
    chunk = chunk_length(q.shape[1], q.shape[0] * per_query)

    @jax.checkpoint
    def one(args: tuple[jax.Array, ...]) -> IndexLoss:
        q, lse, choice, queries, weights = args
        if k:
            index = jnp.arange(entries.shape[1])
            seen = (index >= choice[..., :1]) & (index < choice[..., 1:])
            return _divergence(IndexOperands(queries, operands.keys, weights), q, entries, lse, seen, scale, k)
        take = jax.vmap(lambda row, index: row[index])
        at = jnp.maximum(choice, 0)
        chosen = IndexOperands(queries, take(operands.keys, at), weights)
        return _divergence(chosen, q, take(entries, at), lse, choice >= 0, scale, k)

    chunks = split((q, lse, choice, operands.queries, operands.weights), chunk)
    if not k:  # a padded query must see nothing; a padded range (0, 0) already does
        chunks = (*chunks[:2], split(choice, chunk, fill=-1), *chunks[3:])
    return join(jax.lax.map(one, chunks), q.shape[1])


def _divergence(operands, q, entries, lse, seen, scale, k) -> IndexLoss:
    own = "bqnk" if entries.ndim == 4 else "bnk"
    logits = jnp.einsum(f"bqhk,{own}->bqhn", q, entries, preferred_element_type=jnp.float32) * scale
    mass = jnp.where(seen[..., None, :], jnp.exp(logits - lse[..., None]), 0.0).sum(2)
    counts = seen.any(-1)
    p = jax.lax.stop_gradient(mass / jnp.where(counts, mass.sum(-1), 1.0)[..., None])
    scores = jnp.where(seen, operands.scores(), -1e30)
    log_q = jnp.where(seen, jax.nn.log_softmax(scores, axis=-1), 0.0)
    kl = jnp.where(counts, (jax.scipy.special.xlogy(p, p) - p * log_q).sum(-1), 0.0)
    return IndexLoss(kl, _recall(p, jax.lax.stop_gradient(scores), k) if k else counts.astype(jnp.float32), counts)


def _recall(p: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """Attention mass of the entries that the top k of the scores would choose."""
    _, chosen = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.take_along_axis(p, chosen, axis=-1).sum(-1)
