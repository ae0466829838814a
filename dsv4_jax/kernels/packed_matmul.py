"""Products with packed matrices: a few columns at a time are undone, multiplied and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul import Groups, gpu, tpu
from dsv4_jax.kernels.platforms import by_platform, operands_are_own
from dsv4_jax.quantization.packed import Packed

COLUMNS = 512


def packed_dot(x: jax.Array, weight: Packed) -> jax.Array:
    """`x @ weight`, [.., I] x [I, O] -> float32 [.., O], the numbers of the weight taken in x's dtype.

    No more than about `COLUMNS` columns of the weight exist as floats at a time, in the kernels of TPUs and Hopper GPUs
    none. Products like this one also stand where the compiler spreads arrays over devices, and it cannot cut a kernel
    into parts: there it is no kernel.
    """
    return _product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(rows: jax.Array, weight: Packed) -> jax.Array:
    kernels: dict[str, Any] = {}
    if operands_are_own() and tpu.supports_packed(rows, weight):
        kernels["tpu"] = partial(as_experts, forward=tpu.forward)
    if operands_are_own() and gpu.supports_packed(rows, weight):
        kernels["gpu"] = partial(as_experts, forward=gpu.forward, parts=gpu.parts_of(weight, _tiles(rows)))
    return by_platform(rows, weight, xla=in_chunks, **kernels)


_product.defvjp(
    lambda rows, weight: (_product(rows, weight), (rows, weight)),
    lambda saved, d_out: jax.vjp(in_chunks, *saved)[1](d_out),
)


def as_experts(rows: jax.Array, weight: Packed, forward: Callable[..., Any], parts: int = 1) -> jax.Array:
    """[N, I] x packed [I, O] -> float32 [N, O], by a kernel for experts: each part of the inputs is one.

    Args:
        rows: [N, I].
        weight: [I, O].
        forward: the kernel.
        parts: of the inputs; they divide the rows of scales. Results are added up in their order.
    """
    count, outer = len(rows), weight.shape[1]
    tile, tiles = _tile(rows), _tiles(rows)
    rows = jnp.pad(rows, ((0, -count % tile), (0, 0))).reshape(tiles * tile, parts, -1)
    rows = rows.swapaxes(0, 1).reshape(parts * tiles * tile, -1)
    experts = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, leaf.shape[-1]), weight)
    numbers = jnp.arange(len(rows), dtype=jnp.int32)
    expert_of_tile = jnp.arange(parts, dtype=jnp.int32).repeat(tiles)
    groups = Groups(numbers[:, None], numbers, expert_of_tile, jnp.int32(parts * tiles))
    out = forward(rows, experts, groups, dtype=jnp.float32)
    return out.reshape(parts, -1, outer)[:, :count].sum(0)


def _tile(rows: jax.Array) -> int:
    return min(128, -(-len(rows) // 16) * 16)


def _tiles(rows: jax.Array) -> int:
    return -(-len(rows) // _tile(rows))


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
