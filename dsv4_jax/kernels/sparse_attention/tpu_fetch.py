"""Rows that queries chose, fetched on a TPU one by one, and their gradients, added up in order.

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

from dsv4_jax.kernels.chunks import join, split

LANES = 128
QUERIES = 8  # per step of the grid; the first fetch of each step is not hidden
BACKWARD_QUERIES = 64  # whose entries' gradients, [k, K] float32 each, exist at once
UNROLL = 16  # row DMAs per step of the loop that issues them
TILE = 128  # entries whose sums are computed, and row DMAs issued, in one block of instructions
VMEM_BYTES = 56 << 20  # a tpu7x core has 64 MiB, and the compiler keeps some

COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
)


def per_query(*last: int, **memory: Any) -> pl.BlockSpec:
    """QUERIES blocks of the shape `last`."""
    return pl.BlockSpec((1, QUERIES, *last), lambda b, i: (b, i, *(0 for _ in last)), **memory)


def rows_to_fetch(indices: jax.Array, entries: int, multiple: int) -> tuple[jax.Array, pl.BlockSpec]:
    """Where the rows of each query's choice begin in `words_of`, and how QUERIES queries' lie in scalar memory.

    What is fetched for an unused choice is some entry: nothing checks the addresses of a DMA.

    Args:
        indices: int32 [B, S, k], -1 is unused.
        entries: T.
        multiple: as many rows are fetched together.

    Returns:
        int32 [B, S / QUERIES, 1, QUERIES * k], S and k padded. In scalar memory they lie one behind the other, so that
        few instructions find the next one.
    """
    indices = whole_steps(indices, indices.shape[-1] + -indices.shape[-1] % multiple)
    batch, slots, count = indices.shape
    rows = jnp.clip(indices, 0, entries - 1) + entries * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    block = pl.BlockSpec((1, 1, 1, QUERIES * count), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM)
    return rows.reshape(batch, slots // QUERIES, 1, QUERIES * count), block


def each_query(use, chosen_ref, words_ref, buffer, arrived, interpreted) -> None:
    """`use(t, planes [w, k, 128])` for each query, while the entries of the next one are on their way."""
    fetched = chosen_ref.shape[-1] // QUERIES

    def fetch(t):
        part = lambda i, _: _fetch(t, i * UNROLL, UNROLL, chosen_ref, words_ref, buffer, arrived)  # noqa: E731
        jax.lax.fori_loop(0, fetched // UNROLL, part, None)

    def step(t, _):
        pl.when(t + 1 < QUERIES)(lambda: fetch(t + 1))
        _await(t, fetched, buffer, arrived)
        use(t, _planes(t, slice(None), buffer, interpreted))

    if fetched < buffer.shape[2]:  # a weight of zero times what memory happens to hold could be NaN
        rest = buffer.at[:, :, fetched:]
        rest[...] = jnp.zeros(rest.shape, jnp.uint32)
    fetch(0)
    jax.lax.fori_loop(0, QUERIES, step, None)


def each_tile(use, chosen_ref, words_ref, buffer, arrived, interpreted) -> None:
    """`use(t, i, planes [w, TILE, 128])` for each query and tile i of its entries.

    The DMAs of a tile of the next query's entries are issued between the instructions of `use`. For sums of which each
    entry has its own; a query has whole tiles.
    """
    fetched = chosen_ref.shape[-1] // QUERIES

    def fetch(t, i):
        _fetch(t, i * TILE, TILE, chosen_ref, words_ref, buffer, arrived)

    def step(t, more):
        def tile(i, _):
            planes = _planes(t, pl.ds(pl.multiple_of(i * TILE, TILE), TILE), buffer, interpreted)
            if more:  # in one block with the instructions of `use`: a branch would part them
                fetch(t + 1, i)
            use(t, i, planes)

        _await(t, fetched, buffer, arrived)
        jax.lax.fori_loop(0, fetched // TILE, tile, None)

    jax.lax.fori_loop(0, fetched // TILE, lambda i, _: fetch(0, i), None)
    jax.lax.fori_loop(0, QUERIES - 1, lambda t, _: step(t, True), None)
    step(QUERIES - 1, False)


def _fetch(t, first, count, chosen_ref, words_ref, buffer, arrived) -> None:
    """Starts the DMAs of `count` rows that query t chose, from its place `first` on."""
    at = t * (chosen_ref.shape[-1] // QUERIES) + first
    entries = [chosen_ref[0, 0, 0, at + j] for j in range(count)]  # all before the first DMA, which loads cannot pass
    for j, entry in enumerate(entries):
        pltpu.make_async_copy(words_ref.at[entry], buffer.at[t % 2, :, first + j], arrived.at[t % 2]).start()


def _await(t, fetched, buffer, arrived) -> None:
    """Waits for the rows of query t. A semaphore counts bytes: one wait for as many as all rows have."""
    rows = buffer.at[t % 2, :, :fetched]
    pltpu.make_async_copy(rows, rows, arrived.at[t % 2]).wait()


def _planes(t, at, buffer, interpreted):
    """Planes [w, n, 128] of query t: the same memory seen as dense matrices. The interpreter has no such views."""
    shape = buffer.shape[1:3]
    if interpreted:
        return buffer[t % 2, :, at].reshape(shape[0], -1, LANES)
    return buffer.reshape(2, *shape, LANES)[t % 2, :, at]


def leave(t, rows, buffer, rows_ref, left) -> None:
    """The gradients [k, K] of the rows that query t chose leave by DMA, while the next query computes."""
    pl.when(t >= 2)(_leaving(t - 2, buffer, rows_ref, left).wait)
    buffer[t % 2] = rows
    _leaving(t, buffer, rows_ref, left).start()


def await_left(buffer, rows_ref, left) -> None:
    """Waits for the last rows that were given to `leave`."""
    for t in (QUERIES - 2, QUERIES - 1):
        _leaving(t, buffer, rows_ref, left).wait()


def _leaving(t, buffer, rows_ref, left):
    row, first = pl.program_id(0), pl.program_id(1) * QUERIES
    return pltpu.make_async_copy(buffer.at[t % 2], rows_ref.at[row, first + t], left.at[t % 2])


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
        pltpu.VMEM((2, words.shape[1], choices, 1, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def rows_of(width: int, dtype: Any) -> int:
    """Rows of 128 words for `width` numbers."""
    return -(-width * jnp.dtype(dtype).itemsize // (LANES * 4))


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


def in_order(part, operands, indices, entries):
    """Few queries at a time: what `part` gives for them, and the gradient of `entries`, added up in their order.

    Args:
        part: of indices and operands, BACKWARD_QUERIES of each row, to a tree of arrays [B, BACKWARD_QUERIES, ...] and
            the gradients of the entries that each query chose, [B, BACKWARD_QUERIES, k, K] float32.
        operands: arrays [B, S, ...].
        indices: int32 [B, S, k], -1 is unused.
        entries: [B, T, K].

    Returns:
        The tree, of arrays [B, S, ...], and a gradient [B, T, K] in the entries' dtype.
    """

    def one(total, args):
        indices, operands = args
        found, rows = part(indices, *operands)
        add = jax.vmap(lambda total, index, rows: total.at[index].add(rows, mode="drop"))
        return add(total, jnp.where(indices >= 0, indices, entries.shape[1]), rows), found

    parts = split(indices, BACKWARD_QUERIES, fill=-1), split(operands, BACKWARD_QUERIES)
    total, found = jax.lax.scan(one, jnp.zeros(entries.shape, jnp.float32), parts)
    return join(found, indices.shape[1]), total.astype(entries.dtype)
