"""The backward kernels of attention over chosen entries on a GPU (see `gpu.py`).

Gradients of 64 queries' heads and those of 64 entries, [64, K] float32 each, do not fit the registers together. So one
kernel walks over the entries of a query, another over the heads of an entry, and both compute the weights again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention.gpu_choice import NEVER, Chosen, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED, fetch
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_COLUMNS,
    OVER_ROWS,
    ROWS,
    TILED_FLOATS,
    add_product,
    exp,
    full,
    load,
    over_columns,
    over_rows,
    product,
    summed,
    transposed,
)

FETCHER = 2  # the warpgroup beside the two that compute, each half the columns


def d_queries(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    choice: Chosen | Run,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradient of the queries.

    Args:
        q: [N, H, K] BF16.
        d_out: cotangent of the output, like q.
        lse: [N, H] float32, finite.
        delta: inner products of outputs and their cotangents, minus those of the log-sum-exp [N, H] float32.
        rows: entries [R, K] BF16.
        choice: rows of each query.
        scale: factor of the scores.
        interpret: see `gpu.forward`.

    Returns:
        [N, H, K] BF16.
    """
    count, heads, width = q.shape
    groups, half = heads // ROWS, width // 2
    leaves, tree = jax.tree.flatten(choice)
    d_q = plgpu.kernel(
        partial(_d_queries, tree=tree, groups=groups, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((count, groups, ROWS, 2, half), q.dtype),
        grid=(count * groups,),
        grid_names=("program",),
        interpret=interpret or None,
        kernel_name=f"{choice.name}_d_queries",
        **_threads_and_memory(half),
    )(*by_head(q, d_out, lse, delta), rows, *leaves)
    return d_q.reshape(q.shape)


def d_rows(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    choice: Chosen,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradients of each query's entries [N, tiles * 64, K] float32, zero where unused; arguments as of `d_queries`."""
    count, heads, width = q.shape
    groups, half, tiles = heads // ROWS, width // 2, choice.index.shape[1]
    d_entries = plgpu.kernel(
        partial(_d_rows, groups=groups, tiles=tiles, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((count, tiles, ENTRIES, 2, half), jnp.float32),
        grid=(count * tiles,),
        grid_names=("program",),
        interpret=interpret or None,
        kernel_name="gather_attention_d_entries",
        **_threads_and_memory(half),
    )(*by_head(q, d_out, lse, delta), rows, choice.index)
    return d_entries.reshape(count, -1, width)


def by_head(q: jax.Array, d_out: jax.Array, lse: jax.Array, delta: jax.Array, sides: int = 2) -> tuple[jax.Array, ...]:
    """[N, H, K] twice as [N, H / 64, 64, sides, K / sides], [N, H] twice as [N, H / 64, 64]."""
    count, heads, width = q.shape
    rows = [x.reshape(count, heads // ROWS, ROWS, sides, width // sides) for x in (q, d_out)]
    return *rows, *(x.reshape(count, heads // ROWS, ROWS) for x in (lse, delta))


def _threads_and_memory(half: int) -> dict[str, Any]:
    """Both kernels hold 64 heads of a query and of its cotangent, one tile of entries, and exchange scores."""
    return {
        "num_threads": 3,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        "scratch_types": [
            plgpu.SMEM((2, ROWS, half), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, ROWS, half), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, ENTRIES, half), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, ROWS, ROWS), jnp.float32, transforms=TILED_FLOATS),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
    }


def _d_queries(q_ref, d_out_ref, lse_ref, delta_ref, rows_ref, *refs, tree, groups, scale, interpret):
    """64 heads of one query, over its tiles."""
    choice = tree.unflatten(refs[: tree.num_leaves])
    d_q_ref, q, d_out, entries, shares, here, arrived, used, shared = refs[tree.num_leaves :]
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    query, group = lax.div(program, groups), lax.rem(program, groups)
    mine = choice.of(query)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def step(i, _):
            mine.fetch((rows_ref,), i, entries, interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(arrived)
            plgpu.barrier_wait(used)
            return _

        lax.fori_loop(0, mine.tiles, step, None)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _fetch_heads(q_ref, d_out_ref, query, group, q, d_out, here, me)
        lse = load(lse_ref.at[query, group], OVER_COLUMNS, interpret)
        delta = load(delta_ref.at[query, group], OVER_COLUMNS, interpret)

        def step(i, d_q):
            plgpu.barrier_wait(arrived)
            keys = entries.at[me]
            scores = summed(product(q.at[me], transposed(keys, interpret), interpret), shares, shared, me, interpret)
            d_weights = summed(
                product(d_out.at[me], transposed(keys, interpret), interpret), shares, shared, me, interpret
            )
            unseen = mine.unseen(i, OVER_ROWS, interpret)
            weights = exp(scores * scale + over_rows(unseen, scores) - over_columns(lse, scores))
            d_scores = weights * (d_weights - over_columns(delta, weights)) * scale
            d_q = add_product(d_q, d_scores.astype(q.dtype), keys, interpret)
            plgpu.barrier_arrive(used)
            return d_q

        d_q = lax.fori_loop(0, mine.tiles, step, full((ROWS, q.shape[-1]), 0.0, plgpu.Layout.WGMMA, interpret))
        q[me] = d_q.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q.at[me], d_q_ref.at[query, group, :, me])
        plgpu.wait_smem_to_gmem(0)


def _d_rows(
    q_ref, d_out_ref, lse_ref, delta_ref, rows_ref, index_ref, d_rows_ref,
    q, d_out, entries, shares, here, arrived, used, shared, *, groups, tiles, scale, interpret,
):  # fmt: skip
    """One tile of a query's entries, over all its heads."""
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    query, tile = lax.div(program, tiles), lax.rem(program, tiles)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        fetch((rows_ref,), index_ref.at[query, tile], entries, interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(arrived)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(arrived)
        keys = entries.at[me]
        unused = jnp.where(load(index_ref.at[query, tile], OVER_COLUMNS, interpret) < 0, NEVER, 0.0)

        def step(group, d_keys):
            _fetch_heads(q_ref, d_out_ref, query, group, q, d_out, here, me)
            lse = load(lse_ref.at[query, group], OVER_ROWS, interpret)
            delta = load(delta_ref.at[query, group], OVER_ROWS, interpret)
            scores = summed(product(keys, transposed(q.at[me], interpret), interpret), shares, shared, me, interpret)
            d_weights = summed(
                product(keys, transposed(d_out.at[me], interpret), interpret), shares, shared, me, interpret
            )
            weights = exp(scores * scale + over_columns(unused, scores) - over_rows(lse, scores))
            d_scores = weights * (d_weights - over_rows(delta, weights)) * scale
            d_keys = add_product(d_keys, d_scores.astype(q.dtype), q.at[me], interpret)
            return add_product(d_keys, weights.astype(q.dtype), d_out.at[me], interpret)

        start = full((ENTRIES, q.shape[-1]), 0.0, plgpu.Layout.WGMMA, interpret)
        d_rows_ref[query, tile, :, me] = lax.fori_loop(0, groups, step, start)


def _fetch_heads(q_ref, d_out_ref, query, group, q, d_out, here, me):
    """My columns of 64 heads of a query and of its cotangent."""
    plgpu.copy_gmem_to_smem(q_ref.at[query, group, :, me], q.at[me], here.at[me])
    plgpu.copy_gmem_to_smem(d_out_ref.at[query, group, :, me], d_out.at[me], here.at[me])
    plgpu.barrier_wait(here.at[me])


def sum_by_row(gradients: jax.Array, index: jax.Array, total: jax.Array, interpret: Any) -> jax.Array:
    """total [R, K] plus gradients [M, K] of its rows `index` [M], in the order of M; negative indices add nothing.

    There are no atomic additions, whose order would differ between runs. Rows of the same number lie side by side
    after a stable sort; the kernel adds up each such run in order, so that the scatter that follows hits no row twice.
    """
    count = index.shape[0]
    index = jnp.where(index < 0, total.shape[0], index)
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    index = index[order]
    here = jnp.arange(count, dtype=jnp.int32)
    begins = (index != jnp.roll(index, 1)).at[0].set(True) & (index < total.shape[0])
    ends = jnp.where(begins, jnp.searchsorted(index, index, side="right").astype(jnp.int32), here)
    sums = plgpu.kernel(
        _sum_run,
        out_type=jax.ShapeDtypeStruct(gradients.shape, jnp.float32),
        grid=(count,),
        grid_names=("program",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret or None,
        kernel_name="sum_by_row",
    )(gradients, order, ends)
    places = jnp.where(begins, index, total.shape[0] + here)  # rows that no run begins with go nowhere, one by one
    return total.at[places].add(sums, mode="drop", unique_indices=True)


def _sum_run(rows_ref, order_ref, ends_ref, sums_ref):
    first = lax.axis_index("program")
    end = ends_ref[first]

    @pl.when(end > first)
    def _():
        add = lambda i, total: total + rows_ref[order_ref[i]]  # noqa: E731
        sums_ref[first] = lax.fori_loop(first + 1, end, add, rows_ref[order_ref[first]])
