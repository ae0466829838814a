"""Entries of 512 numbers in a pool of words, as TPU kernels read them: two rows of 128 words, undone in registers.

The first row has an entry's first 128 words, the second one the rest: 128 words in BF16, in FP8 18 of 32 words, beside
those of three other entries. They are undone as four planes, matrices [n, 128] with one number of each word, where it
lies, so that few words change lanes. Queries are put into the order that results (`as_planes`), and outputs out of it.

FP8: words 0 to 31 hold the rotary numbers, two each, words 32 and 33 the scales, words 34 to 145 four numbers each. A
plane has 16 rotary numbers, then a byte of words 128 to 145, which takes the lanes up to 33, then that byte of words 34
to 127.

BF16: a plane is the low or high half of a row, and their order is that of the numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import InWords
from dsv4_jax.kernels.rows import FEW_ROWS, LANES, SUBLANES
from dsv4_jax.quantization.storage import FP8_BLOCK, Fp8WithRope, Plain, Storage

FP8, BF16 = Fp8WithRope(512, 64), Plain(512, "bfloat16")
PIECES = 2  # rows that an entry has words in
ROPE = FP8.rope // 4  # rotary numbers of a plane
BEGIN = FP8.rope // 2 + 2  # the first word of FP8 numbers, behind those of rotary numbers and scales
RUNS = ROPE, BEGIN - ROPE, LANES - BEGIN  # of a plane's lanes: rotary, of the second row, of the first
SHARE = 32  # words of an entry's part of its second row


def supports(pages: Pages) -> bool:
    """Whether a cache keeps such entries, in blocks whose rows are tiles or lie in whole tiles."""
    pool = pages.pool
    if not isinstance(pool, InWords) or pool.storage not in (FP8, BF16):
        return False
    sizes = [piece.size for piece in pool.pieces]
    fits = sizes == [LANES, SHARE if pool.storage == FP8 else LANES]
    return fits and (pool.rows >= FEW_ROWS or pages.store["words"].shape[1] % SUBLANES == 0)


def rows_of(pages: Pages) -> jax.Array:
    """All rows of the pool, uint32 [R, 1, 128]: the bytes stay where they are, and a DMA can move one row.

    Where blocks are long rows of words themselves, eight of them share a tile: the first rows of all eight come first.
    """
    words = pages.store["words"]
    if words.ndim == 3:
        words = words.reshape(-1, SUBLANES, words.shape[2] // LANES, LANES).swapaxes(1, 2)
    return words.reshape(-1, 1, LANES)


def places(pages: Pages, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the entries `index` [B, n] of each sequence are; negative ones are unused.

    Returns:
        The numbers of their two rows [2, B, n], some row for unused ones, and their place in the second row [B, n] in
        parts of an entry's size; -1 for unused ones.
    """
    pool, words = pages.pool, pages.store["words"]
    assert isinstance(pool, InWords)
    known = jnp.maximum(index, 0)
    slot = known % pool.per_block
    block = pages.layer * words.shape[1] + jnp.take_along_axis(pages.tables, known // pool.per_block, 1, mode="clip")
    in_block = [piece.row + slot * piece.size // LANES for piece in pool.pieces]
    if words.ndim == 3:
        tile, place = block // SUBLANES, block % SUBLANES
        rows = [(tile * pool.rows + row) * SUBLANES + place for row in in_block]
    else:
        rows = [block * pool.rows + row for row in in_block]
    part = slot % (LANES // pool.pieces[1].size)
    # Nothing checks the addresses of a DMA.
    rows = jnp.clip(jnp.stack(rows), 0, words.size // LANES - 1).astype(jnp.int32)
    return rows, jnp.where(index < 0, -1, part).astype(jnp.int32)


def as_planes(x: jax.Array, storage: Storage) -> jax.Array:
    """[.., 512] with the numbers in the order in which they are undone."""
    if storage == BF16:
        return x
    values = FP8.width - FP8.rope
    starts = [(values + ROPE * i, values // 4 * (i + 1) - BEGIN + ROPE, values // 4 * i) for i in range(4)]
    return _cut(x, [(start, size) for plane in starts for start, size in zip(plane, RUNS, strict=True)])


def from_planes(x: jax.Array, storage: Storage) -> jax.Array:
    """The inverse of `as_planes`."""
    if storage == BF16:
        return x
    first = [(LANES * i + start, size) for i in range(4) for start, size in ((BEGIN, RUNS[2]), (ROPE, RUNS[1]))]
    return _cut(x, first + [(LANES * i, ROPE) for i in range(4)])


def _cut(x: jax.Array, runs: list[tuple[int, int]]) -> jax.Array:
    """Runs of columns, each from a start on, behind one another."""
    return jnp.concatenate([x[..., start : start + size] for start, size in runs], axis=-1)


def keys(first: jax.Array, second: jax.Array, part: jax.Array, storage: Storage, dtype: Any) -> jax.Array:
    """Rows of words of n entries, as `numbers` takes them, as keys and values [n, 512]."""
    planes = numbers(first, second, part, storage)
    return jnp.concatenate([plane.astype(dtype) for plane in planes], axis=1)


def numbers(first: jax.Array, second: jax.Array, part: jax.Array, storage: Storage) -> list[jax.Array]:
    """Rows of words of n entries as four planes of float32 [n, 128]; zero for unused entries.

    Args:
        first: uint32 [n, 128].
        second: uint32 [n, 128].
        part: of the second row, int32 [n, 1]; -1 is unused.
        storage: FP8 or BF16.
    """
    first = jnp.where(part >= 0, first, jnp.uint32(0))  # who had the block before may have left NaN
    if storage == BF16:
        second = jnp.where(part >= 0, second, jnp.uint32(0))
        return [_low(first), _low(second), _high(first), _high(second)]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    own = jnp.where(jax.lax.div(lane, SHARE) == part, second, jnp.uint32(0))
    own |= pltpu.roll(own, LANES // 2, 1)
    own |= pltpu.roll(own, SHARE, 1)  # in each quarter of the row
    words = jnp.where(lane < BEGIN, pltpu.roll(own, ROPE, 1), first)
    scales = first[:, BEGIN - 2 : BEGIN - 1], first[:, BEGIN - 1 : BEGIN]
    others = pltpu.roll(first, LANES - ROPE, 1)
    rope = _low(first), _low(others), _high(first), _high(others)
    return [jnp.where(lane < ROPE, rope[plane], _fp8(words, scales, plane, lane)) for plane in range(4)]


def _fp8(words: jax.Array, scales: tuple[jax.Array, jax.Array], plane: int, lane: jax.Array) -> jax.Array:
    """Byte `plane` of each word, an e4m3 number, times the scale of its block.

    By integers, as not every TPU has the type. The exponent's bias is 7 there, 127 in float32; where it is zero the
    number is a denormal one, m / 8 x 2^-6, which is (1 + m / 8) x 2^-6 without 2^-6.
    """
    top = words << (24 - 8 * plane)
    size = ((top & jnp.uint32(0x7F000000)) >> 4) + jnp.uint32(120 << 23)
    denormal = _float(size + jnp.uint32(1 << 23)) - 2.0**-6
    size = jnp.where(size < jnp.uint32(121 << 23), _bits(denormal), size)
    number = plane * (FP8.width - FP8.rope) // 4 + lane + jnp.where(lane < BEGIN, LANES - BEGIN - ROPE, -BEGIN)
    return _float(size | top & jnp.uint32(1 << 31)) * _scales(scales, jax.lax.div(number, FP8_BLOCK))


def _scales(words: tuple[jax.Array, jax.Array], block: jax.Array) -> jax.Array:
    """The scales of blocks [1, 128] as float32 [n, 128]: byte b / 2 of word b % 2, [n, 1] each, is that of block b."""
    word = jnp.where(block & 1 == 0, *words)
    power = word >> ((block >> 1) * 8).astype(jnp.uint32) & jnp.uint32(255)
    return _float(jnp.where(power == 255, jnp.uint32(0x7FC00000), power << 23))


def _low(words: jax.Array) -> jax.Array:
    """The BF16 numbers in the low halves of words."""
    return _float(words << 16)


def _high(words: jax.Array) -> jax.Array:
    return _float(words & jnp.uint32(0xFFFF0000))


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
