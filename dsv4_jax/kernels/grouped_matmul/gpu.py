"""Grouped matmul on NVIDIA GPUs with warpgroup products (Hopper), through Pallas' Mosaic GPU backend.

A program has one tile of rows, which is of one expert, and 256 columns of the result. One warpgroup copies pieces of 64
inputs into slots in shared memory while two others multiply, each with 128 columns. Programs of a tile follow one
another, and tiles of an expert do: rows and weights come from memory about once and then from the second-level cache.

Weights are multiplied in the rows' dtype: float32 masters are converted before, whole. The gradient of the weights adds
up the products of an expert's tiles in registers, in the order of tiles; experts without rows get zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.kernels.platforms import are_hopper
from dsv4_jax.quantization.packed import Packed

STEP = 64  # inputs, or rows of a weight gradient, in a slot
WIDTH = 128  # columns of a warpgroup
HEIGHT = 128  # rows of a weight gradient in a program
SHARED = 13  # pieces of 16 KiB (64 x 128 in BF16) that shared memory holds beside barriers
FETCHER = 2  # the warpgroup beside the two that multiply


def supports(rows: jax.Array, weights: jax.Array | Packed, groups: Groups, transposed: bool = False) -> bool:
    """Whether the kernel takes these operands and the program is compiled for GPUs that have its instructions."""
    if isinstance(weights, Packed) or rows.dtype != jnp.bfloat16 or groups.tile not in (64, 128):
        return False
    inner, outer = weights.shape[:0:-1] if transposed else weights.shape[1:]
    return inner % STEP == 0 and outer % (2 * WIDTH) == 0 and are_hopper()


def supports_gradient(rows: jax.Array, weights: jax.Array, groups: Groups) -> bool:
    """The same for `weight_gradient`."""
    return weights.shape[1] % HEIGHT == 0 and supports(rows, weights, groups)


def forward(
    rows: jax.Array, weights: jax.Array, groups: Groups, transposed: bool = False, interpret: Any = False
) -> jax.Array:
    """Each row times its expert's matrix, or times its transpose.

    Args:
        rows: [R, I] BF16, or [R, O] when `transposed`.
        weights: [E, I, O].
        groups: of the rows, in tiles of 64 or 128.
        transposed: multiply with [O, I].
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        [R, O], or [R, I], in the rows' dtype; rows of unused tiles are zero.
    """
    inner, outer = weights.shape[:0:-1] if transposed else weights.shape[1:]
    piece = (WIDTH, STEP) if transposed else (STEP, WIDTH)
    body = partial(_multiply, transposed=transposed, interpret=interpret)
    shape = jax.ShapeDtypeStruct((len(rows), outer), rows.dtype)
    kernel = _kernel(body, shape, _programs(groups, outer), (groups.tile, STEP), piece, groups.tile, "", interpret)
    return kernel(groups.expert_of_tile, groups.tiles_used.reshape(1), rows, weights.astype(rows.dtype))


def weight_gradient(
    rows: jax.Array, d_out: jax.Array, weights: jax.Array, groups: Groups, interpret: Any = False
) -> jax.Array:
    """`sum_r rows[r]^T d_out[r]` over each expert's rows: [R, I], [R, O] -> [E, I, O] in the dtype of `weights`."""
    experts, inner, outer = weights.shape
    tiles = groups.expert_of_tile.shape[0]
    owner = jnp.where(jnp.arange(tiles) < groups.tiles_used, groups.expert_of_tile, experts)
    counts = jnp.zeros(experts, jnp.int32).at[owner].add(1, mode="drop") * (groups.tile // STEP)
    firsts = (jnp.cumsum(counts) - counts).astype(jnp.int32)
    shape = jax.ShapeDtypeStruct(weights.shape, jnp.float32)
    count = experts * (inner // HEIGHT) * (outer // (2 * WIDTH))
    name = "_weight_gradient"
    kernel = _kernel(
        partial(_accumulate, interpret=interpret), shape, count, (STEP, HEIGHT), (STEP, WIDTH), None, name, interpret
    )
    return kernel(firsts, counts, rows, d_out.astype(rows.dtype)).astype(weights.dtype)


def _programs(groups: Groups, outer: int) -> int:
    return groups.expert_of_tile.shape[0] * (outer // (2 * WIDTH))


def _kernel(body, shape, programs, left, right, out_rows, name, interpret):
    """A kernel of three warpgroups with slots for a piece of the left operand and two of the right one.

    A BF16 result leaves through shared memory, [out_rows, 128] for each warpgroup.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    leaving = 2 * out_rows // STEP if out_rows else 0
    slots = (SHARED - leaving) // 3
    tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.kernel(
        body,
        out_type=shape,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((slots, *left), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((slots, 2, *right), jnp.bfloat16, transforms=tiled),
            *([plgpu.SMEM((2, out_rows, WIDTH), jnp.bfloat16, transforms=tiled)] if leaving else []),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        interpret=interpret or None,
        kernel_name=f"grouped_matmul{name}",
    )


def _multiply(
    experts_ref, used_ref, rows_ref, weights_ref, out_ref, left, right, leaving, arrived, free, *, transposed, interpret
):
    """One tile of rows times 2 x 128 columns of its expert's matrix."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile, blocks = left.shape[1], out_ref.shape[1] // (2 * WIDTH)
    program = jax.lax.axis_index("program")
    t, block = jax.lax.div(program, blocks), jax.lax.rem(program, blocks)
    count = jnp.where(t < used_ref[0], rows_ref.shape[1] // STEP, 0)
    expert, here = experts_ref[t], pl.ds(pl.multiple_of(t * tile, tile), tile)

    def pieces(i):
        inputs = pl.ds(pl.multiple_of(i * STEP, STEP), STEP)
        columns = [pl.ds(pl.multiple_of((2 * block + half) * WIDTH, WIDTH), WIDTH) for half in (0, 1)]
        places = [(c, inputs) if transposed else (inputs, c) for c in columns]
        return rows_ref.at[here, inputs], [weights_ref.at[expert, *place] for place in places]

    def leave(me, total):
        leaving[me] = total.astype(leaving.dtype)
        plgpu.commit_smem()
        columns = pl.ds(pl.multiple_of((2 * block + me) * WIDTH, WIDTH), WIDTH)
        plgpu.copy_smem_to_gmem(leaving.at[me], out_ref.at[here, columns])
        plgpu.wait_smem_to_gmem(0)

    operands = lambda left, right: (left, plgpu.transpose_ref(right, (1, 0)) if transposed else right)  # noqa: E731
    if interpret:
        operands = lambda left, right: (left[...], right[...].T if transposed else right[...])  # noqa: E731
    _summed(pieces, operands, leave, count, tile, (left, right, arrived, free), interpret)


def _accumulate(firsts_ref, counts_ref, rows_ref, d_out_ref, total_ref, left, right, arrived, free, *, interpret):
    """128 rows and 2 x 128 columns of one expert's gradient, over its rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, inner, outer = total_ref.shape
    high, wide = inner // HEIGHT, outer // (2 * WIDTH)
    program = jax.lax.axis_index("program")
    expert, rest = jax.lax.div(program, high * wide), jax.lax.rem(program, high * wide)
    row, block = jax.lax.div(rest, wide), jax.lax.rem(rest, wide)
    mine = pl.ds(pl.multiple_of(row * HEIGHT, HEIGHT), HEIGHT)

    def pieces(i):
        here = pl.ds(pl.multiple_of((firsts_ref[expert] + i) * STEP, STEP), STEP)
        columns = [pl.ds(pl.multiple_of((2 * block + half) * WIDTH, WIDTH), WIDTH) for half in (0, 1)]
        return rows_ref.at[here, mine], [d_out_ref.at[here, c] for c in columns]

    def leave(me, total):
        total_ref[expert, mine, pl.ds(pl.multiple_of((2 * block + me) * WIDTH, WIDTH), WIDTH)] = total

    operands = lambda left, right: (plgpu.transpose_ref(left, (1, 0)), right)  # noqa: E731
    if interpret:
        operands = lambda left, right: (left[...].T, right[...])  # noqa: E731
    _summed(pieces, operands, leave, counts_ref[expert], HEIGHT, (left, right, arrived, free), interpret)


def _summed(pieces, operands, leave, count, height, memory, interpret):
    """The sum of `count` products [height, 128], computed by each of two warpgroups with its half of the columns.

    Args:
        pieces: from the number of a product to its left operand and its two right ones, in global memory.
        operands: what is multiplied, of a left and a right piece in shared memory.
        leave: takes the number of the warpgroup and its sum, float32.
        count: of products.
        height: rows of the result.
        memory: slots of left and right pieces, barriers of their arrival and of their release.
        interpret: see `forward`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv4_jax.kernels.sparse_attention.gpu_tiles import add_product, full

    left, right, arrived, free = memory
    slots = left.shape[0]
    me = jax.lax.axis_index("warpgroup")

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def step(i, _):
            slot = jax.lax.rem(i, slots)
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(free.at[slot]))
            from_left, from_right = pieces(i)
            plgpu.copy_gmem_to_smem(from_left, left.at[slot], arrived.at[slot])
            for half in (0, 1):
                plgpu.copy_gmem_to_smem(from_right[half], right.at[slot, half], arrived.at[slot])
            return _

        def until_free(i, _):
            plgpu.barrier_wait(free.at[jax.lax.rem(i, slots)])
            return _

        jax.lax.fori_loop(0, count, step, None)
        jax.lax.fori_loop(jnp.maximum(count - slots, 0), count, until_free, None)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def step(i, total):
            slot = jax.lax.rem(i, slots)
            plgpu.barrier_wait(arrived.at[slot])
            first, second = operands(left.at[slot], right.at[slot, me])
            total = add_product(total, first, second, interpret)
            plgpu.barrier_arrive(free.at[slot])
            return total

        leave(me, jax.lax.fori_loop(0, count, step, full((height, WIDTH), 0.0, plgpu.Layout.WGMMA, interpret)))
