"""The number formats of the release: FP8 (e4m3), FP4 (e2m1, two per byte), and power-of-two scales (ue8m0).

A block of numbers shares one scale, the smallest power of two with which its largest number fits the format: numbers
are rounded once, to nearest even, and multiplying by the scale is exact. Every function is pure, takes numpy or JAX
arrays and returns the same kind. A scale is stored in one byte b and means 2^(b-127); 255 is NaN.

Blocks are cut from the start of an axis; the last one may be shorter. Quantising what was dequantised gives the same
numbers again, always. It gives the same bytes where a block's largest stored number exceeds half the format's: a number
just above that half may have been rounded down onto it, and then half the scale fits too, with every number doubled.
Whoever needs the bytes gives the scales back as `known`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

A = TypeVar("A", jax.Array, np.ndarray)  # what goes in comes out
Array = Any
FP8, SCALE = jnp.float8_e4m3fn, jnp.float8_e8m0fnu
FP8_MAX, FP4_MAX = 448.0, 6.0
TILE = (128, 128)  # rows and columns that share a scale in FP8 weights
FP4_BLOCK = 32  # inputs that share a scale in FP4 experts and indexer keys
NAN_SCALE = 255
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], -1)  # the two numbers of every byte


def quantise_fp8(x: A, block: int) -> tuple[A, A]:
    """FP8 with one scale per `block` numbers of the last axis.

    Args:
        x: floats [.., n].
        block: numbers that share a scale (64 in the compressed cache). A last block that is shorter has its own.

    Returns:
        (float8_e4m3fn [.., n], float8_e8m0fnu [.., ceil(n / block)]). Blocks of zeros get the smallest scale; a block
        with a NaN or an infinity gets the NaN scale, so that it cannot pass for numbers.
    """
    return _quantise_fp8(x, (1, block))


def dequantise_fp8(values: A, scales: A, block: int, dtype: Any = jnp.float32) -> A:
    """The numbers that `quantise_fp8` stored, [.., n] in `dtype`; exact in bfloat16 and wider."""
    return _scaled(values.astype(np.float32), scales, (1, block), (0, 0), dtype)


def quantise_fp8_tiles(x: A, tile: tuple[int, int] = TILE, known: A | None = None) -> tuple[A, A]:
    """FP8 with one scale per tile of the last two axes, as the release stores matrices.

    Args:
        x: floats [.., rows, columns].
        tile: rows and columns that share a scale.
        known: scales to keep where they hold the numbers of their tile exactly: those with which x was stored before.

    Returns:
        (float8_e4m3fn [.., rows, columns], float8_e8m0fnu [.., ceil(rows / 128), ceil(columns / 128)]).
    """
    return _quantise_fp8(x, tile, known)


def dequantise_fp8_tiles(
    values: A, scales: A, tile: tuple[int, int] = TILE, dtype: Any = jnp.float32, start: tuple[int, int] = (0, 0)
) -> A:
    """The inverse of `quantise_fp8_tiles`; for a part of a matrix that begins inside a tile, `start` says where."""
    return _scaled(values.astype(np.float32), scales, tile, start, dtype)


def quantise_fp4(x: A, block: int = FP4_BLOCK, known: A | None = None) -> tuple[A, A]:
    """FP4 with one scale per `block` numbers of the last axis, two numbers per byte.

    Args:
        x: floats [.., n], n even.
        block: numbers that share a scale.
        known: scales to keep where they hold the numbers of their block exactly, as in `quantise_fp8_tiles`.

    Returns:
        (uint8 [.., n / 2], the even element in the low four bits; float8_e8m0fnu [.., ceil(n / block)]).

    Raises:
        ValueError: for an odd n.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"FP4 packs two numbers per byte: the last axis of {x.shape} is odd")
    x = x.astype(np.float32)
    powers = _powers(x, (1, block), FP4_MAX, known, lambda x: unpack_fp4(_packed(_e2m1_codes(x))))
    return _packed(_e2m1_codes(_divided(x, powers, (1, block)))), _scale_bytes(powers)


def dequantise_fp4(packed: A, scales: A, block: int = FP4_BLOCK, dtype: Any = jnp.float32) -> A:
    """The numbers that `quantise_fp4` packed: uint8 or int8 [.., n / 2] -> [.., n]; exact in bfloat16 and wider."""
    return _scaled(unpack_fp4(packed), scales, (1, block), (0, 0), dtype)


def fp4_as_fp8(packed: A, scales: A) -> tuple[A, A, A]:
    """FP4 matrices, as `quantise_fp4` packs them, in FP8 tiles of 128 x 128: what an FP8 matrix product can read.

    The scale of a tile is its largest FP4 scale over 2^6, so that the largest number, 6, becomes 384 of 448. Nothing is
    lost where the FP4 scales of a tile span at most 2^6 (report 2.3.4); e4m3's denormals in fact bear up to 2^14.
    Blocks of zeros do not count.

    Args:
        packed: uint8 or int8 [.., rows, n / 2].
        scales: float8_e8m0fnu [.., rows, ceil(n / 32)].

    Returns:
        (float8_e4m3fn [.., rows, n]; float8_e8m0fnu [.., ceil(rows / 128), ceil(n / 128)]; bool of the same shape:
        whether every number of the tile is still the same).
    """
    numbers, tile = unpack_fp4(packed), (TILE[0], TILE[1] // FP4_BLOCK)
    xp, codes = _module(numbers), scales.view(np.uint8).astype(np.int32)
    zeros = (_tile_maxima(numbers, (1, FP4_BLOCK)) == 0) & (codes != NAN_SCALE)
    codes = xp.where(zeros, 0, codes)
    largest = _tile_maxima(codes.astype(np.float32), tile).astype(np.int32)
    powers = xp.where(largest == NAN_SCALE, 128, xp.maximum(largest - 6, 1) - 127)
    # Below 2^-100 every number is lost; the bound keeps the powers within float32's normal ones.
    offsets = xp.maximum(codes - 127 - expand(powers, codes.shape, tile, (0, 0)), -100)
    moved = numbers * expand(power_of_two(offsets), numbers.shape, (1, FP4_BLOCK), (0, 0))
    values = moved.astype(FP8)
    lost = _tile_maxima((values.astype(np.float32) != moved).astype(np.float32), TILE) > 0
    return values, _scale_bytes(powers), ~lost & (powers < 128)


def unpack_fp4(packed: A) -> A:
    """The e2m1 numbers of packed bytes, without their scales: [.., n / 2] -> float32 [.., n]."""
    return _unpacked(packed.view(np.uint8))


def e2m1_numbers(codes: A) -> A:
    """The numbers of four-bit codes, which come as integers: float32."""
    xp, magnitude = _module(codes), (codes & 7).astype(np.float32)
    # 0, 0.5, 1, 1.5, 2 | 3, 4 | 6
    value = xp.where(magnitude <= 4, 0.5 * magnitude, xp.where(magnitude <= 6, magnitude - 2, np.float32(FP4_MAX)))
    return xp.where(codes >= 8, -value, value)


def scales_as_float(scales: A) -> A:
    """Scales as float32 powers of two, NaN for 255; 2^-127, byte 0, is 0 on machines that flush denormals."""
    return scales.astype(np.float32)


def _quantise_fp8(x: Array, tile: tuple[int, int], known: Array | None = None) -> tuple[Array, Array]:
    x = x.astype(np.float32)
    powers = _powers(x, tile, FP8_MAX, known, lambda x: x.astype(FP8).astype(np.float32))
    return _divided(x, powers, tile).astype(FP8), _scale_bytes(powers)


def _powers(
    x: Array, tile: tuple[int, int], largest: float, known: Array | None, rounded: Callable[[Array], Array]
) -> Array:
    """For every tile the int32 p of its scale 2^p; 128 where x is not finite.

    Where dividing by a known scale and rounding changes nothing, that scale stays.
    """
    smallest = smallest_powers(x, tile, largest)
    if known is None:
        return smallest
    xp, codes = _module(x), known.view(np.uint8).astype(np.int32) - 127
    usable = (codes < 128) & ((codes >= smallest) | (smallest == -126))
    divided = _divided(x, xp.where(usable, codes, 0), tile)
    changed = _tile_maxima((rounded(divided) != divided).astype(np.float32), tile) > 0
    return xp.where(usable & ~changed, codes, smallest)


def _divided(x: Array, powers: Array, tile: tuple[int, int]) -> Array:
    return x * expand(power_of_two(-powers), x.shape, tile, (0, 0))


def smallest_powers(x: Array, tile: tuple[int, int], largest: float) -> Array:
    """For every tile the smallest int32 p with max|x| <= largest * 2^p, from -126 on; 128 where x is not finite.

    Bits, not logarithms: 1.m x 2^e <= 1.n x 2^f x 2^p asks for p = e - f, and one more when m > n.
    """
    bits = _tile_maxima(x, tile).view(np.int32)
    limit = np.float32(largest).view(np.int32)
    power = (bits >> 23) - (limit >> 23) + ((bits & 0x7FFFFF) > (limit & 0x7FFFFF)).astype(np.int32)
    xp = _module(x)
    return xp.where(bits >> 23 == 255, 128, xp.maximum(power, -126)).astype(np.int32)


def _tile_maxima(x: Array, tile: tuple[int, int]) -> Array:
    """max|x| per tile of the last two axes; a vector is one row."""
    xp = _module(x)
    rows_per, columns_per = tile if x.ndim > 1 else (1, tile[1])
    x = xp.abs(x)
    *lead, columns = x.shape
    x = xp.pad(x, [(0, 0)] * len(lead) + [(0, -columns % columns_per)]).reshape(*lead, -1, columns_per).max(-1)
    if rows_per == 1:
        return x
    *lead, rows, columns = x.shape
    x = xp.pad(x, [(0, 0)] * len(lead) + [(0, -rows % rows_per), (0, 0)])
    return x.reshape(*lead, -1, rows_per, columns).max(-2)


def _unpacked(packed: Array) -> Array:
    xp = _module(packed)
    if xp is np:  # on a host, looking up both numbers of a byte is several times faster
        return np.take(_PAIRS, packed, axis=0).reshape(*packed.shape[:-1], -1)
    return e2m1_numbers(xp.stack([packed & np.uint8(15), packed >> np.uint8(4)], -1).reshape(*packed.shape[:-1], -1))


def _packed(codes: Array) -> Array:
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def _e2m1_codes(x: Array) -> Array:
    """The four-bit code of the nearest e2m1 number, ties to the even code; |x| <= 6. uint8."""
    xp = _module(x)
    size = xp.abs(x)
    steps = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5)
    return sum(step.astype(np.uint8) for step in steps) | xp.signbit(x).astype(np.uint8) << np.uint8(3)


def _scaled(x: Array, scales: Array, tile: tuple[int, int], start: tuple[int, int], dtype: Any) -> Array:
    return (x * expand(scales_as_float(scales), x.shape, tile, start)).astype(dtype)


def expand(scales: Array, shape: tuple[int, ...], tile: tuple[int, int], start: tuple[int, int]) -> Array:
    """Scales of the tiles, one per element of `shape`, whose first element lies at `start` in the first tile."""
    scales = _repeat(scales, tile[1], -1, start[1], shape[-1])
    if tile[0] == 1 or len(shape) == 1:
        return scales
    return _repeat(scales, tile[0], -2, start[0], shape[-2])


def _repeat(scales: Array, times: int, axis: int, start: int, length: int) -> Array:
    """Elements start .. start + length of `scales` repeated along an axis; repeating is far cheaper than indexing."""
    repeated = _module(scales).repeat(scales, times, axis=axis)
    return repeated[(..., slice(start, start + length), *(slice(None),) * (-1 - axis))]


def power_of_two(power: Array) -> Array:
    """2^p as float32 for integers -126 <= p <= 127, NaN for -128: exact on every backend, as exp2 is not."""
    return _module(power).where(power == -128, np.int32(0x7FC00000), (power + 127) << 23).view(np.float32)


def _scale_bytes(powers: Array) -> Array:
    return (powers + 127).astype(np.uint8).view(SCALE)  # 128, not finite, becomes NAN_SCALE


def _module(x: Array) -> types.ModuleType:
    return np if isinstance(x, (np.ndarray, np.generic)) else jnp
