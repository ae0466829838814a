"""Rows that queries chose, fetched on a TPU one by one.

The rows of a query's choice arrive by DMA while another query computes. Their numbers lie in scalar memory, from where
each row's DMA is issued, and two buffers alternate between arriving and being used.

A DMA moves whole tiles, and in an array [T, K] a row is no tile. The entries are therefore laid out as [T, w, 1, 128]
with 32 bits to a word, w rows of 128 words each, and arrive as planes [w, k, 1, 128]. Rows that are tiles lie one
behind the other, so each plane is at once the dense matrix [k, 128]. Two BF16 numbers share a word, those of places i
and i + K / 2, which the kernel takes apart by a shift and a mask; no number moves between lanes or sublanes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
QUERIES = 8  # per step of the grid; the first fetch of each step is not hidden
UNROLL = 16  # row DMAs whose numbers are loaded together
TILE = 256  # entries that are computed with, while about as many row DMAs are issued, in one block of instructions
VMEM_BYTES = 56 << 20  # a tpu7x core has 64 MiB, and the compiler keeps some

COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
)

IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def per_query(*last: int, **memory: Any) -> pl.BlockSpec:
    """QUERIES blocks of the shape `last`."""
    return pl.BlockSpec((1, QUERIES, *last), lambda b, i: (b, i, *(0 for _ in last)), **memory)


def per_tile(tiles: int) -> pl.BlockSpec:
    """QUERIES queries' numbers of a tile, of all tiles: blocks of what `in_tiles` gives."""
    return pl.BlockSpec((1, tiles, QUERIES, TILE), lambda b, i: (b, 0, i, 0))


def tiles_of(choices: int) -> int:
    """Tiles that a query's choices take."""
    return -(-choices // TILE)


def in_tiles(x: jax.Array, fill: int = 0) -> jax.Array:
    """Numbers of choices [B, S, k] as [B, tiles, S, TILE], `fill` in what is no choice."""
    x = whole_steps(x, tiles_of(x.shape[-1]) * TILE, fill)
    return x.reshape(*x.shape[:2], -1, TILE).swapaxes(1, 2)


def rows_to_fetch(indices: jax.Array, entries: int, together: int = 1) -> tuple[jax.Array, pl.BlockSpec]:
    """Where the rows of each query's choice begin in `words_of`, and how QUERIES queries' lie in scalar memory.

    What is fetched for an unused choice is the last entry: nothing checks the addresses of a DMA.

    Args:
        indices: int32 [B, S, k], -1 is unused.
        entries: T.
        together: so many rows of `indices`, one after another, choose from the same entries.

    Returns:
        int32 [B, S / QUERIES, 1, QUERIES * k], S and k padded. In scalar memory they lie one behind the other, so that
        few instructions find the next one.
    """
    count, whole = indices.shape[-1], tiles_of(indices.shape[-1]) * UNROLL
    indices = whole_steps(indices, count + -count % whole, fill=-1)
    batch, slots, count = indices.shape
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None] // together
    rows = jnp.where(indices < 0, entries - 1, jnp.minimum(indices, entries - 1)) + entries * sequence
    block = pl.BlockSpec((1, 1, 1, QUERIES * count), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM)
    return rows.reshape(batch, slots // QUERIES, 1, QUERIES * count), block


def each_tile(
    use, chosen_ref, words_ref, buffers, arrived, interpreted, before=lambda t: None, behind=lambda t: None
) -> None:
    """`use(t, i, planes [w, TILE, 128])` for each query and tile i of its entries, while those of the next one arrive.

    DMAs are issued between the instructions of `use`. The buffers are arrays of their own, so that the compiler knows
    that DMAs into one do not touch the other. `before(t)` comes before the tiles of a query, `behind(t)` behind them.
    """
    tiles = buffers[0].shape[1] // TILE
    fetched = chosen_ref.shape[-1] // QUERIES
    share = fetched // tiles

    def fetch(t, slot, i):
        _fetch(t, i * share, share, chosen_ref, words_ref, buffers[slot], arrived.at[slot])

    def step(t, slot, more):
        def tile(i, _):
            planes = _planes(buffers[slot], i * TILE, interpreted)
            if more:  # in one block with the instructions of `use`: a branch would part them
                fetch(t + 1, 1 - slot, i)
            use(t, i, planes)

        before(t)
        _await(fetched, buffers[slot], arrived.at[slot])
        jax.lax.fori_loop(0, tiles, tile, None)
        behind(t)

    def pair(n, _):
        step(2 * n, 0, True)
        step(2 * n + 1, 1, True)

    if fetched < tiles * TILE:  # a weight of zero times what memory happens to hold could be NaN
        for buffer in buffers:
            rest = buffer.at[:, fetched:]
            rest[...] = jnp.zeros(rest.shape, jnp.uint32)
    jax.lax.fori_loop(0, tiles, lambda i, _: fetch(0, 0, i), None)
    jax.lax.fori_loop(0, QUERIES // 2 - 1, pair, None)
    step(QUERIES - 2, 0, True)
    step(QUERIES - 1, 1, False)


def _fetch(t, first, count, chosen_ref, words_ref, buffer, arrived) -> None:
    """Starts the DMAs of `count` rows that query t chose, from its place `first` on."""
    at = t * (chosen_ref.shape[-1] // QUERIES) + first
    for some in range(0, count, UNROLL):
        entries = [chosen_ref[0, 0, 0, at + some + j] for j in range(UNROLL)]  # before a DMA, which loads cannot pass
        for j, entry in enumerate(entries):
            pltpu.make_async_copy(words_ref.at[entry], buffer.at[:, first + some + j], arrived).start()


def _await(fetched, buffer, arrived) -> None:
    """Waits for the rows of a query. A semaphore counts bytes: one wait for as many as all rows have."""
    rows = buffer.at[:, :fetched]
    pltpu.make_async_copy(rows, rows, arrived).wait()


def _planes(buffer, first, interpreted):
    """Planes [w, TILE, 128]: the same memory seen as dense matrices. The interpreter has no such views."""
    planes, at = buffer.shape[:2], pl.ds(pl.multiple_of(first, TILE), TILE)
    if interpreted:
        return buffer[:, at].reshape(planes[0], TILE, LANES)
    return buffer.reshape(*planes, LANES)[:, at]


def column(ref, t):
    """Numbers [1, H] of query t as a column [H, 1]."""
    return ref[0, pl.ds(t, 1)].reshape(-1, 1)


def numbers(planes, dtype, width):
    """Words [w, k, 128] of entries as their first `width` numbers, whole lanes: [k, width]."""
    parts = [planes[i] for i in range(planes.shape[0])]
    if dtype == jnp.float32:
        return jnp.concatenate([pltpu.bitcast(part, jnp.float32) for part in parts[: width // LANES]], axis=1)
    low = [pltpu.bitcast(part << 16, jnp.float32).astype(dtype) for part in parts]
    high = [pltpu.bitcast(part & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype) for part in parts]
    return jnp.concatenate((low + high)[: width // LANES], axis=1)


def buffers(choices: int, words: jax.Array) -> list[Any]:
    """Two buffers for the rows that one query chose, and a semaphore for each."""
    return [
        *[pltpu.VMEM((words.shape[1], tiles_of(choices) * TILE, 1, LANES), jnp.uint32)] * 2,
        pltpu.SemaphoreType.DMA((2,)),
    ]


def rows_of(width: int, dtype: Any) -> int:
    """Rows of 128 words for `width` numbers."""
    return -(-width * jnp.dtype(dtype).itemsize // (LANES * 4))


def width_of_words(x: jax.Array) -> int:
    """Numbers of x's dtype that the words of an entry have room for, if it has as many as the last axis of x."""
    return rows_of(x.shape[-1], x.dtype) * LANES * 4 // x.dtype.itemsize


def words_of(*arrays: jax.Array) -> jax.Array:
    """Arrays [B, T, K], each with its own K -> uint32 [B * T, w, 1, 128]; zeros behind the numbers of each array.

    Row by row: a row of all entries, [T, 128], lies in memory as [T, 1, 128] does, and XLA need not copy it.
    """
    rows = [row.reshape(-1, 1, 1, LANES) for x in arrays for row in _rows(x)]
    return jnp.concatenate(rows, axis=1)


def _rows(x: jax.Array) -> list[jax.Array]:
    """[B, T, K] -> w arrays uint32 [B, T, 128]."""
    count = rows_of(x.shape[-1], x.dtype)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * LANES * 4 // x.dtype.itemsize - x.shape[-1])))
    parts = jnp.split(x, x.shape[-1] // LANES, axis=-1)
    if x.dtype == jnp.float32:
        return [jax.lax.bitcast_convert_type(part, jnp.uint32) for part in parts]
    wide = [jax.lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32) for part in parts]
    return [low | high << 16 for low, high in zip(wide[:count], wide[count:], strict=True)]


def whole_lanes(count: int) -> int:
    """As many, up to whole rows of 128."""
    return -(-count // LANES) * LANES


def whole_steps(x: jax.Array, width: int | None = None, fill: int = 0) -> jax.Array:
    """`fill` behind the queries x [B, S, ...], up to whole steps of the grid, and up to `width` numbers each."""
    wide = 0 if width is None else width - x.shape[-1]
    pad = (0, 0), (0, -x.shape[1] % QUERIES), *((0, 0),) * (x.ndim - 3), (0, wide)
    return jnp.pad(x, pad, constant_values=fill)
