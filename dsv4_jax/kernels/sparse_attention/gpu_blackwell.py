"""The forward kernel of attention over chosen entries or ranges for Blackwell: products from and into tensor memory.

As `gpu_forward.py`, with 128 heads for the rows of a product (`tcgen05`), and half of the output's columns for a
program: 128 x 256 float32 numbers are half of tensor memory, whose other half has scores, weights and half the queries.
One warpgroup copies entries, one starts products, one makes weights of scores while the products run.
"""

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
from dsv4_jax.kernels.sparse_attention.gpu_fetch import COLUMNS, ENTRIES, TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import full, load, over_columns, over_rows
from dsv4_jax.kernels.sparse_attention.xla import Branch

ROWS = 128  # heads of a program: the lanes of tensor memory
SLOTS = 2  # tiles in shared memory: one arrives while the other is used
LEAST = -1e20  # see `gpu_forward.LEAST`
SLACK = 8.0  # powers of two that weights may grow to before the output is made smaller
COMPUTER, ISSUER, FETCHER = 0, 1, 2  # warpgroups
LAYOUT = plgpu.Layout.TCGEN05
OVER_COLUMNS, OVER_ROWS = LAYOUT.reduce(1), LAYOUT.reduce(0)


def attend(
    q: jax.Array,
    stored: tuple[jax.Array, ...],
    choice: Chosen | Run,
    scale: float,
    out_dtype: Any,
    interpret: Any,
) -> Branch:
    """Each query attends its entries; arguments and results are `gpu_forward.attend`'s.

    64 heads more than a multiple of 128 are made 128 by heads of zeros: a product takes as long for 64 rows.
    """
    heads = q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, -heads % ROWS), (0, 0)))
    out, lse = _attend_all(q, stored, choice, scale, out_dtype, interpret)
    return out[:, :heads], lse[:, :heads]


def _attend_all(q, stored, choice, scale, out_dtype, interpret):
    """As `attend`, of a multiple of 128 heads."""
    count, heads, width = q.shape
    groups, half, units = heads // ROWS, width // 2, choice.units
    leaves, tree = jax.tree.flatten((choice, stored))
    out, lse = plgpu.kernel(
        partial(_attend, tree=tree, groups=groups, parts=units // count, scale=scale, interpret=interpret),
        out_type=[
            jax.ShapeDtypeStruct((units, groups, ROWS, 2, half), out_dtype),
            jax.ShapeDtypeStruct((units, groups, ROWS), jnp.float32),
        ],
        grid=(units * groups * 2,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((ROWS, half), q.dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, 2, ENTRIES, half), q.dtype, transforms=TILED),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.TMEM((ROWS, half), q.dtype, packed=True),
            plgpu.TMEM((ROWS, ENTRIES), jnp.float32),
            plgpu.TMEM((ROWS, ENTRIES), q.dtype, packed=True),
            plgpu.TMEM((ROWS, half), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            *[plgpu.Barrier(orders_tensor_core=True) for _ in range(5)],
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4 * ROWS),
        interpret=interpret or None,
        kernel_name=choice.name,
    )(q.reshape(count, groups, ROWS, 2, half), *leaves)
    return out.reshape(units, heads, width), lse.reshape(units, heads)


def _attend(q_ref, *refs, tree, groups, parts, scale, interpret):
    """128 heads of one part of a query, half of the output's columns."""
    choice, stored = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref, q, entries, lse, q_other, scores, weights, out, *barriers = refs[tree.num_leaves :]
    q_here, arrived, used, q_ready, scored, read, weighed, added = barriers
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    side, unit = lax.rem(program, 2), lax.div(program, 2 * groups)
    group = lax.rem(lax.div(program, 2), groups)
    query, mine = lax.div(unit, parts), choice.of(unit)
    count = mine.tiles

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(96, action="decrease")

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

    @pl.when(me == ISSUER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        plgpu.barrier_wait(q_ready)

        def score(i):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.tcgen05_mma(scores, q, entries.at[slot, 0].T, accumulate=False)
            plgpu.tcgen05_mma(scores, q_other, entries.at[slot, 1].T, scored)

        def step(i, _):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(read)
            pl.when(i + 1 < count)(lambda: score(i + 1))
            plgpu.barrier_wait(weighed)
            plgpu.tcgen05_mma(out, weights, entries.at[slot, side], used.at[slot], accumulate=i > 0)
            plgpu.tcgen05_commit_arrive(added)
            return _

        pl.when(count > 0)(lambda: score(0))
        lax.fori_loop(0, count, step, None)

    @pl.when(me == COMPUTER)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _load_queries(q_ref.at[query, group], q, q_other, q_here, interpret)
        plgpu.barrier_arrive(q_ready)

        def step(i, carry):
            top, total = carry
            plgpu.barrier_wait(scored)
            x = plgpu.async_load_tmem(scores)
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(read)
            x = x * (scale * math.log2(math.e)) + _over_rows(mine.unseen(i, OVER_ROWS, interpret), x)
            highest = x.max(axis=1)
            raised = (highest - top).max() > SLACK
            higher = jnp.where(raised, jnp.maximum(top, highest), top)
            x = jnp.exp2(x - over_columns(higher, x))
            fade = jnp.exp2(top - higher)
            pl.when(i > 0)(lambda: plgpu.barrier_wait(added))
            pl.when(raised & (i > 0))(lambda: _scale(out, fade))
            plgpu.async_store_tmem(weights, x.astype(q.dtype))
            plgpu.commit_tmem()
            plgpu.barrier_arrive(weighed)
            return higher, total * fade + x.sum(axis=1)

        start = full((ROWS,), LEAST, OVER_COLUMNS, interpret), full((ROWS,), 0.0, OVER_COLUMNS, interpret)
        top, total = lax.fori_loop(0, count, step, start)
        pl.when(count > 0)(lambda: plgpu.barrier_wait(added))
        inverse = 1.0 / jnp.maximum(total, 1e-30)
        for columns in _blocks(out):
            x = plgpu.async_load_tmem(out.at[:, columns])
            x = jnp.where(over_columns(total, x) > 0, x * over_columns(inverse, x), 0.0).astype(out_ref.dtype)
            if out_ref.dtype == q.dtype:
                q[:, columns] = x
            else:
                out_ref[unit, group, :, side, columns] = x
        lse[...] = jnp.where(total > 0, top * math.log(2.0) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        if out_ref.dtype == q.dtype:
            plgpu.copy_smem_to_gmem(q, out_ref.at[unit, group, :, side])
        pl.when(side == 0)(lambda: plgpu.copy_smem_to_gmem(lse, lse_ref.at[unit, group]))
        plgpu.wait_smem_to_gmem(0)


def _load_queries(q_ref, q, q_other, q_here, interpret):
    """Half the columns of the queries into shared memory, the others through it into tensor memory."""
    plgpu.copy_gmem_to_smem(q_ref.at[:, 1], q, q_here)
    plgpu.barrier_wait(q_here)
    for columns in _blocks(q_other):
        plgpu.async_store_tmem(q_other.at[:, columns], load(q.at[:, columns], LAYOUT, interpret))
    plgpu.commit_tmem()
    plgpu.commit_smem()
    plgpu.copy_gmem_to_smem(q_ref.at[:, 0], q, q_here)
    plgpu.barrier_wait(q_here)


def _scale(out, factor):
    """The output times a factor for each row."""
    for columns in _blocks(out):
        x = plgpu.async_load_tmem(out.at[:, columns])
        plgpu.wait_load_tmem()
        plgpu.async_store_tmem(out.at[:, columns], x * over_columns(factor, x))


def _over_rows(x, like):
    """One number per column, for each row of `like`, whose layout a column's does not tell."""
    return plgpu.layout_cast(over_rows(x, like), LAYOUT)


def _blocks(ref):
    """Columns that fit the registers."""
    return [pl.ds(first, COLUMNS) for first in range(0, ref.shape[1], COLUMNS)]
