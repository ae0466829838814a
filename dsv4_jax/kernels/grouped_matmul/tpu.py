"""Grouped matmul on a TPU: one step of the grid is one tile of rows times a block of its expert's matrix.

Which expert comes from scalar memory before the step, so that its block is on its way while the step before computes.
Tiles of one expert follow one another: its block is fetched once, and a block that the matrix unit cannot read as it
lies (float32 masters, packed numbers) is made ready once, in VMEM. Tiles behind the used ones fetch nothing.

The gradient of the weights adds up products over the tiles of one expert in its block of the result, which stays in
VMEM meanwhile: the order of additions is fixed. Experts without rows have a step of their own, that writes zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.quantization.formats import e2m1_numbers
from dsv4_jax.quantization.packed import Packed

LANES = 128
BLOCK_BYTES = 8 << 20  # of a block of weights, of which two are in VMEM
GRADIENT_BLOCK = 1024  # rows and columns of a block of a weight gradient, float32
UNDONE = 128  # rows of packed bytes that are undone at a time
VMEM_BYTES = 64 << 20


def supports(rows: jax.Array, weights: jax.Array | Packed, groups: Groups, transposed: bool = False) -> bool:
    """Whether the kernels take these operands: whole lanes, whole sublanes, and packed matrices as they lie."""
    if isinstance(weights, Packed):
        return groups.tile % 8 == 0 and not transposed and supports_packed(rows, weights)
    whole = all(size % LANES == 0 for size in weights.shape[1:]) and groups.tile % 8 == 0
    return whole and rows.dtype in (jnp.bfloat16, jnp.float32)


def supports_packed(x: jax.Array, weights: Packed) -> bool:
    """Whether x can be multiplied with packed matrices in the kernels."""
    whole = weights.values.shape[-2] % UNDONE == 0 and weights.shape[-1] % LANES == 0 and weights.tile[0] in (32, 128)
    return whole and weights.scales.dtype == jnp.uint8 and x.dtype in (jnp.bfloat16, jnp.float32)


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
        rows: [R, I], or [R, O] when `transposed`.
        weights: [E, I, O].
        groups: of the rows.
        transposed: multiply with [O, I].
        dtype: of the result; the rows' by default.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        [R, O], or [R, I]; rows of unused tiles are zero.
    """
    inner, outer = weights.shape[:0:-1] if transposed else weights.shape[1:]
    itemsize = 1 if isinstance(weights, Packed) else weights.dtype.itemsize
    width = _block(outer, BLOCK_BYTES // (inner * itemsize))
    block = (width, inner) if transposed else (inner, width)
    tiles = groups.expert_of_tile.shape[0]
    row_block = pl.BlockSpec((groups.tile, inner), lambda j, t, experts, used: (_last(t, used), 0))
    out_block = pl.BlockSpec((groups.tile, width), lambda j, t, experts, used: (t, j))

    def part(*shape: int) -> pl.BlockSpec:
        place = lambda j, t, experts, used: (experts[_last(t, used)], *((j, 0) if transposed else (0, j)))  # noqa: E731
        return pl.BlockSpec((1, *shape), place)

    ready = pltpu.VMEM(block, rows.dtype)
    if isinstance(weights, Packed):
        rows = _evens_first(rows) if weights.format == "fp4" else rows
        scales = jnp.repeat(weights.scales, weights.tile[1], axis=-1)[..., :outer]
        operands = weights.values, scales
        specs = [part(weights.values.shape[1], width), part(scales.shape[1], width)]
        scratch = [ready, pltpu.VMEM((scales.shape[1], width), jnp.float32)]
        kernel = partial(_multiply_packed, format=weights.format, group=weights.tile[0])
    else:
        operands, specs = (weights,), [part(*block)]
        scratch = [ready] if weights.dtype != rows.dtype else []
        kernel = partial(_multiply, transposed=transposed)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(outer // width, tiles),
            in_specs=[row_block, *specs],
            out_specs=out_block,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((len(rows), outer), dtype or rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(rows, outer, operands, rows.dtype.itemsize * len(rows) * outer, outer // width),
        interpret=interpret,
        name="grouped_matmul",
    )(groups.expert_of_tile, groups.tiles_used.reshape(1), rows, *operands)


def _multiply(experts, used, rows, weight, out, ready=None, *, transposed):
    """One tile of rows; `ready` is the block in the rows' dtype, where it has another."""
    if ready is not None:
        pl.when(_begins(experts, used))(lambda: _set(ready, weight[0].astype(ready.dtype)))
    _product(used, rows, out, lambda: weight[0] if ready is None else ready[...], transposed)


def _multiply_packed(experts, used, rows, values, scales, out, ready, factors, *, format, group):
    """As `_multiply`; `ready` is the block as numbers, even inputs first where two share a byte."""
    pl.when(_begins(experts, used))(lambda: _undo(values, scales, ready, factors, format, group))
    _product(used, rows, out, lambda: ready[...], transposed=False)


def _product(used, rows, out, weight, transposed):
    live = pl.program_id(1) < used[0]
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def multiply():
        product = jax.lax.dot_general(rows[...], weight(), contract, preferred_element_type=jnp.float32)
        out[...] = product.astype(out.dtype)

    pl.when(live)(multiply)
    pl.when(~live)(lambda: _set(out, jnp.zeros(out.shape, out.dtype)))


def _undo(values, scales, ready, factors, format, group):
    """Packed bytes [1, n, width] and their scales [1, k, width] as numbers in `ready`, UNDONE rows at a time."""
    factors[...] = pltpu.bitcast(scales[0].astype(jnp.int32) << 23, jnp.float32)
    per = group if format == "fp8" else group // 2  # rows of bytes that share a scale
    count = UNDONE // per

    def some(i, _):
        here = pl.ds(pl.multiple_of(i * UNDONE, UNDONE), UNDONE)
        codes = values[0, here].astype(jnp.int32)
        factor = jnp.repeat(factors[pl.ds(i * count, count)], per, axis=0)
        if format == "fp8":
            ready[here] = (_e4m3_numbers(codes) * factor).astype(ready.dtype)
        else:
            odd = pl.ds(pl.multiple_of(values.shape[1] + i * UNDONE, UNDONE), UNDONE)
            ready[here] = (e2m1_numbers(codes & 15) * factor).astype(ready.dtype)
            ready[odd] = (e2m1_numbers(codes >> 4) * factor).astype(ready.dtype)
        return _

    jax.lax.fori_loop(0, values.shape[1] // UNDONE, some, 0)


def _e4m3_numbers(codes):
    """The numbers of e4m3 codes 0 .. 255, int32 -> float32, on chips that do not know the format."""
    size = codes & 127
    normal = pltpu.bitcast((size << 20) + (120 << 23), jnp.float32)
    number = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, normal)
    number = jnp.where(size == 127, jnp.nan, number)
    return jnp.where(codes > 127, -number, number)


def weight_gradient(
    rows: jax.Array, d_out: jax.Array, weights: jax.Array, groups: Groups, interpret: Any = False
) -> jax.Array:
    """`sum_r rows[r]^T d_out[r]` over each expert's rows: [R, I], [R, O] -> [E, I, O] in the dtype of `weights`."""
    count, inner, outer = weights.shape
    height, width = _block(inner, GRADIENT_BLOCK), _block(outer, GRADIENT_BLOCK)
    visits = _visits(groups, count)
    rows_at = lambda i, j, s, tiles, experts, live: (tiles[s], i)  # noqa: E731
    d_out_at = lambda i, j, s, tiles, experts, live: (tiles[s], j)  # noqa: E731
    total_at = lambda i, j, s, tiles, experts, live: (experts[s], i, j)  # noqa: E731
    return pl.pallas_call(
        _accumulate,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(inner // height, outer // width, len(visits[0])),
            in_specs=[pl.BlockSpec((groups.tile, height), rows_at), pl.BlockSpec((groups.tile, width), d_out_at)],
            out_specs=pl.BlockSpec((1, height, width), total_at),
        ),
        out_shape=jax.ShapeDtypeStruct(weights.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(rows, outer, (d_out,) * (inner // height), 4 * weights.size, outer // width),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(*visits, rows, d_out).astype(weights.dtype)


def _accumulate(tiles, experts, live, rows, d_out, total):
    """The product of one tile added to its expert's block, which begins with zeros."""
    step = pl.program_id(2)
    begins = (step == 0) | (experts[step] != experts[jnp.maximum(step - 1, 0)])
    pl.when(begins)(lambda: _set(total, jnp.zeros(total.shape, total.dtype)))

    def add():
        over_rows = (((0,), (0,)), ((), ()))
        total[0] += jax.lax.dot_general(rows[...], d_out[...], over_rows, preferred_element_type=jnp.float32)

    pl.when(live[step] != 0)(add)


def _visits(groups: Groups, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tile, expert, whether there is a tile) of each step: every tile in use, and one step for an expert without any.

    Steps behind them stay at the last expert and add nothing.
    """
    tiles, pairs = groups.expert_of_tile.shape[0], groups.row_of.size
    owner = jnp.where(jnp.arange(tiles) < groups.tiles_used, groups.expert_of_tile, experts)
    counts = jnp.zeros(experts, jnp.int32).at[owner].add(1, mode="drop")
    steps = jnp.maximum(counts, 1)
    ends = jnp.cumsum(steps)
    step = jnp.arange(pairs // groups.tile + experts, dtype=jnp.int32)  # at least as many as there are
    expert = jnp.minimum(jnp.searchsorted(ends, step, side="right"), experts - 1).astype(jnp.int32)
    place = step - (ends - steps)[expert]
    tile = (jnp.cumsum(counts) - counts)[expert] + place
    return jnp.clip(tile, 0, tiles - 1), expert, (place < counts[expert]).astype(jnp.int32)


def _cost(rows: jax.Array, outer: int, others: Any, written: int, times: int) -> pl.CostEstimate:
    """Of a product with all tiles in use, for the compiler: rows are read `times` times, everything else once."""
    read = rows.nbytes * times + sum(other.nbytes for other in others)
    return pl.CostEstimate(flops=2 * rows.size * outer, bytes_accessed=read + written, transcendentals=0)


def _evens_first(rows: jax.Array) -> jax.Array:
    """Columns 0, 2, 4, .., 1, 3, 5, ..: as FP4 bytes are undone."""
    return rows.reshape(len(rows), -1, 2).swapaxes(1, 2).reshape(rows.shape)


def _begins(experts, used):
    """Whether this step is an expert's first with this block."""
    t = pl.program_id(1)
    return (t < used[0]) & ((t == 0) | (experts[t] != experts[jnp.maximum(t - 1, 0)]))


def _last(t, used):
    """The tile, or for unused ones the last used: nothing new is fetched."""
    return jnp.maximum(jnp.minimum(t, used[0] - 1), 0)


def _block(size: int, most: int) -> int:
    """The largest whole number of lanes up to `most` that divides `size`; at least one lane tile."""
    return next((n for n in range(min(most, size) // LANES * LANES, LANES, -LANES) if size % n == 0), LANES)


def _set(ref, value):
    ref[...] = value
