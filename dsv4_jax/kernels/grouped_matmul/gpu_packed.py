"""Grouped matmul with packed experts on a GPU: bytes travel as they lie, and are undone in the registers that multiply.

The product is transposed, [columns, inputs] x [inputs, rows], since a warpgroup product takes its left operand from
registers: undone numbers never go back to shared memory. The right operand may be as narrow as 8, so few rows of an
expert are no waste.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.grouped_matmul.gpu import SHARED, STEP, WIDTH, programs
from dsv4_jax.kernels.grouped_matmul.gpu_loop import kernel, part, place_of_program, summed, tiled
from dsv4_jax.kernels.grouped_matmul.gpu_undo import undone, write
from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.kernels.sparse_attention.gpu_tiles import add_product, transposed
from dsv4_jax.quantization.packed import Packed


def forward(rows: jax.Array, weights: Packed, groups: Groups, dtype: Any, interpret: Any) -> jax.Array:
    """See `gpu.forward`."""
    outer, group = weights.shape[2], weights.tile[0]
    scales = jnp.repeat(weights.scales, weights.tile[1], axis=-1)[..., :outer]
    bytes_ = STEP * weights.values.shape[1] // weights.shape[1], WIDTH
    factors = max(STEP // group, 1), WIDTH
    slots = (SHARED << 14) // (2 * STEP * groups.tile + 2 * WIDTH * (bytes_[0] + factors[0]))
    memory = [
        plgpu.SMEM((slots, groups.tile, STEP), rows.dtype, transforms=tiled(2)),
        plgpu.SMEM((slots, 2, *bytes_), jnp.uint8, transforms=tiled(1)),
        plgpu.SMEM((slots, 2, *factors), jnp.uint8),
    ]
    body = partial(_multiply, format=weights.format, group=group, interpret=interpret)
    out, name = jax.ShapeDtypeStruct((len(rows), outer), dtype), f"grouped_matmul_{weights.format}"
    multiply = kernel(body, out, programs(groups, outer), memory, slots, 5, name, interpret)
    return multiply(groups.expert_of_tile, groups.tiles_used.reshape(1), rows, weights.values, scales)


def _multiply(
    experts_ref, used_ref, rows_ref, values_ref, scales_ref, out_ref, right, values, scales, arrived, free,
    *, format, group, interpret
):  # fmt: skip
    """One tile of rows times 2 x 128 columns of its expert's packed matrix."""
    tile = right.shape[1]
    here = place_of_program(experts_ref, used_ref, rows_ref, out_ref, tile)

    def copies(i, slot):
        bytes_ = part(i, values.shape[2])
        factors = part(jax.lax.div(i * STEP, max(group, STEP)), scales.shape[2])
        pairs = [(rows_ref.at[here.rows, part(i, STEP)], right.at[slot])]
        for half in (0, 1):
            columns = here.columns(half)
            pairs.append((values_ref.at[here.expert, bytes_, columns], values.at[slot, half]))
            pairs.append((scales_ref.at[here.expert, factors, columns], scales.at[slot, half]))
        return pairs

    def add(total, slot, me):
        numbers = undone(values.at[slot, me], scales.at[slot, me], format, interpret)
        return add_product(total, numbers, transposed(right.at[slot], interpret), interpret)

    def leave(me, total):
        write(total, out_ref.at[here.rows, here.columns(me)], format, interpret)

    summed(copies, add, leave, here.count, (WIDTH, tile), (arrived, free), interpret)
