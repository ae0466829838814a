"""RMS normalisation and the one matrix product all layers use."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32, cast once to x's dtype.

    `weight` is None for the query heads, which are normalised without one (spec section 3).
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(jnp.float32)
    return y.astype(x.dtype)


def dense(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight` in x's dtype with float32 accumulation; the result has `dtype`, or x's. [.., I] x [I, O] -> [.., O]."""
    out = jnp.dot(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)
