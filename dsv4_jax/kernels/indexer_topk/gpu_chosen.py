"""Sums over heads at chosen entries on a GPU: attention mass and index scores (see `gpu_loss.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED, fetch, wait_for_copies
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_ROWS,
    ROWS,
    add_product,
    load,
    over_rows,
    product,
    transposed,
)

FETCHER = 2  # the warpgroup beside the two that compute
MEMORY = 224 << 10  # bytes of shared memory for queries and rows; a program may have 227 KiB
MOST_SLOTS = 8

Function = Callable[[jax.Array, jax.Array], jax.Array]


def masses(
    q: jax.Array, entries: jax.Array, lse: jax.Array, tiles: jax.Array, used: jax.Array, scale: float, interpret: Any
) -> jax.Array:
    """`sum_h exp(scale * q_h . e_i - lse_h)`; the arguments are those of `_sums`."""
    factor = math.log2(math.e)
    weight = lambda x, lse: jnp.exp2(x * (scale * factor) - lse)  # noqa: E731
    return _sums("attention_mass", weight, q, entries, lse * factor, tiles, used, interpret)


def scores(
    q: jax.Array, keys: jax.Array, weights: jax.Array, tiles: jax.Array, used: jax.Array, interpret: Any
) -> jax.Array:
    """`sum_h w_h * relu(q_h . k_i)`; the arguments are those of `_sums`."""
    weighted = lambda x, weight: jnp.maximum(x, 0.0) * weight  # noqa: E731
    return _sums("chosen_index_scores", weighted, q, keys, weights, tiles, used, interpret)


def _sums(
    name: str,
    function: Function,
    q: jax.Array,
    rows: jax.Array,
    numbers: jax.Array,
    tiles: jax.Array,
    used: jax.Array,
    interpret: Any,
) -> jax.Array:
    """`sum_h function(q_h . row_i, number_h)` of each query's rows.

    Args:
        name: of the kernel.
        function: of products [64 rows, heads] and the heads' numbers, over the same columns.
        q: [N, H, K] BF16; H a multiple of 64, K of 128.
        rows: [R, K] BF16.
        numbers: one for each head [N, H].
        tiles: which rows, int32 [N, tiles, 64]; negative is unused.
        used: how many tiles of each query to look at, int32 [N].
        interpret: see `gpu_loss.forward`.

    Returns:
        [N, tiles * 64] float32; any number where unused.
    """
    (count, heads, width), length = q.shape, tiles.shape[1]
    columns = ROWS * (2 if heads % (2 * ROWS) == 0 else 1)
    part = 256 if width % 256 == 0 else 128
    parts, groups = width // part, heads // columns
    slots = min((MEMORY // 2 - columns * width) // (ENTRIES * part), MOST_SLOTS)
    pieces = jnp.arange(parts, dtype=jnp.int32)[:, None]
    pieces = jnp.where(tiles[:, :, None] >= 0, tiles[:, :, None] * parts + pieces, -1)
    by_group = plgpu.kernel(
        partial(_add_up, function=function, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((count, groups, length, ENTRIES), jnp.float32),
        grid=(count * groups,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((parts, columns, part), q.dtype, transforms=TILED),
            plgpu.SMEM((slots, 1, ENTRIES, part), q.dtype, transforms=TILED),
            plgpu.SMEM((2, ENTRIES), jnp.float32),
            plgpu.Barrier(num_arrivals=parts),
            plgpu.Barrier(num_barriers=-(-slots // (2 * parts)) * 2 * parts),
            plgpu.Barrier(num_barriers=slots),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name=name,
    )(
        q.reshape(count, groups, columns, parts, part),
        rows.reshape(-1, part),
        numbers.astype(jnp.float32).reshape(count, groups, columns),
        pieces.reshape(count, length * parts, ENTRIES),
        used,
    )
    return by_group.sum(1).reshape(count, -1)


def _add_up(
    q_ref, rows_ref, numbers_ref, pieces_ref, used_ref, sums_ref,
    q, slots, sums, q_here, arrived, free, *, function, interpret,
):  # fmt: skip
    """Up to 128 heads of a query, over its tiles.

    Rows of a product are 64 entries, columns the heads, so that the sum over heads is along rows, within four threads.
    A tile comes in pieces of its columns. The two computing warpgroups take tiles in turns: one multiplies while the
    other one adds up. A piece's barrier is never the other warpgroup's, so that each sees all phases of its own.
    """
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    parts, groups = q.shape[0], numbers_ref.shape[1]
    query, group = lax.div(program, groups), lax.rem(program, groups)
    count = used_ref[query]

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for part in range(parts):
            plgpu.copy_gmem_to_smem(q_ref.at[query, group, :, part], q.at[part], q_here)
        bring(rows_ref, pieces_ref.at[query], count * parts, slots, arrived, free, interpret)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        numbers = load(numbers_ref.at[query, group], OVER_ROWS, interpret)
        plgpu.barrier_wait(q_here)

        def multiplied(piece, part, total):
            slot = lax.rem(piece, slots.shape[0])
            plgpu.barrier_wait(arrived.at[lax.rem(piece, arrived.shape[0])])
            rows, heads = slots.at[slot, 0], transposed(q.at[part], interpret)
            total = add_product(total, rows, heads, interpret) if part else product(rows, heads, interpret)
            plgpu.barrier_arrive(free.at[slot])
            return total

        def step(i, _):
            tile = 2 * i + me
            total = multiplied(tile * parts, 0, None)
            for part in range(1, parts):
                total = multiplied(tile * parts + part, part, total)
            added = function(total, over_rows(numbers, total)).sum(axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sums[me] = added
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[me], sums_ref.at[query, group, tile])
            return _

        lax.fori_loop(0, lax.div(count + 1 - me, 2), step, None)
        plgpu.wait_smem_to_gmem(0)


def bring(rows_ref, index_ref, count, slots, arrived, free, interpret):
    """What the copying warpgroup does: 64 rows `index_ref[i]` for each i < count into slots in turns.

    While one slot is read and another one is free for the next rows, copies into the others are on their way.

    Args:
        rows_ref: [R, n] in global memory.
        index_ref: int32 [.., 64] in global memory; negative is zeros.
        count: how many times 64.
        slots: [slots, 1, 64, n] in shared memory.
        arrived: as many barriers as slots or more, in turns.
        free: a barrier for each slot.
        interpret: see `gpu_loss.forward`.
    """
    number, ahead = slots.shape[0], slots.shape[0] - 2

    def arrives(i, _=None):
        plgpu.commit_smem()
        plgpu.barrier_arrive(arrived.at[lax.rem(i, arrived.shape[0])])
        return _

    def wait_until_free(i, _=None):
        plgpu.barrier_wait(free.at[lax.rem(i, number)])
        return _

    def step(i, _):
        pl.when(i >= number)(lambda: wait_until_free(i))
        fetch((rows_ref,), index_ref.at[i], slots.at[lax.rem(i, number)], interpret, later=ahead)
        pl.when(i >= ahead)(lambda: arrives(i - ahead))
        return _

    lax.fori_loop(0, count, step, None)
    wait_for_copies(interpret)
    lax.fori_loop(jnp.maximum(count - ahead, 0), count, arrives, None)
    lax.fori_loop(jnp.maximum(count - number, 0), count, wait_until_free, None)
