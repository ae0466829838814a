"""What FP8 holds exactly travels between devices as FP8: a byte for each number, and one for the scale of each tile.

A precision policy rounds tokens before they travel to their experts, and the matrices of a release before a forward.
Rounding them again gives the same numbers, to FP8 those of FP4 too, whose numbers it has. So half the bytes of BF16
bring the same bits. TPUs get them in the dtype of the product: most of them lack FP8 and would take some twenty
operations for a number, and their links bound nothing here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.platforms import compiled_for
from dsv4_jax.quantization.formats import FP8, SCALE, dequantise_fp8_tiles, quantise_fp8_tiles
from dsv4_jax.quantization.rounding import Rounding

Tile = tuple[int, int]


def tile_of(rounding: Any) -> Tile | None:
    """The numbers that share a scale in what `rounding` has rounded; None if it does not travel as FP8."""
    exact = isinstance(rounding, Rounding) and not rounding.plain and compiled_for() != "tpu"
    return rounding.tile if exact else None


def keeps_tiles(part: tuple[int, ...], dimension: int, tile: Tile) -> bool:
    """Whether in an array that is cut into parts of this shape along a dimension no part has pieces of two tiles.

    Parts have whole tiles, or several share one: a piece of a tile has its own scale, not larger than the tile's.
    """
    from_last = len(part) - 1 - dimension
    if from_last > 1:
        return True
    size, own = tile[1 - from_last], part[dimension]
    return own % size == 0 or size % own == 0


def gather_rounded(part: jax.Array, axes: Any, dimension: int, tile: Tile, dtype: Any) -> jax.Array:
    """The parts of all devices along mesh axes, one behind the other in a dimension, in `dtype`; under `shard_map`.

    Args:
        part: floats that FP8 holds, with a scale for every tile.
        axes: of the mesh.
        dimension: along which the array is cut; see `keeps_tiles`.
        tile: rows and columns of the last two dimensions that share a scale.
        dtype: of the result, BF16 or wider.
    """
    values, scales = _bytes(part, tile)
    both = jax.lax.all_gather(jnp.concatenate([values.reshape(-1), scales.reshape(-1)]), axes)
    some, others = _cut(both, values.size)
    parts = _numbers(some.reshape(-1, *values.shape), others.reshape(-1, *scales.shape), tile, dtype)
    parts = jnp.moveaxis(parts, 0, dimension)
    return parts.reshape(*part.shape[:dimension], -1, *part.shape[dimension + 1 :])


def rows_as_bytes(x: jax.Array, tile: Tile) -> jax.Array:
    """Rows [R, D] of numbers that FP8 holds as uint8 [R, D + ceil(D / n)], for tiles [1, n]."""
    return jnp.concatenate(_bytes(x, tile), axis=-1)


def rows_of_bytes(rows: jax.Array, width: int, tile: Tile, dtype: Any) -> jax.Array:
    """The inverse of `rows_as_bytes`: [R, D] in `dtype`."""
    return _numbers(*_cut(rows, width), tile, dtype)


def _bytes(x: jax.Array, tile: Tile) -> tuple[jax.Array, jax.Array]:
    values, scales = quantise_fp8_tiles(x, tile)
    return values.view(jnp.uint8), scales.view(jnp.uint8)


def _numbers(values: jax.Array, scales: jax.Array, tile: Tile, dtype: Any) -> jax.Array:
    return dequantise_fp8_tiles(values.view(FP8), scales.view(SCALE), tile, dtype)


def _cut(x: jax.Array, at: int) -> tuple[jax.Array, jax.Array]:
    return x[..., :at], x[..., at:]
