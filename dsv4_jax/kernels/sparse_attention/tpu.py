"""Attention over chosen entries on a TPU: rows fetched by DMA, one query's entries in flight while another computes.

An entry is shared by all heads, so one query's work is two products of [H, K] with its k chosen entries, [k, K]: large
enough for the matrix unit. What has to be hidden is the fetching. Entries stay in HBM; their numbers lie in scalar
memory, from where each row's DMA is issued, and two buffers alternate between arriving and being used.
A query is cut into tiles of entries, whose softmax goes on from tile to tile, and the next query's DMAs are issued
between a tile's instructions: they share bundles.

The backward pass computes the weights again from the saved log-sum-exp. The gradients of a query's chosen entries are
added to those of all entries in VMEM, where these fit (`tpu_sums.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.sparse_attention import tpu_fetch as fetch
from dsv4_jax.kernels.sparse_attention import tpu_softmax, tpu_sums
from dsv4_jax.kernels.sparse_attention.tpu_softmax import NEVER
from dsv4_jax.kernels.sparse_attention.xla import Branch


def supports(q: jax.Array, entries: jax.Array) -> bool:
    """Whether the kernels take these operands: both in BF16 or float32, in which the products are taken."""
    return q.dtype == entries.dtype and q.dtype in (jnp.bfloat16, jnp.float32)


def forward(q: jax.Array, entries: jax.Array, indices: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `indices[t]` of [B, T, K]; indices [B, S, k], -1 is unused.

    Args:
        q: queries, of a dtype that `supports` takes.
        entries: shared by the heads.
        indices: int32.
        scale: factor of the scores.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        Output [B, S, H, K] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query chose nothing.
    """
    length, width = q.shape[1], q.shape[3]
    words, (chosen, of_rows) = fetch.words_of(entries), fetch.rows_to_fetch(indices, entries.shape[1])
    choice = fetch.in_tiles(indices, fill=-1)
    q = fetch.whole_steps(q, fetch.width_of_words(q))
    batch, slots, heads, k_width = q.shape
    out, lse = pl.pallas_call(
        functools.partial(_attend, scale=scale, dtype=q.dtype, interpreted=bool(interpret)),
        grid=(batch, slots // fetch.QUERIES),
        in_specs=[
            of_rows,
            fetch.per_tile(choice.shape[1]),
            fetch.per_query(heads, k_width),
            fetch.IN_HBM,
        ],
        out_specs=[fetch.per_query(heads, k_width), fetch.per_query(heads)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, slots, heads), jnp.float32),
        ],
        scratch_shapes=[*fetch.buffers(indices.shape[-1], words), *tpu_softmax.memory(heads, k_width)],
        compiler_params=fetch.COMPILER,
        interpret=interpret,
        name="gather_attention",
    )(chosen, choice, q, words)
    return out[:, :length, :, :width], lse[:, :length]


def _attend(
    chosen_ref, choice_ref, q_ref, words_ref, out_ref, lse_ref, here, there, arrived, *softmax,
    scale, dtype, interpreted,
):  # fmt: skip
    """QUERIES queries of one row, one after another, tile by tile."""

    def one(t, i, planes):
        keys = fetch.numbers(planes, dtype, q_ref.shape[-1])
        seen = choice_ref[0, i, pl.ds(t, 1)] >= 0
        tpu_softmax.add(_scores(q_ref[0, t], keys, seen, scale), keys, softmax)

    def behind(t):
        out, lse = tpu_softmax.result(softmax)
        out_ref[0, t] = out.astype(dtype)
        lse_ref[0, pl.ds(t, 1)] = lse.reshape(1, -1)

    before = lambda t: tpu_softmax.begin(softmax)  # noqa: E731
    fetch.each_tile(one, chosen_ref, words_ref, (here, there), arrived, interpreted, before, behind)


def _scores(q, keys, seen, scale):
    """[H, K] x [k, K] -> [H, k]."""
    scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.where(seen, scores * scale, NEVER)


def backward(
    q: jax.Array,
    entries: jax.Array,
    indices: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and entries, in their dtypes, from what `forward` was given and returned."""
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    part, width = functools.partial(_backward, scale, interpret), fetch.width_of_words(q)
    (dq,), d_entries = tpu_sums.add_up(part, (q, d_out, delta, lse), indices, entries, width)
    return dq, d_entries


def _backward(scale, interpret, sums, indices, q, d_out, delta, lse, entries):
    """Gradients of the queries, [[B, S, H, K]], and of the entries as `sums` has them."""
    length, width, count = q.shape[1], q.shape[3], indices.shape[-1]
    words = fetch.words_of(entries)
    chosen, of_rows = fetch.rows_to_fetch(indices, entries.shape[1], sums.parts)
    choice = fetch.in_tiles(indices, fill=-1)
    q, d_out, delta, lse = (
        *(fetch.whole_steps(x, sums.columns) for x in (q, d_out)),
        *(fetch.whole_steps(x) for x in (delta, lse)),
    )
    of_queries = [fetch.per_query(*x.shape[2:]) for x in (q, d_out, delta, lse)]
    batch, slots, *shape = q.shape
    dq, d_entries = pl.pallas_call(
        functools.partial(_differentiate, sums=sums, scale=scale, dtype=q.dtype, interpreted=bool(interpret)),
        grid=(batch, slots // fetch.QUERIES),
        in_specs=[of_rows, fetch.per_tile(choice.shape[1]), *of_queries, fetch.IN_HBM, of_rows],
        out_specs=[fetch.per_query(*shape), fetch.IN_HBM],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums.result(batch, slots)],
        scratch_shapes=[*fetch.buffers(count, words), pltpu.VMEM(tuple(shape), jnp.float32), *sums.memory()],
        compiler_params=sums.compiler,
        interpret=interpret,
        name="gather_attention_backward",
    )(chosen, choice, q, d_out, delta, lse, words, sums.targets(indices))
    return [dq[:, :length, :, :width]], d_entries


def _differentiate(
    chosen_ref, choice_ref, q_ref, d_out_ref, delta_ref, lse_ref, words_ref, targets_ref, dq_ref, d_entries_ref,
    here, there, arrived, to_queries, *memory, sums, scale, dtype, interpreted,
):  # fmt: skip
    """Gradients of QUERIES queries; those of their entries go to `sums`."""
    to_entries = targets_ref, d_entries_ref, *memory

    def before(t):
        sums.before(t, to_entries)
        to_queries[...] = jnp.zeros_like(to_queries)

    def one(t, i, planes):
        seen = choice_ref[0, i, pl.ds(t, 1)] >= 0
        keys = fetch.numbers(planes, dtype, q_ref.shape[-1])
        q, d_out = q_ref[0, t], d_out_ref[0, t]
        weights = jnp.where(seen, jnp.exp(_scores(q, keys, seen, scale) - fetch.column(lse_ref, t)), 0.0)
        d_weights = jax.lax.dot_general(d_out, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - fetch.column(delta_ref, t)) * scale).astype(dtype)
        to_queries[...] += jnp.dot(d_scores, keys, preferred_element_type=jnp.float32)
        over_heads = (((0,), (0,)), ((), ()))
        d_keys = jax.lax.dot_general(d_scores, q, over_heads, preferred_element_type=jnp.float32)
        d_keys += jax.lax.dot_general(weights.astype(dtype), d_out, over_heads, preferred_element_type=jnp.float32)
        sums.add(t, i, d_keys, to_entries)

    def behind(t):
        dq_ref[0, t] = to_queries[...].astype(dtype)
        sums.behind(t, to_entries)

    sums.begin(to_entries)
    fetch.each_tile(one, chosen_ref, words_ref, (here, there), arrived, interpreted, before, behind)
    sums.end(to_entries)
