"""Products with packed matrices: a few columns at a time are undone, multiplied and forgotten."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul import tpu
from dsv4_jax.kernels.platforms import by_platform, on_one_device
from dsv4_jax.quantization.packed import Packed

COLUMNS = 512


def packed_dot(x: jax.Array, weight: Packed) -> jax.Array:
    """`x @ weight`, [.., I] x [I, O] -> float32 [.., O], the numbers of the weight taken in x's dtype.

    No more than about `COLUMNS` columns of the weight exist as floats at a time, on a single TPU none outside a kernel:
    products like this one stand where the compiler spreads arrays over devices, and it cannot cut a kernel into parts.
    """
    kernel = tpu.packed_product if on_one_device() and tpu.supports_packed(x, weight) else None
    out = by_platform(x.reshape(-1, x.shape[-1]), weight, xla=in_chunks, tpu=kernel)
    return out.reshape(*x.shape[:-1], -1)


def in_chunks(rows: jax.Array, weight: Packed) -> jax.Array:
    """[N, I] x [I, O] -> float32 [N, O], some columns after the others."""
    outputs = weight.shape[-1]
    size = max(COLUMNS // weight.tile[1], 1) * weight.tile[1]

    def part(start: jax.Array | int, size: int) -> jax.Array:
        columns = weight.columns(start, size).astype(rows.dtype)
        return jnp.dot(rows, columns, preferred_element_type=jnp.float32)

    if outputs <= size:
        return part(0, outputs)
    put = lambda i, out: jax.lax.dynamic_update_slice_in_dim(out, part(i * size, size), i * size, 1)  # noqa: E731
    out = jax.lax.fori_loop(0, outputs // size, put, jnp.zeros((len(rows), outputs), jnp.float32))
    rest = outputs % size
    return out.at[:, -rest:].set(part(outputs - rest, rest)) if rest else out
