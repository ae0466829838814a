"""Combining branches of one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(branches: Sequence[tuple[jax.Array, jax.Array]], sink: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax over all branches and a sink that only adds to the denominator.

    Args:
        branches: (output [B, S, H, K], log-sum-exp [B, S, H]) pairs; at least one sees something at every query.
        sink: logit per head [H].

    Returns:
        Output [B, S, H, K] in the branches' dtype and the joint log-sum-exp [B, S, H] float32.
    """
    sink = jnp.broadcast_to(sink.astype(jnp.float32), branches[0][1].shape)
    total = jax.nn.logsumexp(jnp.stack([sink, *(lse for _, lse in branches)]), axis=0)
    parts = [jnp.exp(lse - total)[..., None] * out.astype(jnp.float32) for out, lse in branches]
    out = sum(parts[1:], parts[0])
    return out.astype(branches[0][0].dtype), total
