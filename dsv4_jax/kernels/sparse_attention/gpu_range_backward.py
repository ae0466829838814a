"""The gradient of the entries of ranges on a GPU (see `gpu_range.py`); `gpu_backward.py` has that of the queries."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention import gpu
from dsv4_jax.kernels.sparse_attention.gpu_backward import by_head
from dsv4_jax.kernels.sparse_attention.gpu_choice import NEVER, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED, fetch_run
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_COLUMNS,
    OVER_ROWS,
    ROWS,
    TILED_FLOATS,
    add_product,
    exp,
    full,
    iota,
    load,
    over_columns,
    over_rows,
    product,
    summed,
    transposed,
)

WAVES = 2  # of programs, since tiles are not seen by equally many queries
FETCHER = 2  # the warpgroup beside the two that compute, each half the columns


def d_entries(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    run: Run,
    seeing: tuple[jax.Array, jax.Array],
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradient of the entries, zero where nobody sees them.

    A program has one tile of 64 entries and a part of the queries that see it. Parts are added in their order.

    Args:
        q: [B * S, H, K] BF16.
        d_out: cotangent of the output, like q.
        lse: [B * S, H] float32, finite.
        delta: inner products of outputs and their cotangents, minus those of the log-sum-exp [B * S, H] float32.
        rows: entries [B * T, K] BF16.
        run: rows that each query sees, in one block.
        seeing: the first query of a row that sees each tile, and how many up to the last, int32 [B, tiles] each.
        scale: factor of the scores.
        interpret: see `gpu.forward`.

    Returns:
        [B, tiles * 64, K] float32.
    """
    count, _, width = q.shape
    half, (batch, tiles) = width // 2, seeing[0].shape
    begin, end = parts_of_queries(seeing, count)
    parts = begin.shape[1]
    gradients = plgpu.kernel(
        partial(_d_entries, tiles=tiles, per_row=len(rows) // batch, parts=parts, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((parts, batch * tiles, ENTRIES, 2, half), jnp.float32),
        grid=(batch * tiles * parts,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, ROWS, half), q.dtype, transforms=TILED),
            plgpu.SMEM((2, ROWS, half), q.dtype, transforms=TILED),
            plgpu.SMEM((2, ENTRIES, half), q.dtype, transforms=TILED),
            plgpu.SMEM((2, ROWS, ROWS), jnp.float32, transforms=TILED_FLOATS),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="range_attention_d_entries",
    )(*by_head(q, d_out, lse, delta), rows, run.first, run.end, run.blocks, begin.reshape(-1), end.reshape(-1))
    return gradients.reshape(parts, batch, tiles * ENTRIES, width).sum(0)


def parts_of_queries(seeing: tuple[jax.Array, jax.Array], count: int) -> tuple[jax.Array, jax.Array]:
    """The first query of each part of those that see a tile, and behind the last one: int32 [B * tiles, parts] each.

    Args:
        seeing: see `d_entries`.
        count: queries of all rows.
    """
    batch, tiles = seeing[0].shape
    parts = gpu.parts_of(-(-batch * tiles // WAVES), count // batch)
    first, visits = (x.reshape(-1, 1) for x in seeing)
    first = first + jnp.arange(batch, dtype=jnp.int32).repeat(tiles)[:, None] * (count // batch)
    each = -(-visits // parts)
    begin = first + each * jnp.arange(parts, dtype=jnp.int32)
    return begin, jnp.minimum(begin + each, first + visits)


def _d_entries(
    q_ref, d_out_ref, lse_ref, delta_ref, rows_ref, lo_ref, hi_ref, blocks_ref, begin_ref, end_ref, d_entries_ref,
    q, d_out, entries, shares, q_here, d_out_here, arrived, shared, *, tiles, per_row, parts, scale, interpret,
):  # fmt: skip
    """One tile of entries, over the heads of a part of its queries.

    Each computing warpgroup copies its own columns of the next 64 heads as soon as their place is free: those of the
    queries while it still multiplies cotangents, those of the cotangents while it computes the next scores.
    """
    program, me, groups = lax.axis_index("program"), lax.axis_index("warpgroup"), q_ref.shape[1]
    tile, part = lax.div(program, parts), lax.rem(program, parts)
    row = lax.div(tile, tiles) * per_row
    first = row + lax.rem(tile, tiles) * ENTRIES
    begin = begin_ref[program]
    count = jnp.maximum(end_ref[program] - begin, 0) * groups

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        fetch_run((rows_ref,), first, row + per_row, blocks_ref, rows_ref.shape[0], entries, interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(arrived)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        keys, mine, my_d_out = entries.at[me], q.at[me], d_out.at[me]
        place = lambda i: (begin + lax.div(i, groups), lax.rem(i, groups))  # noqa: E731

        def copy(ref, i, to, barrier):
            query, group = place(i)
            pl.when(i < count)(lambda: plgpu.copy_gmem_to_smem(ref.at[query, group, :, me], to, barrier.at[me]))

        copy(q_ref, 0, mine, q_here)
        copy(d_out_ref, 0, my_d_out, d_out_here)
        plgpu.barrier_wait(arrived)

        def step(i, d_keys):
            query, group = place(i)
            plgpu.barrier_wait(q_here.at[me])
            scores = summed(product(keys, transposed(mine, interpret), interpret), shares, shared, me, interpret)
            entry = first + iota(ENTRIES, OVER_COLUMNS, interpret)
            unseen = jnp.where(entry < lo_ref[query], NEVER, jnp.where(entry < hi_ref[query], 0.0, NEVER))
            lse = load(lse_ref.at[query, group], OVER_ROWS, interpret)
            weights = exp(scores * scale + over_columns(unseen, scores) - over_rows(lse, scores))
            plgpu.barrier_wait(d_out_here.at[me])
            d_weights = summed(product(keys, transposed(my_d_out, interpret), interpret), shares, shared, me, interpret)
            delta = load(delta_ref.at[query, group], OVER_ROWS, interpret)
            d_scores = (weights * (d_weights - over_rows(delta, weights)) * scale).astype(q.dtype)
            d_keys = add_product(d_keys, d_scores, mine, interpret)
            copy(q_ref, i + 1, mine, q_here)
            d_keys = add_product(d_keys, weights.astype(q.dtype), my_d_out, interpret)
            copy(d_out_ref, i + 1, my_d_out, d_out_here)
            return d_keys

        start = full((ENTRIES, q.shape[-1]), 0.0, plgpu.Layout.WGMMA, interpret)
        d_entries_ref[part, tile, :, me] = lax.fori_loop(0, count, step, start)
