"""Grouped matmul as a loop over the tiles in use, each one plain matrix product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.quantization.packed import Packed


def forward(rows: jax.Array, weights: jax.Array | Packed, groups: Groups, transposed: bool = False) -> jax.Array:
    """Each row times its expert's matrix, or times its transpose.

    Args:
        rows: [R, I], or [R, O] when `transposed`.
        weights: [E, I, O].
        groups: of the rows.
        transposed: multiply with [O, I].

    Returns:
        [R, O], or [R, I], in the rows' dtype; rows of unused tiles are zero.
    """
    tiles = rows.reshape(-1, groups.tile, rows.shape[-1])
    width = weights.shape[1 if transposed else 2]
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        weight = weights[groups.expert_of_tile[i]].astype(rows.dtype)
        product = jax.lax.dot_general(tiles[i], weight, contract, preferred_element_type=jnp.float32)
        return out.at[i].set(product.astype(out.dtype))

    out = jnp.zeros((tiles.shape[0], groups.tile, width), rows.dtype)
    return jax.lax.fori_loop(0, groups.tiles_used, one, out).reshape(-1, width)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """`sum_r rows[r]^T d_out[r]` over each expert's rows: [R, I], [R, O] -> [E, I, O] in the dtype of `weights`."""
    tiles = rows.reshape(-1, groups.tile, rows.shape[-1])
    d_tiles = d_out.reshape(-1, groups.tile, d_out.shape[-1])

    def one(i: jax.Array, total: jax.Array) -> jax.Array:
        product = jax.lax.dot_general(
            tiles[i], d_tiles[i], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total.at[groups.expert_of_tile[i]].add(product)

    total = jnp.zeros(weights.shape, jnp.float32)
    return jax.lax.fori_loop(0, groups.tiles_used, one, total).astype(weights.dtype)
