"""Attention over chosen entries on a TPU: rows fetched by DMA, one query's entries in flight while another computes.

An entry is shared by all heads, so one query's work is two products of [H, K] with its k chosen entries, [k, K]: large
enough for the matrix unit. What has to be hidden is the fetching. Entries stay in HBM; their numbers lie in scalar
memory, from where each row's DMA is issued, and two buffers alternate between arriving and being used.

A DMA moves whole tiles, and in an array [T, K] a row is no tile. The entries are therefore laid out as [T, w, 1, 128]
with 32 bits to a word, w rows of 128 words each, and arrive as planes [w, k, 1, 128]. Rows that are tiles lie one
behind the other, so each plane is at once the dense matrix [k, 128]. Two BF16 numbers share a word, those of places i
and i + K / 2, which the kernel takes apart by a shift and a mask; no number moves between lanes or sublanes.

The backward pass computes the weights again from the saved log-sum-exp. The gradients of a query's chosen entries come
out as rows, [k, K], and are added up in the order of queries by XLA's scatter: there are no atomic additions, and equal
inputs give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.chunks import join, split
from dsv4_jax.kernels.sparse_attention.xla import Branch

LANES = 128
QUERIES = 8  # per step of the grid; the first fetch of each step is not hidden
BACKWARD_QUERIES = 64  # whose entries' gradients, [k, K] float32 each, exist at once
NEVER = -1e30  # a score that no query sees; its weight is exactly zero
UNROLL = 16  # row DMAs per step of the loop that issues them
VMEM_BYTES = 56 << 20  # a tpu7x core has 64 MiB, and the compiler keeps some

_COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
)


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
    q, words, chosen, choice = _padded(q, entries, indices)
    batch, slots, heads, k_width = q.shape
    rows = lambda *last: pl.BlockSpec((1, QUERIES, *last), lambda b, i: (b, i, *(0 for _ in last)))  # noqa: E731
    out, lse = pl.pallas_call(
        functools.partial(_attend, scale=scale, dtype=q.dtype, interpreted=bool(interpret)),
        grid=(batch, slots // QUERIES),
        in_specs=[
            pl.BlockSpec((1, QUERIES, chosen.shape[-1]), lambda b, i: (b, i, 0), memory_space=pltpu.SMEM),
            rows(choice.shape[-1]),
            rows(heads, k_width),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[rows(heads, k_width), rows(heads)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, slots, heads), jnp.float32),
        ],
        scratch_shapes=_buffers(choice.shape[-1], words),
        compiler_params=_COMPILER,
        interpret=interpret,
        name="gather_attention",
    )(chosen, choice, q, words)
    return out[:, :length, :, :width], lse[:, :length]


def _attend(chosen_ref, choice_ref, q_ref, words_ref, out_ref, lse_ref, buffer, arrived, *, scale, dtype, interpreted):
    """QUERIES queries of one row, one after another."""

    def one(t, keys, seen):
        scores = _scores(q_ref[0, t], keys, seen, scale)
        top = scores.max(axis=1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = weights.sum(axis=1, keepdims=True)
        out = jnp.dot(weights.astype(dtype), keys, preferred_element_type=jnp.float32)
        out_ref[0, t] = (out / jnp.maximum(total, 1e-30)).astype(dtype)
        lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
        lse_ref[0, pl.ds(t, 1)] = lse.reshape(1, -1)

    _each_query(one, chosen_ref, choice_ref, words_ref, buffer, arrived, dtype, interpreted)


def _each_query(use, chosen_ref, choice_ref, words_ref, buffer, arrived, dtype, interpreted) -> None:
    """`use(t, keys [k, K], seen [1, k])` for each query, while the entries of the next one are on their way."""
    row = pl.program_id(0)
    choices, fetched = choice_ref.shape[-1], chosen_ref.shape[-1]

    def fetch(t, slot):
        def one(j, _):
            entry = chosen_ref[0, t, j]
            pltpu.make_async_copy(words_ref.at[row, entry], buffer.at[slot, :, j], arrived.at[slot]).start()
            return _

        jax.lax.fori_loop(0, fetched, one, 0, unroll=UNROLL)

    def step(t, _):
        slot = t % 2
        pl.when(t + 1 < QUERIES)(lambda: fetch(t + 1, 1 - slot))
        # A semaphore counts bytes: one wait for as many as all rows have.
        rows = buffer.at[slot, :, :fetched]
        pltpu.make_async_copy(rows, rows, arrived.at[slot]).wait()
        use(t, _numbers(_planes(buffer, slot, interpreted), dtype), choice_ref[0, pl.ds(t, 1)] >= 0)
        return _

    if fetched < choices:  # a weight of zero times what memory happens to hold could be NaN
        rest = buffer.at[:, :, fetched:]
        rest[...] = jnp.zeros(rest.shape, jnp.uint32)
    fetch(0, 0)
    jax.lax.fori_loop(0, QUERIES, step, 0)


def _scores(q, keys, seen, scale):
    """[H, K] x [k, K] -> [H, k]."""
    scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.where(seen, scores * scale, NEVER)


def _planes(buffer, slot, interpreted):
    """Planes [w, k, 128] of a slot: the same memory seen as dense matrices. The interpreter has no such views."""
    shape = buffer.shape[1], buffer.shape[2], LANES
    return buffer[slot].reshape(shape) if interpreted else buffer.reshape(2, *shape)[slot]


def _numbers(planes, dtype):
    """Words [w, k, 128] of entries as numbers [k, K]."""
    parts = [planes[i] for i in range(planes.shape[0])]
    if dtype == jnp.float32:
        return jnp.concatenate([pltpu.bitcast(part, jnp.float32) for part in parts], axis=1)
    low = [pltpu.bitcast(part << 16, jnp.float32).astype(dtype) for part in parts]
    high = [pltpu.bitcast(part & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype) for part in parts]
    return jnp.concatenate(low + high, axis=1)


def _buffers(choices: int, words: jax.Array) -> list[Any]:
    return [
        pltpu.VMEM((2, words.shape[2], choices, 1, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def _words(entries: jax.Array) -> jax.Array:
    """[B, T, K] -> uint32 [B, T, w, 1, 128]; K a multiple of 128 words."""
    batch, count, width = entries.shape
    if entries.dtype == jnp.float32:
        words = jax.lax.bitcast_convert_type(entries, jnp.uint32)
    else:
        halves = jax.lax.bitcast_convert_type(entries, jnp.uint16).astype(jnp.uint32)
        words = halves[..., : width // 2] | halves[..., width // 2 :] << 16
    return words.reshape(batch, count, -1, 1, LANES)


def _padded(q: jax.Array, entries: jax.Array, indices: jax.Array) -> tuple[jax.Array, ...]:
    """Queries to whole steps, entries as words, rows to fetch to whole loop steps, choices to whole lanes.

    Padding of the choices is -1; what is fetched for it is some entry.
    """
    per_word = 4 // q.dtype.itemsize
    wide = -q.shape[-1] % (LANES * per_word)
    more = -q.shape[1] % QUERIES
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, wide)))
    pad = lambda to: jnp.pad(indices, ((0, 0), (0, more), (0, -indices.shape[-1] % to)), constant_values=-1)  # noqa: E731
    chosen = jnp.clip(pad(UNROLL), 0, entries.shape[1] - 1)  # nothing checks the addresses of a DMA
    return q, _words(jnp.pad(entries, ((0, 0), (0, 0), (0, wide)))), chosen, pad(LANES)


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

    def one(d_entries, args):
        q, d_out, delta, lse, indices = args
        dq, rows = _backward(q, d_out.astype(q.dtype), delta, lse, entries, indices, scale, interpret)
        add = jax.vmap(lambda total, index, rows: total.at[index].add(rows, mode="drop"))
        return add(d_entries, jnp.where(indices >= 0, indices, entries.shape[1]), rows), dq

    parts = split((q, d_out, delta, lse), BACKWARD_QUERIES), split(indices, BACKWARD_QUERIES, fill=-1)
    d_entries, dq = jax.lax.scan(one, jnp.zeros(entries.shape, jnp.float32), (*parts[0], parts[1]))
    return join(dq, q.shape[1]), d_entries.astype(entries.dtype)


def _backward(q, d_out, delta, lse, entries, indices, scale, interpret):
    """Gradients of the queries [B, S, H, K] and of each query's chosen entries [B, S, k, K] float32."""
    length, width, count = q.shape[1], q.shape[3], indices.shape[-1]
    d_out = jnp.pad(d_out, ((0, 0), (0, -length % QUERIES), (0, 0), (0, 0)))
    delta, lse = (jnp.pad(x, ((0, 0), (0, -length % QUERIES), (0, 0))) for x in (delta, lse))
    q, words, chosen, choice = _padded(q, entries, indices)
    d_out = jnp.pad(d_out, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - width)))
    batch, slots, heads, k_width = q.shape
    rows = lambda *last: pl.BlockSpec((1, QUERIES, *last), lambda b, i: (b, i, *(0 for _ in last)))  # noqa: E731
    dq, d_keys = pl.pallas_call(
        functools.partial(_differentiate, scale=scale, dtype=q.dtype, interpreted=bool(interpret)),
        grid=(batch, slots // QUERIES),
        in_specs=[
            pl.BlockSpec((1, QUERIES, chosen.shape[-1]), lambda b, i: (b, i, 0), memory_space=pltpu.SMEM),
            rows(choice.shape[-1]),
            rows(heads, k_width),
            rows(heads, k_width),
            rows(heads),
            rows(heads),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[rows(heads, k_width), pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, slots, choice.shape[-1], k_width), jnp.float32),
        ],
        scratch_shapes=[
            *_buffers(choice.shape[-1], words),
            pltpu.VMEM((2, choice.shape[-1], k_width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="gather_attention_backward",
    )(chosen, choice, q, d_out, delta, lse, words)
    return dq[:, :length, :, :width], d_keys[:, :length, :count, :width]


def _differentiate(
    chosen_ref, choice_ref, q_ref, d_out_ref, delta_ref, lse_ref, words_ref, dq_ref, d_keys_ref,
    buffer, arrived, leaving, left, *, scale, dtype, interpreted,
):  # fmt: skip
    """Gradients of QUERIES queries; those of their entries leave by DMA while the next query computes."""
    row, first = pl.program_id(0), pl.program_id(1) * QUERIES

    def one(t, keys, seen):
        slot = t % 2
        q, d_out = q_ref[0, t], d_out_ref[0, t]
        column = lambda ref: ref[0, pl.ds(t, 1)].reshape(-1, 1)  # noqa: E731
        weights = jnp.where(seen, jnp.exp(_scores(q, keys, seen, scale) - column(lse_ref)), 0.0)
        d_weights = jax.lax.dot_general(d_out, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - column(delta_ref)) * scale).astype(dtype)
        dq_ref[0, t] = jnp.dot(d_scores, keys, preferred_element_type=jnp.float32).astype(dtype)
        over_heads = (((0,), (0,)), ((), ()))
        d_keys = jax.lax.dot_general(d_scores, q, over_heads, preferred_element_type=jnp.float32)
        d_keys += jax.lax.dot_general(weights.astype(dtype), d_out, over_heads, preferred_element_type=jnp.float32)
        pl.when(t >= 2)(send(t - 2, slot).wait)
        leaving[slot] = d_keys
        send(t, slot).start()

    def send(t, slot):
        return pltpu.make_async_copy(leaving.at[slot], d_keys_ref.at[row, first + t], left.at[slot])

    _each_query(one, chosen_ref, choice_ref, words_ref, buffer, arrived, dtype, interpreted)
    for t in (QUERIES - 2, QUERIES - 1):
        send(t, t % 2).wait()
