"""Attention over chosen entries of a cache on a TPU: their rows fetched by DMA as they are stored, undone in VMEM.

For decoding, where a query or a few per sequence read entries that no other query shares. The queries of all sequences
form one line, and so do their entries, in tiles: while a tile is undone and attended, the rows of the next one are on
their way, of the same query or of the next. Their numbers lie in scalar memory. Of entries only what the cache holds
is read, and nothing of them is written.

All heads share a tile, and each query's softmax goes on from tile to tile in order: equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention import tpu_softmax, tpu_words
from dsv4_jax.kernels.sparse_attention.tpu_words import PIECES
from dsv4_jax.kernels.sparse_attention.xla import Branch

LANES = 128
TILE = 256  # entries
FEW_QUERIES = 8  # of a sequence; XLA serves the chunks of prompts
UNROLL = 64  # entries whose row DMAs a step of a loop issues: their rows' numbers are 128 words of scalar memory
CORES = 2  # of a v5p chip, which share the grid's first axis; others go through it in order

_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True)


def supports_pages(q: jax.Array, pages: Pages) -> bool:
    """Whether the kernel takes these operands: few queries a sequence, entries that `tpu_words` can read."""
    few = q.shape[1] <= FEW_QUERIES and q.dtype in (jnp.bfloat16, jnp.float32)
    return few and tpu_words.supports(pages)


def forward_pages(q: jax.Array, pages: Pages, indices: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """Query t of q [B, S, H, 512] attends the entries `indices[t]` of its sequence; [B, S, k], -1 is unused.

    Args:
        q: queries, of a dtype that `supports_pages` takes, in which the products are taken.
        pages: entries, shared by the heads.
        indices: int32.
        scale: factor of the scores.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        Output [B, S, H, 512] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query chose nothing.
    """
    batch, length, heads, width = q.shape
    queries, tiles = batch * length, -(-indices.shape[-1] // TILE)
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, tiles * TILE - indices.shape[-1])), constant_values=-1)
    rows, part = tpu_words.places(pages, indices.reshape(batch, -1))
    rows = jnp.moveaxis(rows.reshape(PIECES, queries * tiles, TILE // UNROLL, UNROLL), 0, 2)
    rows = rows.reshape(queries * tiles, TILE // UNROLL, PIECES * UNROLL)
    part = part.reshape(queries * tiles, 1, TILE)
    used = ((part >= 0) * (jnp.arange(TILE, dtype=jnp.int32) // UNROLL + 1)).max((1, 2))
    out, lse = pl.pallas_call(
        functools.partial(_attend, tiles=tiles, storage=pages.storage, scale=scale, interpreted=bool(interpret)),
        grid_spec=_grid(queries, tiles, heads, width, q.dtype),
        out_shape=[
            jax.ShapeDtypeStruct((queries, heads, width), q.dtype),
            jax.ShapeDtypeStruct((queries, 1, heads), jnp.float32),
        ],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="gather_attention_pages",
    )(used, rows, rows, part, q.reshape(queries, heads, width), tpu_words.rows_of(pages))
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _grid(queries: int, tiles: int, heads: int, width: int, dtype: Any) -> pltpu.PrefetchScalarGridSpec:
    """A step per tile; the numbers of its rows and of the next tile's are in scalar memory."""
    cores = CORES if queries % CORES == 0 else 1
    steps = queries // cores * tiles
    here = lambda c, t: c * steps + t  # noqa: E731

    def rows(ahead: int) -> pl.BlockSpec:
        block = 1, TILE // UNROLL, PIECES * UNROLL
        at = lambda c, t, _: (jnp.minimum(here(c, t) + ahead, queries * tiles - 1), 0, 0)  # noqa: E731
        return pl.BlockSpec(block, at, memory_space=pltpu.SMEM)

    def of_query(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block), lambda c, t, _: (jax.lax.div(here(c, t), tiles), 0, 0))

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cores, steps),
        in_specs=[
            rows(0),
            rows(1),
            pl.BlockSpec((1, 1, TILE), lambda c, t, _: (here(c, t), 0, 0)),
            of_query(heads, width),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[of_query(heads, width), of_query(1, heads)],
        scratch_shapes=[
            pltpu.VMEM((2, PIECES, TILE, 1, LANES), jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
            *softmax_of(heads, width, dtype),
        ],
    )


def _attend(used_ref, rows_ref, next_ref, part_ref, q_ref, words_ref, out_ref, lse_ref, buffer, arrived,
            *softmax, tiles, storage, scale, interpreted):  # fmt: skip
    """One tile of one query's entries."""
    step, steps = pl.program_id(1), pl.num_programs(1)
    tile, slot = pl.program_id(0) * steps + step, step % 2
    used = used_ref[tile]

    @pl.when(step == 0)
    def _():
        _fetch(words_ref, rows_ref, used, buffer.at[0], arrived.at[0])

    @pl.when(step + 1 < steps)
    def _():
        _fetch(words_ref, next_ref, used_ref[tile + 1], buffer.at[1 - slot], arrived.at[1 - slot])

    pl.when(step % tiles == 0)(lambda: begin(q_ref, storage, softmax))

    @pl.when(used > 0)
    def _():
        _wait(used, buffer.at[slot], arrived.at[slot])
        part, rows = part_ref[0], _rows(buffer, slot, interpreted)
        keys = tpu_words.keys(rows[0], rows[1], part.reshape(-1, 1), storage, q_ref.dtype)
        add(keys, part >= 0, scale, softmax)

    pl.when(step % tiles == tiles - 1)(lambda: finish(storage, softmax, out_ref, lse_ref))


def _fetch(words_ref, rows_ref, used, buffer, arrived) -> None:
    """The rows of a tile's entries on their way into `buffer` [2, tile, 1, 128], `used` loop steps of them."""

    def some(i, _):
        for piece in range(PIECES):
            for j in range(UNROLL):
                row = words_ref.at[rows_ref[0, i, piece * UNROLL + j]]
                pltpu.make_async_copy(row, buffer.at[piece, i * UNROLL + j], arrived).start()
        return _

    jax.lax.fori_loop(0, used, some, 0)


def _wait(used, buffer, arrived) -> None:
    """For what `_fetch` was asked for. A semaphore counts bytes: one wait for as many as a loop step's rows have."""
    rows = buffer.at[:, :UNROLL]

    def some(_, __):
        pltpu.make_async_copy(rows, rows, arrived).wait()
        return __

    jax.lax.fori_loop(0, used, some, 0)


def _rows(buffer, slot, interpreted):
    """A slot's rows [2, tile, 128]: the same memory seen as dense matrices. The interpreter has no such views."""
    shape = PIECES, buffer.shape[2], LANES
    return buffer[slot].reshape(shape) if interpreted else buffer.reshape(2, *shape)[slot]


def begin(q_ref, storage, softmax) -> None:
    """Nothing seen yet by the queries [1, H, K]."""
    planes_ref, *sums = softmax
    planes_ref[...] = tpu_words.as_planes(q_ref[0].astype(jnp.float32), storage).astype(planes_ref.dtype)
    tpu_softmax.begin(sums)


def add(keys, seen, scale, softmax) -> None:
    """Keys [n, K], of which the queries see `seen` [H or 1, n]."""
    planes_ref, *sums = softmax
    q = planes_ref[...]
    scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    tpu_softmax.add(jnp.where(seen, scores * scale, tpu_softmax.NEVER), keys, sums)


def finish(storage, softmax, out_ref, lse_ref) -> None:
    """Outputs [1, H, K] and log-sum-exp [1, 1, H]."""
    out, lse = tpu_softmax.result(softmax[1:])
    out_ref[0] = tpu_words.from_planes(out, storage).astype(out_ref.dtype)
    lse_ref[0] = lse.reshape(1, -1)


def softmax_of(heads: int, width: int, dtype: Any) -> list[Any]:
    """Memory of a softmax in progress, behind the queries in planes [H, K]."""
    return [pltpu.VMEM((heads, width), dtype), *tpu_softmax.memory(heads, width)]
