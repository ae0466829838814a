"""The gradients of index scores at chosen entries on a GPU (see `gpu_loss.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.indexer_topk.gpu_chosen import FETCHER, bring
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_COLUMNS,
    OVER_ROWS,
    ROWS,
    TILED_FLOATS,
    add_product,
    full,
    load,
    over_columns,
    over_rows,
    product,
    transposed,
)

SLOTS = 4  # of 64 keys in shared memory


class Gradients(NamedTuple):
    """Of queries [N, 64, di] and weights [N, 64], and of each query's rows [N, tiles, 64, di] float32."""

    queries: jax.Array
    weights: jax.Array
    rows: jax.Array


def gradients(
    q: jax.Array,
    keys: jax.Array,
    weights: jax.Array,
    tiles: jax.Array,
    used: jax.Array,
    d_scores: jax.Array,
    interpret: Any,
) -> Gradients:
    """Gradients of `gpu_chosen.scores`, those of the keys as rows.

    Args:
        q: [N, 64, di] BF16.
        keys: [R, di] BF16.
        weights: [N, 64].
        tiles: which keys, int32 [N, tiles, 64]; negative is unused.
        used: how many tiles of each query to look at, int32 [N].
        d_scores: [N, tiles, 64] float32, zero where unused.
        interpret: see `gpu_loss.forward`.

    Returns:
        In q's dtype, float32 and float32. Nothing is written to the rows of tiles that are not looked at.
    """
    (count, heads, width), length = q.shape, tiles.shape[1]
    found = plgpu.kernel(
        partial(_gradients, interpret=interpret),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((count, heads), jnp.float32),
            jax.ShapeDtypeStruct((count, length, ENTRIES, width), jnp.float32),
        ],
        grid=(count,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((heads, width), q.dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, 1, ENTRIES, width), q.dtype, transforms=TILED),
            plgpu.SMEM((ENTRIES, width), jnp.float32, transforms=TILED_FLOATS),
            plgpu.SMEM((heads,), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="chosen_index_gradients",
    )(q, keys, weights.astype(jnp.float32), tiles, used, d_scores)
    return Gradients(*found)


def _gradients(
    q_ref, keys_ref, weights_ref, tiles_ref, used_ref, d_scores_ref, d_q_ref, d_weights_ref, d_rows_ref,
    q, slots, d_rows, d_weights, q_here, arrived, free, *, interpret,
):  # fmt: skip
    """One query, over its tiles.

    One computing warpgroup has the heads as rows of its products, and adds up the gradients of queries and weights over
    tiles. The other one has the keys as rows, and sends theirs to memory. Both multiply queries with keys: to turn the
    result around in shared memory would make one wait for the other. What all terms of a sum share, a head's weight
    there and a key's cotangent here, multiplies the sum, in float32.
    """
    query, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    count = used_ref[query]

    def over_tiles(of_tile, start):
        """`of_tile(i, keys, free_slot, carry)` for each tile, whose keys are in shared memory until `free_slot()`."""
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(q_here)

        def step(i, carry):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            return of_tile(i, slots.at[slot, 0], lambda: plgpu.barrier_arrive(free.at[slot]), carry)

        return lax.fori_loop(0, count, step, start)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q_ref.at[query], q, q_here)
        bring(keys_ref, tiles_ref.at[query], count, slots, arrived, free, interpret)

    @pl.when(me == 0)
    def _():
        def of_tile(i, keys, free_slot, carry):
            d_q, d_w = carry
            products = product(q, transposed(keys, interpret), interpret)
            d_scores = over_rows(load(d_scores_ref.at[query, i], OVER_ROWS, interpret), products)
            d_w = d_w + (jnp.maximum(products, 0.0) * d_scores).sum(axis=1)
            passed = jnp.where(products > 0, d_scores, 0.0).astype(q.dtype)
            d_q = add_product(d_q, passed, keys, interpret)
            free_slot()
            return d_q, d_w

        start = (
            full(q.shape, 0.0, plgpu.Layout.WGMMA, interpret),
            full((ROWS,), 0.0, OVER_COLUMNS, interpret),
        )
        d_q, d_w = over_tiles(of_tile, start)
        weights = load(weights_ref.at[query], OVER_COLUMNS, interpret)
        d_q_ref[query] = (d_q * over_columns(weights, d_q)).astype(q.dtype)
        d_weights[...] = d_w
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_weights, d_weights_ref.at[query])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == 1)
    def _():
        weights = load(weights_ref.at[query], OVER_ROWS, interpret)

        def of_tile(i, keys, free_slot, _):
            products = product(keys, transposed(q, interpret), interpret)
            free_slot()
            passed = jnp.where(products > 0, over_rows(weights, products), 0.0).astype(q.dtype)
            d_keys = add_product(full(d_rows.shape, 0.0, plgpu.Layout.WGMMA, interpret), passed, q, interpret)
            d_scores = load(d_scores_ref.at[query, i], OVER_COLUMNS, interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            d_rows[...] = d_keys * over_columns(d_scores, d_keys)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_rows, d_rows_ref.at[query, i])
            return _

        over_tiles(of_tile, None)
        plgpu.wait_smem_to_gmem(0)
