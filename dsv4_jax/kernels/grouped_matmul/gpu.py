"""Grouped matmul on NVIDIA GPUs with warpgroup products (Hopper), through Pallas' Mosaic GPU backend.

A program has one tile of rows, which is of one expert, and 256 columns of the result. One warpgroup copies pieces of 64
inputs into slots in shared memory while two others multiply, each with 128 columns. Programs of a tile follow one
another, and tiles of an expert do: rows and weights come from memory about once and then from the second-level cache.

Weights are multiplied in the rows' dtype: float32 masters are converted before, whole. The gradient of the weights adds
up the products of an expert's tiles in registers, in the order of tiles; experts without rows get zeros. Packed weights
have a product of their own (`gpu_packed.py`).
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
PROCESSORS = 132  # of an H100 or H200; a program fills one
PART = 256  # inputs of a packed matrix alone, at least, that are worth a program
SHARED = 13  # pieces of 16 KiB (64 x 128 in BF16) that shared memory holds beside barriers


def supports(rows: jax.Array, weights: jax.Array | Packed, groups: Groups, transposed: bool = False) -> bool:
    """Whether the kernel takes these operands and the program is compiled for GPUs that have its instructions."""
    if isinstance(weights, Packed):
        return groups.tile % 8 == 0 and groups.tile <= 128 and not transposed and supports_packed(rows, weights)
    return groups.tile in (64, 128) and _whole(rows, weights.shape[:0:-1] if transposed else weights.shape[1:])


def supports_packed(x: jax.Array, weights: Packed) -> bool:
    """Whether x can be multiplied with packed matrices in the kernel, and the program is compiled for such GPUs."""
    known = weights.scales.dtype == jnp.uint8 and weights.tile[0] in (32, 128)
    return known and _whole(x, weights.shape[-2:])


def parts_of(weight: Packed, tiles: int) -> int:
    """Into how many parts of its inputs a packed matrix is cut, so that its programs for few rows fill a GPU once."""
    inner, outer = weight.shape
    most = PROCESSORS // (tiles * outer // (2 * WIDTH))
    return next((parts for parts in range(most, 1, -1) if inner % (parts * PART) == 0), 1)


def _whole(x: jax.Array, shape: tuple[int, ...]) -> bool:
    inner, outer = shape
    return x.dtype == jnp.bfloat16 and inner % STEP == 0 and outer % (2 * WIDTH) == 0 and are_hopper()


def supports_gradient(rows: jax.Array, weights: jax.Array, groups: Groups) -> bool:
    """The same for `weight_gradient`."""
    return weights.shape[1] % HEIGHT == 0 and supports(rows, weights, groups)


def forward(
    rows: jax.Array,
    weights: jax.Array | Packed,
    groups: Groups,
    transposed: bool = False,
    dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """Each row times its expert's matrix, or times its transpose.

    Args:
        rows: [R, I] BF16, or [R, O] when `transposed`.
        weights: [E, I, O]; packed ones are undone in the kernel.
        groups: of the rows, in tiles of 64 or 128; with packed weights, of a multiple of 8 up to 128.
        transposed: multiply with [O, I].
        dtype: of the result, with packed weights; the rows' by default.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        [R, O], or [R, I]; rows of unused tiles are zero.
    """
    if isinstance(weights, Packed):
        from dsv4_jax.kernels.grouped_matmul import gpu_packed

        return gpu_packed.forward(rows, weights, groups, dtype or rows.dtype, interpret)
    outer = weights.shape[1 if transposed else 2]
    piece = (WIDTH, STEP) if transposed else (STEP, WIDTH)
    body = partial(_multiply, transposed=transposed, interpret=interpret)
    shape = jax.ShapeDtypeStruct((len(rows), outer), rows.dtype)
    kernel = _kernel(body, shape, programs(groups, outer), (groups.tile, STEP), piece, groups.tile, "", interpret)
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


def programs(groups: Groups, outer: int) -> int:
    """How many run: each has a tile of rows and 256 columns."""
    return groups.expert_of_tile.shape[0] * (outer // (2 * WIDTH))


def _kernel(body, shape, programs, left, right, out_rows, name, interpret):
    """A kernel with slots for a piece of the left operand and two of the right one.

    A BF16 result leaves through shared memory, [out_rows, 128] for each warpgroup.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv4_jax.kernels.grouped_matmul.gpu_loop import kernel, tiled

    leaving = 2 * out_rows // STEP if out_rows else 0
    slots = (SHARED - leaving) // 3
    piece = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled(2))  # noqa: E731
    memory = [piece(slots, *left), piece(slots, 2, *right), *([piece(2, out_rows, WIDTH)] if leaving else [])]
    return kernel(body, shape, programs, memory, slots, 3, f"grouped_matmul{name}", interpret)


def _multiply(
    experts_ref, used_ref, rows_ref, weights_ref, out_ref, left, right, leaving, arrived, free, *, transposed, interpret
):
    """One tile of rows times 2 x 128 columns of its expert's matrix."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv4_jax.kernels.grouped_matmul.gpu_loop import part, place_of_program, summed
    from dsv4_jax.kernels.sparse_attention import gpu_tiles

    tile = left.shape[1]
    here = place_of_program(experts_ref, used_ref, rows_ref, out_ref, tile)

    def copies(i, slot):
        inputs = part(i, STEP)
        places = [(c, inputs) if transposed else (inputs, c) for c in map(here.columns, (0, 1))]
        weights = [(weights_ref.at[here.expert, *place], right.at[slot, half]) for half, place in enumerate(places)]
        return [(rows_ref.at[here.rows, inputs], left.at[slot]), *weights]

    def add(total, slot, me):
        weights = right.at[slot, me]
        second = gpu_tiles.transposed(weights, interpret) if transposed else weights
        return gpu_tiles.add_product(total, left.at[slot], second, interpret)

    def leave(me, total):
        leaving[me] = total.astype(leaving.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(leaving.at[me], out_ref.at[here.rows, here.columns(me)])
        plgpu.wait_smem_to_gmem(0)

    summed(copies, add, leave, here.count, (tile, WIDTH), (arrived, free), interpret)


def _accumulate(firsts_ref, counts_ref, rows_ref, d_out_ref, total_ref, left, right, arrived, free, *, interpret):
    """128 rows and 2 x 128 columns of one expert's gradient, over its rows."""
    from dsv4_jax.kernels.grouped_matmul.gpu_loop import part, summed
    from dsv4_jax.kernels.sparse_attention import gpu_tiles

    _, inner, outer = total_ref.shape
    high, wide = inner // HEIGHT, outer // (2 * WIDTH)
    program = jax.lax.axis_index("program")
    expert, rest = jax.lax.div(program, high * wide), jax.lax.rem(program, high * wide)
    row, block = jax.lax.div(rest, wide), jax.lax.rem(rest, wide)
    mine = part(row, HEIGHT)

    def copies(i, slot):
        here = part(firsts_ref[expert] + i, STEP)
        d_out = [(d_out_ref.at[here, part(2 * block + half, WIDTH)], right.at[slot, half]) for half in (0, 1)]
        return [(rows_ref.at[here, mine], left.at[slot]), *d_out]

    def add(total, slot, me):
        return gpu_tiles.add_product(
            total, gpu_tiles.transposed(left.at[slot], interpret), right.at[slot, me], interpret
        )

    def leave(me, total):
        total_ref[expert, mine, part(2 * block + me, WIDTH)] = total

    summed(copies, add, leave, counts_ref[expert], (HEIGHT, WIDTH), (arrived, free), interpret)
