"""The forward kernel of attention over chosen entries or ranges on a GPU (see `gpu.py`, `gpu_range.py`)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_COLUMNS,
    OVER_ROWS,
    ROWS,
    TILED_FLOATS,
    add_product,
    full,
    load,
    meet,
    over_columns,
    over_rows,
    product,
    transposed,
)
from dsv4_jax.kernels.sparse_attention.xla import Branch

SLOTS = 2  # tiles in shared memory: one arrives while the other is used
LEAST = -1e20  # below every score that is seen, so far above `gpu_choice.NEVER` that the weight of that is exactly zero
FETCHER = 2  # the warpgroup beside the two that compute


def attend(
    q: jax.Array,
    stored: tuple[jax.Array, ...],
    choice: Chosen | Run,
    scale: float,
    out_dtype: Any,
    interpret: Any,
) -> Branch:
    """Each query attends its entries.

    Args:
        q: [N, H, K] BF16.
        stored: entries, see `gpu_fetch.fetch`.
        choice: which of them each of N * parts units attends, the parts of a query side by side.
        scale: factor of the scores.
        out_dtype: BF16, or float32 for parts that are still to be merged.
        interpret: see `gpu.forward`.

    Returns:
        Output [N * parts, H, K] and log-sum-exp [N * parts, H] float32, -inf where nothing is used.
    """
    count, heads, width = q.shape
    groups, half, units = heads // ROWS, width // 2, choice.units
    leaves, tree = jax.tree.flatten((choice, stored))
    out, lse = plgpu.kernel(
        partial(_attend, tree=tree, groups=groups, parts=units // count, scale=scale, interpret=interpret),
        out_type=[
            jax.ShapeDtypeStruct((units, groups, ROWS, 2, half), out_dtype),
            jax.ShapeDtypeStruct((units, groups, ROWS), jnp.float32),
        ],
        grid=(units * groups,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, ROWS, half), q.dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, 2, ROWS, half), q.dtype, transforms=TILED),
            plgpu.SMEM((2, ROWS, ROWS), jnp.float32, transforms=TILED_FLOATS),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name=choice.name,
    )(q.reshape(count, groups, ROWS, 2, half), *leaves)
    return out.reshape(units, heads, width), lse.reshape(units, heads)


def _attend(q_ref, *refs, tree, groups, parts, scale, interpret):
    """64 heads of one part of a query.

    Two warpgroups compute. Each has half the columns of the queries, of the entries and of the output, whose 64 x K / 2
    float32 numbers are all that its registers can hold. Scores are sums over all columns: each warpgroup computes its
    share, and they add the other's from shared memory. The third warpgroup fetches.
    """
    choice, stored = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref, q, entries, shares, lse, q_here, arrived, used, shared = refs[tree.num_leaves :]
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    unit, group = lax.div(program, groups), lax.rem(program, groups)
    query, mine = lax.div(unit, parts), choice.of(unit)
    count = mine.tiles

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def step(i, _):
            slot = lax.rem(i, SLOTS)
            pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(used.at[slot]))
            mine.fetch(stored, i, entries.at[slot], interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(arrived.at[slot])
            return _

        def until_used(i, _):
            plgpu.barrier_wait(used.at[lax.rem(i, SLOTS)])
            return _

        lax.fori_loop(0, count, step, None)
        lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, until_used, None)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        plgpu.copy_gmem_to_smem(q_ref.at[query, group, :, me], q.at[me], q_here.at[me])
        plgpu.barrier_wait(q_here.at[me])
        half = q.shape[-1]

        def step(i, carry):
            out, top, total = carry
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            keys = entries.at[slot, me]
            share = product(q.at[me], transposed(keys, interpret), interpret)
            shares[me] = share
            meet(shared.at[0])
            scores = share + load(shares.at[1 - me], plgpu.Layout.WGMMA, interpret)
            plgpu.barrier_arrive(shared.at[1])
            unseen = mine.unseen(i, OVER_ROWS, interpret)
            scores = scores * (scale * math.log2(math.e)) + over_rows(unseen, scores)
            higher = jnp.maximum(top, scores.max(axis=1))
            weights = jnp.exp2(scores - over_columns(higher, scores))
            fade = jnp.exp2(top - higher)
            out = add_product(out * over_columns(fade, out), weights.astype(q.dtype), keys, interpret)
            plgpu.barrier_arrive(used.at[slot])
            plgpu.barrier_wait(shared.at[1])
            return out, higher, total * fade + weights.sum(axis=1)

        start = (
            full((ROWS, half), 0.0, plgpu.Layout.WGMMA, interpret),
            full((ROWS,), LEAST, OVER_COLUMNS, interpret),
            full((ROWS,), 0.0, OVER_COLUMNS, interpret),
        )
        out, top, total = lax.fori_loop(0, count, step, start)
        inverse = 1.0 / jnp.maximum(total, 1e-30)
        out = (out * over_columns(inverse, out)).astype(out_ref.dtype)
        if out_ref.dtype == q.dtype:
            q[me] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q.at[me], out_ref.at[unit, group, :, me])
        else:
            out_ref[unit, group, :, me] = out

        @pl.when(me == 0)
        def _():
            lse[...] = jnp.where(total > 0, top * math.log(2.0) + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[unit, group])

        plgpu.wait_smem_to_gmem(0)
