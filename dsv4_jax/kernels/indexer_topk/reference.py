"""Top-k by a full sort over the whole score matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.indexer_topk.operands import IndexOperands


def index_topk(operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int) -> jax.Array:
    """Indices [B, S, min(k, T)] of the best visible entries, best first, ties by position; -1 is unused."""
    scores = operands.scores()
    index = jnp.arange(scores.shape[-1])
    scores = jnp.where((index >= lo[..., None]) & (index < hi[..., None]), scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., :k]
    return jnp.where(jnp.isfinite(jnp.take_along_axis(scores, order, -1)), order, -1).astype(jnp.int32)
