"""What the indexer's loss needs of chosen entries, on a TPU: attention's mass on them, and their index scores.

An entry and its index key have the same number and lie behind one another, so that one DMA per chosen entry brings both
(`sparse_attention/tpu_fetch.py`). Mass and scores are sums over heads of a product with a query's entries or keys: of
each entry one number, whatever the others are. Heads are apart only in VMEM.

The backward pass fetches the keys alone and computes their products again. Gradients of a query's chosen keys are added
to those of all keys, as attention's are (`sparse_attention/tpu_sums.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.sparse_attention import tpu, tpu_fetch, tpu_sums


def supports(operands: IndexOperands, q: jax.Array, entries: jax.Array) -> bool:
    """Whether the kernels take these operands: BF16 or float32, of one dtype where they are multiplied."""
    return tpu.supports(q, entries) and tpu.supports(operands.queries, operands.keys)


def forward(
    operands: IndexOperands,
    q: jax.Array,
    entries: jax.Array,
    lse: jax.Array,
    choice: jax.Array,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention mass and index scores of chosen entries, as `xla_loss.forward`, for what `supports` takes.

    `interpret`: False on a TPU; `pltpu.InterpretParams()` elsewhere.
    """
    words = tpu_fetch.words_of(entries, operands.keys)
    chosen, of_rows = tpu_fetch.rows_to_fetch(choice, entries.shape[1])
    q, queries = (tpu_fetch.whole_steps(x, tpu_fetch.whole_lanes(x.shape[-1])) for x in (q, operands.queries))
    lse, weights = tpu_fetch.whole_steps(lse), tpu_fetch.whole_steps(operands.weights)
    (batch, slots), tiles = q.shape[:2], tpu_fetch.tiles_of(choice.shape[-1])
    mass, scores = pl.pallas_call(
        functools.partial(_compare, scale=scale, interpreted=bool(interpret)),
        grid=(batch, slots // tpu_fetch.QUERIES),
        in_specs=[
            of_rows,
            *(tpu_fetch.per_query(*x.shape[2:]) for x in (q, lse, queries, weights)),
            tpu_fetch.IN_HBM,
        ],
        out_specs=[tpu_fetch.per_tile(tiles)] * 2,
        out_shape=[jax.ShapeDtypeStruct((batch, tiles, slots, tpu_fetch.TILE), jnp.float32)] * 2,
        scratch_shapes=tpu_fetch.buffers(choice.shape[-1], words),
        compiler_params=tpu_fetch.COMPILER,
        interpret=interpret,
        name="index_loss",
    )(chosen, q, lse, queries, weights, words)

    def used(of_tiles):
        found = of_tiles.swapaxes(1, 2).reshape(batch, slots, -1)[:, : choice.shape[1], : choice.shape[2]]
        return jnp.where(choice >= 0, found, 0.0)

    return used(mass), used(scores)


def _compare(
    chosen_ref, q_ref, lse_ref, queries_ref, weights_ref, words_ref, mass_ref, scores_ref,
    here, there, arrived, *, scale, interpreted,
):  # fmt: skip
    """QUERIES queries of one row, one after another, tile by tile."""
    of_entry = tpu_fetch.rows_of(q_ref.shape[-1], q_ref.dtype)

    def one(t, i, planes):
        entries = tpu_fetch.numbers(planes[:of_entry], q_ref.dtype, q_ref.shape[-1])
        keys = tpu_fetch.numbers(planes[of_entry:], queries_ref.dtype, queries_ref.shape[-1])
        mass = jnp.exp(_products(q_ref[0, t], entries) * scale - tpu_fetch.column(lse_ref, t))
        scores = jnp.maximum(_products(queries_ref[0, t], keys), 0.0) * tpu_fetch.column(weights_ref, t)
        mass_ref[0, i, pl.ds(t, 1)] = mass.sum(axis=0, keepdims=True)
        scores_ref[0, i, pl.ds(t, 1)] = scores.sum(axis=0, keepdims=True)

    tpu_fetch.each_tile(one, chosen_ref, words_ref, (here, there), arrived, interpreted)


def _products(queries, rows):
    """[H, K] x [k, K] -> [H, k] float32."""
    return _dot(queries, rows, 1, 1)


def _dot(a, b, of_a, of_b):
    """Product over dimension `of_a` of a and `of_b` of b, in float32: a TPU would multiply float32 rounded to BF16."""
    return jax.lax.dot_general(
        a,
        b,
        (((of_a,), (of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def backward(
    operands: IndexOperands, choice: jax.Array, d_scores: jax.Array, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the operands of `forward`, in their dtypes, from that of the scores.

    Args:
        operands: as given to `forward`.
        choice: int32 [B, S, k], -1 is unused.
        d_scores: [B, S, k] float32; of unused places any numbers.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        Of the queries [B, S, Hi, di], the keys [B, T, di] and the weights [B, S, Hi].
    """
    part, width = functools.partial(_backward, interpret), tpu_fetch.whole_lanes(operands.keys.shape[-1])
    of_queries = operands.queries, operands.weights, jnp.where(choice >= 0, d_scores, 0.0)
    (d_queries, d_weights), d_keys = tpu_sums.add_up(part, of_queries, choice, operands.keys, width)
    return d_queries, d_keys, d_weights.astype(operands.weights.dtype)


def _backward(interpret, sums, choice, queries, weights, d_scores, keys):
    """Gradients of the queries and the weights, and of the keys as `sums` has them."""
    (length, count), width, words = choice.shape[1:], queries.shape[-1], tpu_fetch.words_of(keys)
    chosen, of_rows = tpu_fetch.rows_to_fetch(choice, keys.shape[1], sums.parts)
    queries, weights = tpu_fetch.whole_steps(queries, sums.columns), tpu_fetch.whole_steps(weights)
    d_scores = tpu_fetch.in_tiles(d_scores)
    batch, slots, heads, columns = queries.shape
    of_query = [tpu_fetch.per_query(*x.shape[2:]) for x in (queries, weights)]
    d_queries, d_weights, d_keys = pl.pallas_call(
        functools.partial(_differentiate, sums=sums, interpreted=bool(interpret)),
        grid=(batch, slots // tpu_fetch.QUERIES),
        in_specs=[of_rows, tpu_fetch.per_tile(d_scores.shape[1]), *of_query, tpu_fetch.IN_HBM, of_rows],
        out_specs=[*of_query, tpu_fetch.IN_HBM],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(weights.shape, jnp.float32),
            sums.result(batch, slots),
        ],
        scratch_shapes=[
            *tpu_fetch.buffers(count, words),
            pltpu.VMEM((heads, columns), jnp.float32),
            pltpu.VMEM((heads, tpu_fetch.TILE), jnp.float32),
            *sums.memory(),
        ],
        compiler_params=sums.compiler,
        interpret=interpret,
        name="index_loss_backward",
    )(chosen, d_scores, queries, weights, words, sums.targets(choice))
    return [d_queries[:, :length, :, :width], d_weights[:, :length]], d_keys


def _differentiate(
    chosen_ref, d_scores_ref, queries_ref, weights_ref, words_ref, targets_ref, d_queries_ref, d_weights_ref,
    d_keys_ref, here, there, arrived, to_queries, to_weights, *memory, sums, interpreted,
):  # fmt: skip
    """Gradients of QUERIES queries; those of their keys go to `sums`."""
    dtype, to_keys = queries_ref.dtype, (targets_ref, d_keys_ref, *memory)

    def before(t):
        sums.before(t, to_keys)
        to_queries[...] = jnp.zeros_like(to_queries)
        to_weights[...] = jnp.zeros_like(to_weights)

    def one(t, i, planes):
        keys = tpu_fetch.numbers(planes, dtype, queries_ref.shape[-1])
        queries, d_scores = queries_ref[0, t], d_scores_ref[0, i, pl.ds(t, 1)]
        products = _products(queries, keys)
        to_weights[...] += jnp.maximum(products, 0.0) * d_scores
        d_products = jnp.where(products > 0, tpu_fetch.column(weights_ref, t) * d_scores, 0.0).astype(dtype)
        to_queries[...] += _dot(d_products, keys, 1, 0)
        sums.add(t, i, _dot(d_products, queries, 0, 0), to_keys)

    def behind(t):
        d_queries_ref[0, t] = to_queries[...].astype(dtype)
        d_weights_ref[0, pl.ds(t, 1)] = to_weights[...].sum(axis=1, keepdims=True).reshape(1, -1)
        sums.behind(t, to_keys)

    sums.begin(to_keys)
    tpu_fetch.each_tile(one, chosen_ref, words_ref, (here, there), arrived, interpreted, before, behind)
    sums.end(to_keys)
