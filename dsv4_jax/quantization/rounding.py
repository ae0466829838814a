"""Rounding to FP8 and FP4 and back, with a straight-through gradient: what quantisation-aware training computes with.

A block of numbers shares the scale 2^ceil(log2(amax / largest)), amax being at least the floor of the released kernels;
numbers are rounded once, to nearest even. The gradient passes as if nothing had been rounded (report 3.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.quantization.formats import FP4_MAX, FP8_MAX, expand, power_of_two, smallest_powers

FormatName = Literal["fp8", "fp4"]


class Grid(NamedTuple):
    """A float format: its largest number, bits behind the leading one, smallest exponent, and the floor of amax."""

    largest: float
    mantissa: int
    exponent: int
    floor: float


GRIDS = {"fp8": Grid(FP8_MAX, 3, -6, 1e-4), "fp4": Grid(FP4_MAX, 1, 0, FP4_MAX * 2.0**-126)}


@dataclass(frozen=True)
class Rounding:
    """A function from array to array: its numbers as the format holds them, in the same dtype.

    Hashable and picklable, so that it can be static data of a compiled function.

    Attributes:
        format: "fp8" (e4m3) or "fp4" (e2m1), with power-of-two scales.
        tile: how many numbers of the last two axes share a scale; a last tile may be smaller.
        plain: numbers at the end of the last axis that are rounded to BF16 instead (rotary dims).
    """

    format: FormatName
    tile: tuple[int, int]
    plain: int = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [.., rows, columns] rounded. A tile with a NaN or an infinity becomes NaN."""
        return _straight_through(self, x)


def bf16(x: jax.Array) -> jax.Array:
    """x rounded to BF16, in its dtype."""
    # Not a cast: compilers may drop a pair of casts as excess precision, never this.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(how: Rounding, x: jax.Array) -> jax.Array:
    if not how.plain:
        return _rounded(how, x)
    end = x.shape[-1] - how.plain
    return jnp.concatenate([_rounded(how, x[..., :end]), bf16(x[..., end:])], axis=-1)


@_straight_through.defjvp
def _straight_through_jvp(how: Rounding, primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    return _straight_through(how, *primals), tangents[0]


def _rounded(how: Rounding, x: jax.Array) -> jax.Array:
    grid, wide = GRIDS[how.format], x.astype(jnp.float32)
    floor = math.ceil(math.log2(grid.floor / grid.largest))
    powers = jnp.maximum(smallest_powers(wide, how.tile, grid.largest), floor)
    scale = lambda powers: expand(power_of_two(powers), x.shape, how.tile, (0, 0))  # noqa: E731
    return (_nearest(wide * scale(-powers), grid) * scale(powers)).astype(x.dtype)


def _nearest(x: jax.Array, grid: Grid) -> jax.Array:
    """The nearest number of the format, ties to even, for |x| up to its largest.

    In float32 arithmetic, so that it is the same on devices that do not know the format.
    """
    exponent = ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255) - 127
    step = jnp.maximum(exponent, grid.exponent) - grid.mantissa  # numbers around x are 2^step apart
    return jnp.round(x * power_of_two(-step)) * power_of_two(step)
