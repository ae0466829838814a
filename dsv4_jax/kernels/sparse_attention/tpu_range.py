"""Attention over a range of entries per query on a TPU: a window of tokens, or all visible compressed entries.

A window is a range like any other, so one flash-style kernel serves both. A step of the grid has the heads of Q
queries as rows and a tile of entries as columns; tiles that none of these queries sees are skipped, and what is seen of
a tile is decided by the queries' own bounds. Nothing of the size queries x entries leaves the chip.

The backward pass computes the weights again from the saved log-sum-exp, once per tile of queries for their gradients
and once per tile of entries for theirs. Each is summed by one step after another: equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.sparse_attention import bands, tpu_softmax
from dsv4_jax.kernels.sparse_attention.bands import Band, tiles_seen, tiles_seen_by
from dsv4_jax.kernels.sparse_attention.tpu_softmax import NEVER
from dsv4_jax.kernels.sparse_attention.xla import Branch

LANES = 128
SUBLANES = 8
VMEM_BYTES = 56 << 20  # a tpu7x core has 64 MiB, and the compiler keeps some
SCALARS = 1 << 16  # tiles of queries whose first and last tile fit into scalar memory


def supports(q: jax.Array, entries: jax.Array) -> bool:
    """Whether the kernels take these operands: both in BF16 or float32, and rows that scalar memory has room for."""
    fits = q.shape[0] * -(-q.shape[1] // bands.QUERIES) <= SCALARS
    return fits and q.dtype == entries.dtype and q.dtype in (jnp.bfloat16, jnp.float32)


def forward(
    q: jax.Array, entries: jax.Array, bounds: jax.Array, scale: float, band: Band, interpret: Any = False
) -> Branch:
    """Query t of q [B, S, H, K] attends the entries lo_t <= i < hi_t of [B, T, K]; bounds [B, S, 2] are lo, hi.

    Args:
        q: queries, of a dtype that `supports` takes.
        entries: shared by the heads.
        bounds: int32; lo == hi where a query sees nothing.
        scale: factor of the scores.
        band: how far the ranges reach.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        Output [B, S, H, K] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query sees nothing.
    """
    length, heads, width = q.shape[1:]
    q, entries, bounds = _padded(q, entries, bounds, band.tile)
    batch, slots, rows, k_width = q.shape
    tiles = entries.shape[1] // band.tile
    first, count = tiles_seen(bounds, band.tile)
    out, lse = pl.pallas_call(
        functools.partial(_attend, scale=scale, tile=band.tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, slots // bands.QUERIES, band.steps(tiles)),
            in_specs=[_bounds_of(), _queries(rows, k_width), _entries_seen(band.tile, k_width)],
            out_specs=[_queries(rows, k_width), _queries(rows)],
            scratch_shapes=tpu_softmax.memory(bands.QUERIES * rows, k_width),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, slots, rows), jnp.float32),
        ],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="range_attention",
    )(first, count, bounds.reshape(batch, -1, 1, 2 * bands.QUERIES), q, entries)
    return out[:, :length, :heads, :width], lse[:, :length, :heads]


def _attend(first_ref, count_ref, bounds_ref, q_ref, entries_ref, out_ref, lse_ref, *softmax, scale, tile):
    """One tile of entries for one tile of queries: the running maximum, total and weighted sum of each row."""
    b, i, j = (pl.program_id(axis) for axis in range(3))

    pl.when(j == 0)(lambda: tpu_softmax.begin(softmax))

    @pl.when(j < count_ref[b, i])
    def _():
        keys = entries_ref[0]
        scores = _scores(_rows(q_ref), keys, bounds_ref, (first_ref[b, i] + j) * tile, scale)
        tpu_softmax.add(scores, keys, softmax)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out, lse = tpu_softmax.result(softmax)
        out_ref[0] = out.astype(out_ref.dtype).reshape(out_ref.shape[1:])
        heads = lse_ref.shape[-1]
        for t in range(bands.QUERIES):
            lse_ref[0, t : t + 1] = lse[t * heads : (t + 1) * heads].reshape(1, -1)


def backward(
    q: jax.Array,
    entries: jax.Array,
    bounds: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    scale: float,
    band: Band,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and entries, in their dtypes, from what `forward` was given and returned."""
    length, heads, width = q.shape[1:]
    count = entries.shape[1]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    d_out, *_ = _padded(d_out.astype(q.dtype), entries, bounds, band.tile)
    q, entries, bounds = _padded(q, entries, bounds, band.tile)
    facts = [jnp.pad(x, ((0, 0), (0, q.shape[1] - length), (0, q.shape[2] - heads))) for x in (delta, lse)]
    operands = bounds.reshape(q.shape[0], -1, 1, 2 * bands.QUERIES), q, d_out, *facts, entries
    dq = _query_gradients(operands, tiles_seen(bounds, band.tile), scale, band, interpret)
    seen_by = tiles_seen_by(bounds, band.tile, entries.shape[1] // band.tile)
    d_entries = _entry_gradients(operands, seen_by, scale, band, interpret)
    return dq[:, :length, :heads, :width], d_entries[:, :count, :width]


def _query_gradients(operands, seen, scale, band, interpret):
    q, entries = operands[1], operands[-1]
    batch, slots, rows, width = q.shape
    of_queries = [_bounds_of(), _queries(rows, width), _queries(rows, width), _queries(rows), _queries(rows)]
    return pl.pallas_call(
        functools.partial(_differentiate_queries, scale=scale, tile=band.tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, slots // bands.QUERIES, band.steps(entries.shape[1] // band.tile)),
            in_specs=[*of_queries, _entries_seen(band.tile, width)],
            out_specs=_queries(rows, width),
            scratch_shapes=[pltpu.VMEM((bands.QUERIES * rows, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="range_attention_d_queries",
    )(*seen, *operands)


def _differentiate_queries(first_ref, count_ref, bounds_ref, q_ref, d_out_ref, delta_ref, lse_ref, entries_ref, dq_ref,
                           sum_ref, *, scale, tile):  # fmt: skip
    b, i, j = (pl.program_id(axis) for axis in range(3))

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j < count_ref[b, i])
    def _():
        refs = bounds_ref, q_ref, d_out_ref, delta_ref, lse_ref
        _, d_scores = _weights_and_d_scores(*refs, entries_ref[0], (first_ref[b, i] + j) * tile, scale)
        sum_ref[...] += _dot(d_scores, entries_ref[0], 1, 0)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        dq_ref[0] = sum_ref[...].astype(dq_ref.dtype).reshape(dq_ref.shape[1:])


def _entry_gradients(operands, seen_by, scale, band, interpret):
    q, entries = operands[1], operands[-1]
    batch, slots, rows, width = q.shape
    queries, tiles = slots // bands.QUERIES, entries.shape[1] // band.tile
    at = lambda b, n, j, first, _: (b, jnp.minimum(first[b, n] + j, queries - 1))  # noqa: E731
    of_queries = lambda *last: pl.BlockSpec((1, bands.QUERIES, *last), lambda *g: (*at(*g), *(0 for _ in last)))  # noqa: E731
    bounds = pl.BlockSpec((1, 1, 1, 2 * bands.QUERIES), lambda *g: (*at(*g), 0, 0), memory_space=pltpu.SMEM)
    tile = pl.BlockSpec((1, band.tile, width), lambda b, n, *_: (b, n, 0))
    return pl.pallas_call(
        functools.partial(_differentiate_entries, scale=scale, tile=band.tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, tiles, band.visits(queries)),
            in_specs=[bounds, *map(lambda last: of_queries(*last), [(rows, width)] * 2 + [(rows,)] * 2), tile],
            out_specs=tile,
            scratch_shapes=[pltpu.VMEM((band.tile, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(entries.shape, entries.dtype),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="range_attention_d_entries",
    )(*seen_by, *operands)


def _differentiate_entries(first_ref, count_ref, bounds_ref, q_ref, d_out_ref, delta_ref, lse_ref, entries_ref,
                           d_entries_ref, sum_ref, *, scale, tile):  # fmt: skip
    b, n, j = (pl.program_id(axis) for axis in range(3))

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j < count_ref[b, n])
    def _():
        refs = bounds_ref, q_ref, d_out_ref, delta_ref, lse_ref
        weights, d_scores = _weights_and_d_scores(*refs, entries_ref[0], n * tile, scale)
        sum_ref[...] += _dot(d_scores, _rows(q_ref), 0, 0) + _dot(weights, _rows(d_out_ref), 0, 0)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        d_entries_ref[0] = sum_ref[...].astype(d_entries_ref.dtype)


def _weights_and_d_scores(bounds_ref, q_ref, d_out_ref, delta_ref, lse_ref, keys, base, scale):
    """Both [Q * H, tile], in the keys' dtype."""
    column = lambda ref: jnp.concatenate([ref[0, t : t + 1].reshape(-1, 1) for t in range(bands.QUERIES)])  # noqa: E731
    scores = _scores(_rows(q_ref), keys, bounds_ref, base, scale)
    weights = jnp.where(scores > NEVER, jnp.exp(scores - column(lse_ref)), 0.0)
    d_weights = _dot(_rows(d_out_ref), keys, 1, 1)
    return weights.astype(keys.dtype), (weights * (d_weights - column(delta_ref)) * scale).astype(keys.dtype)


def _scores(rows, keys, bounds_ref, base, scale):
    """Scores [Q * H, tile] with the entries from `base` on, NEVER outside of each query's bounds."""
    scores = _dot(rows, keys, 1, 1) * scale
    heads = rows.shape[0] // bands.QUERIES
    entry = base + jax.lax.broadcasted_iota(jnp.int32, (heads, keys.shape[0]), 1)

    def one(t):
        seen = (entry >= bounds_ref[0, 0, 0, 2 * t]) & (entry < bounds_ref[0, 0, 0, 2 * t + 1])
        return jnp.where(seen, scores[t * heads : (t + 1) * heads], NEVER)

    return jnp.concatenate([one(t) for t in range(bands.QUERIES)])


def _dot(a, b, axis_a, axis_b):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(ref):
    """A block [1, Q, H, K] as [Q * H, K]."""
    return ref[0].reshape(-1, ref.shape[-1])


def _padded(q, entries, bounds, tile):
    """Queries and entries to whole tiles, widths to whole lanes, heads to whole sublanes; nobody sees the padding."""
    wide = -q.shape[-1] % LANES
    q = jnp.pad(q, ((0, 0), (0, -q.shape[1] % bands.QUERIES), (0, -q.shape[2] % (2 * SUBLANES)), (0, wide)))
    bounds = jnp.clip(jnp.pad(bounds, ((0, 0), (0, q.shape[1] - bounds.shape[1]), (0, 0))), 0, entries.shape[1])
    return q, jnp.pad(entries, ((0, 0), (0, -entries.shape[1] % tile), (0, wide))), bounds.astype(jnp.int32)


def _bounds_of() -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, 2 * bands.QUERIES), lambda b, i, *_: (b, i, 0, 0), memory_space=pltpu.SMEM)


def _queries(*last: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, bands.QUERIES, *last), lambda b, i, *_: (b, i, *(0 for _ in last)))


def _entries_seen(tile: int, width: int) -> pl.BlockSpec:
    """Step j has the j-th tile that is seen; steps behind the last one stay there, so that nothing is fetched."""
    step = lambda b, i, j, first, count: first[b, i] + jnp.minimum(j, jnp.maximum(count[b, i] - 1, 0))  # noqa: E731
    return pl.BlockSpec((1, tile, width), lambda b, *g: (b, step(b, *g), 0))


_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)
