"""Products with packed matrices: a few columns at a time are undone, multiplied and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul import Groups, gpu, tpu
from dsv4_jax.kernels.platforms import by_platform, on_one_device
from dsv4_jax.quantization.packed import Packed

COLUMNS = 512


def packed_dot(x: jax.Array, weight: Packed) -> jax.Array:
    """`x @ weight`, [.., I] x [I, O] -> float32 [.., O], the numbers of the weight taken in x's dtype.

    No more than about `COLUMNS` columns of the weight exist as floats at a time, on a single TPU or Hopper GPU none
    outside a kernel: products like this one stand where the compiler spreads arrays over devices, and it cannot cut a
    kernel into parts.
    """
    return _product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(rows: jax.Array, weight: Packed) -> jax.Array:
    kernels = {
        name: partial(as_one_expert, forward=backend.forward)
        for name, backend in (("tpu", tpu), ("gpu", gpu))
        if on_one_device() and backend.supports_packed(rows, weight)
    }
    return by_platform(rows, weight, xla=in_chunks, **kernels)


_product.defvjp(
    lambda rows, weight: (_product(rows, weight), (rows, weight)),
    lambda saved, d_out: jax.vjp(in_chunks, *saved)[1](d_out),
)


def as_one_expert(x: jax.Array, weight: Packed, forward: Callable[..., Any]) -> jax.Array:
    """[N, I] x packed [I, O] -> float32 [N, O], by a kernel for experts: all rows are of one."""
    count = len(x)
    tile = min(128, -(-count // 16) * 16)
    rows = jnp.pad(x, ((0, -count % tile), (0, 0)))
    tiles = len(rows) // tile
    one = jax.tree.map(lambda leaf: leaf[None], weight)
    numbers = jnp.arange(len(rows), dtype=jnp.int32)
    groups = Groups(numbers[:, None], numbers, jnp.zeros(tiles, jnp.int32), jnp.int32(tiles))
    return forward(rows, one, groups, dtype=jnp.float32)[:count]


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
