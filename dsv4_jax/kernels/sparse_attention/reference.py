"""The mathematics in a few lines: the oracle of every other backend. Memory grows with queries x entries x heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_attention(q: jax.Array, entries: jax.Array, visible: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, S, H, K] over entries [B, N, K] where `visible` [B, S, N]; output and log-sum-exp."""
    scores = jnp.einsum("bshk,bnk->bshn", q, entries).astype(jnp.float32) * scale
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    return jnp.einsum("bshn,bnk->bshk", weights, entries), lse


def window_attention(q: jax.Array, kv: jax.Array, segment_ids: jax.Array | None, window: int, scale: float):
    """Each query sees the last `window` tokens of its own document, itself included."""
    index = jnp.arange(q.shape[1])
    distance = index[:, None] - index[None, :]
    visible = jnp.broadcast_to((distance >= 0) & (distance < window), (q.shape[0], *distance.shape))
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return masked_attention(q, kv, visible, scale)


def range_attention(q: jax.Array, entries: jax.Array, lo: jax.Array, hi: jax.Array, scale: float):
    """Query t sees the entries lo_t <= i < hi_t."""
    index = jnp.arange(entries.shape[1])
    return masked_attention(q, entries, (index >= lo[..., None]) & (index < hi[..., None]), scale)


def gather_attention(q: jax.Array, entries: jax.Array, indices: jax.Array, scale: float):
    """Query t sees the entries `indices[t]`; -1 is unused."""
    visible = (indices[..., None] == jnp.arange(entries.shape[1])).any(-2)
    return masked_attention(q, entries, visible, scale)
