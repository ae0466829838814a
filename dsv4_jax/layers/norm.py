"""RMS normalisation and the one matrix product all layers use."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.packed_matmul import packed_dot
from dsv4_jax.quantization.packed import Packed


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32, cast once to x's dtype.

    `weight` is None for the query heads, which are normalised without one.
    """
    return _rms_norm(x, jnp.ones(x.shape[-1]) if weight is None else weight, eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _rms_norm_fwd(x, weight, eps)[0]


def _rms_norm_fwd(x: jax.Array, weight: jax.Array, eps: float):
    y = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * inverse_rms * weight.astype(jnp.float32)).astype(x.dtype), (x, weight, inverse_rms)


def _rms_norm_bwd(eps: float, saved, d_out: jax.Array):
    """Written out so that what is kept is the input alone and the weight's gradient is one product."""
    x, weight, inverse_rms = saved
    unit, d_out = x.astype(jnp.float32) * inverse_rms, d_out.astype(jnp.float32)
    d_unit = d_out * weight.astype(jnp.float32)
    d_x = inverse_rms * (d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True))
    per_token = (d_out * unit).reshape(-1, weight.shape[0])
    d_weight = jnp.dot(jnp.ones(per_token.shape[0]), per_token, precision=jax.lax.Precision.HIGHEST)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def dense(x: jax.Array, weight: jax.Array | Packed, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight`, [.., I] x [I, O] -> [.., O], in x's dtype, accumulated in float32; returned as `dtype` or x's."""
    if isinstance(weight, Packed):
        return packed_dot(x, weight).astype(dtype or x.dtype)
    out = jnp.dot(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)


def dense_by_group(x: jax.Array, weight: jax.Array | Packed) -> jax.Array:
    """Each group times its own matrix: [G, N, I] x [G, I, O] -> float32 [G, N, O], otherwise as `dense`."""
    if isinstance(weight, Packed):
        return jax.lax.map(lambda group: packed_dot(*group), (x, weight))
    return jnp.einsum("gni,gio->gno", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
