"""Top-k on a TPU: a few queries' scores of all entries lie in VMEM, where the best are found by counting.

A step of the grid takes QUERIES queries. Tiles of keys arrive by DMA, two buffers in turns, and each tile's scores go
to VMEM as integers of the same order: 8 MiB for 8 queries over 262,144 entries. The k-th largest is then found by
bisection: each pass counts the entries that reach a number, for all queries at once, and at most 32 passes part any two
floats. Where several entries have exactly the k-th largest score, a second bisection, over positions, finds up to where
they are taken. Nothing is sorted.

Their positions are collected by products with ones and zeros, since nothing can be scattered: in a group of 128 x 128
entries prefix sums say which row of 128 holds the j-th chosen one, a product fetches that row, and prefix sums along it
say which of its places. All numbers in these products are at most 128, which BF16 holds exactly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.indexer_topk.operands import EXACT, IndexOperands, Search
from dsv4_jax.kernels.indexer_topk.tpu_best import (
    LANES,
    OWN,
    QUERIES,
    UNSEEN,
    chunks,
    collect_chosen,
    forget,
    limits,
    ordered,
    reaching,
)

TILE = 1024  # keys per DMA
GROUP = LANES * LANES  # entries whose chosen ones are collected together
HEADS = 16  # heads are padded to whole tiles of BF16
VMEM_BYTES = 48 << 20
MOST_ENTRIES = 1 << 19  # whose scores VMEM has room for


def supports(operands: IndexOperands) -> bool:
    """Whether the kernel takes these operands: queries and keys both in BF16 or float32, not too many keys."""
    dtype = operands.queries.dtype
    known = dtype == operands.keys.dtype and dtype in (jnp.bfloat16, jnp.float32)
    return known and operands.keys.shape[1] <= MOST_ENTRIES


def index_topk(
    operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int, search: Search = EXACT, interpret: Any = False
) -> jax.Array:
    """The k best entries lo <= i < hi of each query, ties to the earlier one; see `xla.index_topk`.

    Args:
        operands: of dtypes that `supports` takes.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.
        search: exact also where it need not be: looking for the best costs little beside their scores.
        interpret: False on a TPU; True or `pltpu.InterpretParams()` elsewhere.

    Returns:
        int32 [B, S, min(k, T)], in the order of their positions, then -1 where fewer are visible.
    """
    (batch, length), entries = lo.shape, operands.keys.shape[1]
    k = min(k, entries)
    queries, keys, weights = padded(operands)
    bounds = _bounds(lo, jnp.minimum(hi, entries))
    *_, heads, width = queries.shape
    steps, pieces, held = queries.shape[1] // QUERIES, -(-k // LANES), -(-entries // GROUP) * LANES
    rows = lambda *last: pl.BlockSpec((1, QUERIES, *last), lambda b, i: (b, i, *(0 for _ in last)))  # noqa: E731
    chosen = pl.pallas_call(
        functools.partial(_choose, k=k, bf16=search.bf16),
        grid=(batch, steps),
        in_specs=[
            pl.BlockSpec((1, 1, 2, QUERIES), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM),
            rows(heads, width),
            rows(heads),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((1, 1, pieces, QUERIES, LANES), lambda b, i: (b, i, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, steps, pieces, QUERIES, LANES), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((2, TILE, width), keys.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((QUERIES * heads, LANES), jnp.float32),
            pltpu.VMEM((held * QUERIES, LANES), jnp.int32),
            pltpu.VMEM((2, QUERIES, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="index_topk",
    )(bounds, queries, weights, keys)
    return chosen.swapaxes(2, 3).reshape(batch, steps * QUERIES, -1)[:, :length, :k]


def _choose(
    bounds_ref, q_ref, weights_ref, keys_ref, out_ref, tiles, arrived, heads_ref, scores_ref, limits_ref, *, k, bf16
):
    """QUERIES queries of one row."""
    lo, hi = ([bounds_ref[0, 0, i, t] for t in range(QUERIES)] for i in (0, 1))
    first, last = functools.reduce(jnp.minimum, lo), functools.reduce(jnp.maximum, hi)
    groups = jax.lax.div(first, GROUP), reaching(last, GROUP)
    out_ref[...] = jnp.full(out_ref.shape, -1, jnp.int32)
    blocks = forget(*groups, scores_ref)
    tiles_of = jax.lax.div(first, TILE), reaching(last, TILE)
    seen = lambda index: (index >= _column(lo)) & (index < _column(hi))  # noqa: E731
    _score(*tiles_of, seen, q_ref, weights_ref, keys_ref, tiles, arrived, heads_ref, scores_ref, bf16)
    limits_ref[0], limits_ref[1] = limits(scores_ref, *blocks, k, OWN)
    collect = functools.partial(collect_chosen, scores_ref=scores_ref, limits_ref=limits_ref, out_ref=out_ref, lies=OWN)
    jax.lax.fori_loop(0, QUERIES, lambda t, _: collect(t, 0, *groups), 0)


def _score(start, stop, seen, q_ref, weights_ref, keys_ref, tiles, arrived, heads_ref, scores_ref, bf16) -> None:
    """Ordered scores of the key tiles start <= i < stop."""
    queries, heads, width = q_ref.shape[1:]
    for t in range(queries):  # a weight for every number of a row of products
        column = weights_ref[0, pl.ds(t, 1)].reshape(heads, 1)
        heads_ref[pl.ds(t * heads, heads)] = jnp.broadcast_to(column, (heads, LANES))

    def score(i, products):
        for c in range(TILE // LANES):
            part = jnp.maximum(products[:, c * LANES : (c + 1) * LANES], 0.0) * heads_ref[...]
            scores = part.reshape(queries, heads, LANES).sum(1)
            index = i * TILE + c * LANES + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            known = jnp.where(seen(index), ordered(scores, bf16), UNSEEN)
            scores_ref[chunks(i * (TILE // LANES) + c)] = known

    each_tile(score, start, stop, q_ref[0].reshape(queries * heads, width), keys_ref, tiles, arrived)


def each_tile(use, start, stop, q, keys_ref, tiles, arrived) -> None:
    """`use(i, products [n, TILE])` of q [n, di] and the key tiles start <= i < stop, with the next tile on its way."""
    row, precision = pl.program_id(0), jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def fetch(i):
        source = keys_ref.at[row, pl.ds(i * TILE, TILE)]
        return pltpu.make_async_copy(source, tiles.at[i % 2], arrived.at[i % 2])

    def one(i, _):
        pl.when(i + 1 < stop)(lambda: fetch(i + 1).start())
        fetch(i).wait()
        over_width = (((1,), (1,)), ((), ()))
        use(i, jax.lax.dot_general(q, tiles[i % 2], over_width, precision, jnp.float32))
        return _

    pl.when(start < stop)(lambda: fetch(start).start())
    jax.lax.fori_loop(start, stop, one, 0)


def _column(numbers):
    """QUERIES scalars as [QUERIES, 128], a row each."""
    query = jax.lax.broadcasted_iota(jnp.int32, (QUERIES, LANES), 0)
    column = jnp.zeros((QUERIES, LANES), jnp.int32)
    for t, number in enumerate(numbers):
        column = jnp.where(query == t, number, column)
    return column


def _bounds(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """[B, S] each -> [B, steps, 2, QUERIES]; queries that are padding see nothing new: they repeat the last."""
    both = jnp.pad(jnp.stack([lo, hi], -1), ((0, 0), (0, -lo.shape[1] % QUERIES), (0, 0)), mode="edge")
    return both.astype(jnp.int32).reshape(lo.shape[0], -1, QUERIES, 2).swapaxes(2, 3)


def padded(operands: IndexOperands, step: int = QUERIES) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries to whole steps, heads and widths to whole tiles, keys to whole tiles of them; zeros add nothing."""
    queries, keys, weights = operands
    _, length, heads, width = queries.shape
    more, wide, above = -length % step, -width % LANES, -heads % HEADS
    queries = jnp.pad(queries, ((0, 0), (0, more), (0, above), (0, wide)))
    keys = jnp.pad(keys, ((0, 0), (0, -keys.shape[1] % TILE), (0, wide)))
    return queries, keys, jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, more), (0, above)))
