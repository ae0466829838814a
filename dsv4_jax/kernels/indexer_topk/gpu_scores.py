"""Index scores on a GPU: heads are apart in registers only (see `gpu.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.indexer_topk.gpu import COLUMNS, ROWS, TILE
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.sparse_attention.gpu_fetch import TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import OVER_ROWS, load, over_rows, product, transposed

SLOTS = 4  # tiles of keys in shared memory
FETCHER = 2  # the warpgroup beside the two that compute, each half a tile of keys


def scores(operands: IndexOperands, first: jax.Array, end: jax.Array, interpret: Any) -> jax.Array:
    """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])` in the tiles of entries that are asked for.

    COLUMNS / Hi neighbouring queries are a group.

    Args:
        operands: whole groups of queries, whole tiles of keys.
        first: the first tile of TILE keys that each group and part of its entries needs, int32 [parts, B, groups].
        end: one past the last.
        interpret: see `gpu.index_topk`.

    Returns:
        [B, S, T] float32; nothing is written where no part has a tile.
    """
    (batch, length, heads, width), groups = operands.queries.shape, first.shape[2]
    out = plgpu.kernel(
        partial(_scores, heads=heads, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((batch * groups, length // groups, operands.keys.shape[1]), jnp.float32),
        grid=(first.size,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((COLUMNS, width), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((SLOTS, 2, ROWS, width), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, length // groups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="index_scores",
    )(
        operands.queries.reshape(batch * groups, COLUMNS, width),
        operands.keys,
        operands.weights.astype(jnp.float32).reshape(batch * groups, COLUMNS),
        first.reshape(-1),
        end.reshape(-1),
    )
    return out.reshape(batch, length, -1)


def _scores(
    q_ref, keys_ref, weights_ref, first_ref, end_ref, out_ref, q, keys, sums, q_here, arrived, free, *, heads, interpret
):
    """A group of queries and a part of its entries.

    Rows of a product are 64 entries, columns the heads of the queries: the sum over heads is along rows, within four
    threads. While one warpgroup adds up, the other one multiplies.
    """
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    group = lax.rem(program, q_ref.shape[0])
    row = lax.div(group, q_ref.shape[0] // keys_ref.shape[0])
    first = first_ref[program]
    count = jnp.maximum(end_ref[program] - first, 0)

    def entries(i, side):
        return pl.ds(pl.multiple_of((first + i) * TILE + side * ROWS, ROWS), ROWS)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q_ref.at[group], q, q_here)

        def step(i, _):
            slot = lax.rem(i, SLOTS)
            pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(free.at[slot]))
            for side in (0, 1):
                plgpu.copy_gmem_to_smem(keys_ref.at[row, entries(i, side)], keys.at[slot, side], arrived.at[slot])
            return _

        def until_free(i, _):
            plgpu.barrier_wait(free.at[lax.rem(i, SLOTS)])
            return _

        lax.fori_loop(0, count, step, None)
        lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, until_free, None)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        weights = load(weights_ref.at[group], OVER_ROWS, interpret)
        plgpu.barrier_wait(q_here)

        def step(i, _):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            products = product(keys.at[slot, me], transposed(q, interpret), interpret)
            plgpu.barrier_arrive(free.at[slot])
            weighted = jnp.maximum(products, 0.0) * over_rows(weights, products)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for t in range(sums.shape[1]):
                sums[me, t] = weighted[:, t * heads : (t + 1) * heads].sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[me], out_ref.at[group, :, entries(i, me)])
            return _

        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)
