"""The forward kernel of attention over chosen entries or ranges for Blackwell: products from and into tensor memory.

As `gpu_forward.py`, with 128 heads for the rows of a product (`tcgen05`), and half of the output's columns for a
program: 128 x 256 float32 numbers are half of tensor memory, whose other half has scores, weights and half the queries.
One warpgroup copies entries, one starts products, one makes weights of scores while the products run.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention.gpu_choice import NEVER, Chosen, Run
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


class Scratch(NamedTuple):
    """What a program has besides its operands and results; `here` says what memory of which kind and size."""

    q: Any  # half of the columns, in shared memory; at last the output
    entries: Any
    lse: Any
    q_other: Any  # from here on in tensor memory: the other half of the columns
    scores: Any
    weights: Any
    out: Any
    q_here: Any  # from here on barriers: half of the queries has been copied
    arrived: Any  # a tile
    used: Any  # a tile
    q_ready: Any  # all of the queries
    scored: Any  # a tile
    read: Any  # the scores of a tile
    weighed: Any  # a tile's weights have been written, and the output fits them
    added: Any  # a tile's product with its weights

    @classmethod
    def here(cls, half: int, dtype: Any) -> Scratch:
        """For entries of 2 * `half` columns."""
        ordering = [plgpu.Barrier(orders_tensor_core=True) for _ in range(5)]
        return cls(
            plgpu.SMEM((ROWS, half), dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, 2, ENTRIES, half), dtype, transforms=TILED),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.TMEM((ROWS, half), dtype, packed=True),
            plgpu.TMEM((ROWS, ENTRIES), jnp.float32),
            plgpu.TMEM((ROWS, ENTRIES), dtype, packed=True),
            plgpu.TMEM((ROWS, half), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            *ordering,
        )


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
        scratch_types=[*Scratch.here(half, q.dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4 * ROWS),
        interpret=interpret or None,
        kernel_name=choice.name,
    )(q.reshape(count, groups, ROWS, 2, half), *leaves)
    return out.reshape(units, heads, width), lse.reshape(units, heads)


def _attend(q_ref, *refs, tree, groups, parts, scale, interpret):
    """128 heads of one part of a query, half of the output's columns."""
    choice, stored = tree.unflatten(refs[: tree.num_leaves])
    out_ref, lse_ref, *scratch = refs[tree.num_leaves :]
    here = Scratch(*scratch)
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    side, unit = lax.rem(program, 2), lax.div(program, 2 * groups)
    group = lax.rem(lax.div(program, 2), groups)
    mine = choice.of(unit)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        fetch_all(mine, stored, here, interpret)

    @pl.when(me == ISSUER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        _multiply(mine.tiles, side, here)

    @pl.when(me == COMPUTER)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _load_queries(q_ref.at[lax.div(unit, parts), group], here, interpret)
        top, total = _weigh(mine, scale, here, interpret)
        _finish(top, total, out_ref.at[unit, group, :, side], here)
        pl.when(side == 0)(lambda: plgpu.copy_smem_to_gmem(here.lse, lse_ref.at[unit, group]))
        plgpu.wait_smem_to_gmem(0)


def fetch_all(mine: Any, stored: tuple[Any, ...], here: Any, interpret: Any) -> None:
    """All tiles of a unit into shared memory, each as soon as there is room; returns when all have been used.

    Args:
        mine: the unit's entries; see `gpu_choice`.
        stored: see `gpu_fetch.fetch`.
        here: has `entries`, one tile for each slot, and the barriers `arrived` and `used` of slots.
        interpret: see `gpu_fetch.fetch`.
    """
    count = mine.tiles

    def step(i, _):
        slot = lax.rem(i, SLOTS)
        pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(here.used.at[slot]))
        mine.fetch(stored, i, here.entries.at[slot], interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(here.arrived.at[slot])
        return _

    def until_used(i, _):
        plgpu.barrier_wait(here.used.at[lax.rem(i, SLOTS)])
        return _

    lax.fori_loop(0, count, step, None)
    lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, until_used, None)


def _multiply(count, side, here):
    """Starts all products: the scores of the next tile before a tile's weights are there."""
    plgpu.barrier_wait(here.q_ready)

    def score(i):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(here.arrived.at[slot])
        plgpu.tcgen05_mma(here.scores, here.q, here.entries.at[slot, 0].T, accumulate=False)
        plgpu.tcgen05_mma(here.scores, here.q_other, here.entries.at[slot, 1].T, here.scored)

    def step(i, _):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(here.read)
        pl.when(i + 1 < count)(lambda: score(i + 1))
        plgpu.barrier_wait(here.weighed)
        values = here.entries.at[slot, side]
        plgpu.tcgen05_mma(here.out, here.weights, values, here.used.at[slot], accumulate=i > 0)
        plgpu.tcgen05_commit_arrive(here.added)
        return _

    pl.when(count > 0)(lambda: score(0))
    lax.fori_loop(0, count, step, None)


def _load_queries(q_ref, here, interpret):
    """Half the columns of the queries into shared memory, the others through it into tensor memory."""
    plgpu.copy_gmem_to_smem(q_ref.at[:, 1], here.q, here.q_here)
    plgpu.barrier_wait(here.q_here)
    for columns in blocks_of(here.q_other):
        plgpu.async_store_tmem(here.q_other.at[:, columns], load(here.q.at[:, columns], LAYOUT, interpret))
    plgpu.commit_tmem()
    plgpu.commit_smem()
    plgpu.copy_gmem_to_smem(q_ref.at[:, 0], here.q, here.q_here)
    plgpu.barrier_wait(here.q_here)
    plgpu.barrier_arrive(here.q_ready)


def _weigh(mine, scale, here, interpret):
    """Weights from the scores of all tiles; what they are relative to, and their sums.

    That is each row's largest score, or less by `SLACK` at most: so the output, which has to fit, rarely changes.
    """

    def step(i, carry):
        top, total = carry
        unseen = mine.unseen(i, OVER_ROWS, interpret)  # on its way while the scores are computed
        plgpu.barrier_wait(here.scored)
        x = plgpu.async_load_tmem(here.scores)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(here.read)
        x = x * (scale * math.log2(math.e)) + _over_rows(unseen, x)
        highest = x.max(axis=1)
        raised = (highest - top).max() > SLACK
        higher = jnp.maximum(top, highest + jnp.where(raised, 0.0, NEVER))
        x = jnp.exp2(x - over_columns(higher, x))
        fade = jnp.exp2(top - higher)
        pl.when(i > 0)(lambda: plgpu.barrier_wait(here.added))
        pl.when(raised & (i > 0))(lambda: _scale(here.out, fade))
        plgpu.async_store_tmem(here.weights, x.astype(jnp.bfloat16))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(here.weighed)
        return higher, total * fade + x.sum(axis=1)

    start = full((ROWS,), LEAST, OVER_COLUMNS, interpret), full((ROWS,), 0.0, OVER_COLUMNS, interpret)
    top, total = lax.fori_loop(0, mine.tiles, step, start)
    pl.when(mine.tiles > 0)(lambda: plgpu.barrier_wait(here.added))
    return top, total


def _finish(top, total, out_ref, here):
    """The output, which is on its way on return, and the log-sum-exp in shared memory."""
    narrow = out_ref.dtype == here.q.dtype
    inverse = 1.0 / jnp.maximum(total, 1e-30)
    for columns in blocks_of(here.out):
        x = plgpu.async_load_tmem(here.out.at[:, columns])
        # Where nothing was seen no product has been written.
        x = jnp.where(over_columns(total, x) > 0, x * over_columns(inverse, x), 0.0).astype(out_ref.dtype)
        (here.q if narrow else out_ref)[:, columns] = x
    here.lse[...] = jnp.where(total > 0, top * math.log(2.0) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    if narrow:
        plgpu.copy_smem_to_gmem(here.q, out_ref)


def _scale(out, factor):
    """The output times a factor for each row."""
    for columns in blocks_of(out):
        x = plgpu.async_load_tmem(out.at[:, columns])
        plgpu.wait_load_tmem()
        plgpu.async_store_tmem(out.at[:, columns], x * over_columns(factor, x))


def _over_rows(x, like):
    """One number per column, for each row of `like`, whose layout a column's does not tell."""
    return plgpu.layout_cast(over_rows(x, like), LAYOUT)


def blocks_of(ref: Any) -> list[Any]:
    """Columns that fit the registers, one after the other."""
    return [pl.ds(first, COLUMNS) for first in range(0, ref.shape[1], COLUMNS)]
