"""The operations that `tests.benchmarks.kernels` times: operands, the work they do, and what they must give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels import indexer_topk, sparse_attention
from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk import IndexOperands, PagedOperands
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import compiled_for
from dsv4_jax.kernels.pools import pool_of
from dsv4_jax.kernels.sparse_attention.xla import attend_keys
from dsv4_jax.quantization.storage import Storage, cache_format
from tests.benchmarks.expert_operations import expert_gradients, experts
from tests.benchmarks.operation import Draw, Operation, error, wide


def operations(config: DeepseekV4Config, context: int, queries: int, rows: int, dtype: Any) -> Iterator[Operation]:
    """Every operation behind `context` tokens.

    Args:
        config: V4's widths.
        context: tokens of the row or of each sequence.
        queries: of one prefill chunk or training row part, the last of the context; tokens of the experts.
        rows: sequences that decode one token.
        dtype: of the operands.
    """
    draw = Draw(dtype)
    csa, hca = context // 4, context // 128
    yield from _attention("sparse, prefill", "gather", config, csa, queries, draw)
    yield from _attention("all HCA entries, prefill", "range", config, hca, queries, draw)
    yield from _window(config, queries, draw)
    yield _index(config, csa, queries, draw)
    yield from _index_loss(config, csa, queries, draw)
    yield _paged_attention("sparse, decode", "gather", config, csa, rows, draw)
    yield _paged_attention("all HCA entries, decode", "range", config, hca, rows, draw)
    yield _paged_index(config, csa, rows, draw)
    yield from experts("forward", (None, "fp8", "fp4"), config, queries, draw)
    yield from experts("decode", ("fp8", "fp4"), config, rows, draw)
    yield expert_gradients(config, queries, draw)


def _attention(
    name: str, kind: Literal["gather", "range"], config: DeepseekV4Config, entries: int, queries: int, draw: Draw
) -> Iterator[Operation]:
    heads, width = config.num_attention_heads, config.head_dim
    scale = width**-0.5
    q, kv = draw(1, queries, heads, width), draw(1, entries, width)
    if kind == "gather":
        choice = (draw.choices(1, queries, entries, config.index_topk),)
        seen = choice[0].shape[-1]
        run = lambda q, kv, *choice: sparse_attention.gather_attention(q, kv, *choice, scale)  # noqa: E731
    else:
        choice = (jnp.zeros((1, queries), jnp.int32), jnp.full((1, queries), entries, jnp.int32))
        seen = entries
        run = lambda q, kv, *bounds: sparse_attention.range_attention(q, kv, *bounds, scale)  # noqa: E731
    flops = 4.0 * queries * heads * width * seen
    size = q.dtype.itemsize
    read = queries * seen * width if kind == "gather" else entries * width
    moved = float(size * (2 * q.size + read))
    part = _some(queries)
    visible = _visible(kind, choice, entries, part)
    wanted = _exact(q[:, part], kv, visible, scale)
    check = lambda found: error(found[0][:, part], wanted)  # noqa: E731
    dense = partial(_dense, scale=scale) if kind == "gather" else None
    yield Operation(name, (q, kv, *choice), run, flops, moved, check, dense)

    weights = draw(*q.shape)
    both = lambda run: jax.grad(lambda q, kv, *rest: (run(q, kv, *rest)[0] * weights).sum(), (0, 1))  # noqa: E731
    gradient, _ = _exact_gradients(q[:, part], kv, visible, scale, weights[:, part])
    check = lambda found: error(found[0][:, part], gradient)  # noqa: E731
    name = name.replace("prefill", "forward and backward")
    tolerance = {"float32": 1e-3, "bfloat16": 6e-2}
    yield Operation(name, (q, kv, *choice), both(run), 3.5 * flops, 3 * moved, check, dense and both(dense), tolerance)


def _dense(q: jax.Array, kv: jax.Array, indices: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """The chosen entries by a mask over all of them, queries in chunks."""
    entries = kv.shape[1]

    def one(args: tuple[jax.Array, jax.Array]) -> Any:
        q, indices = args
        mark = jax.vmap(jax.vmap(lambda row: jnp.zeros(entries, bool).at[row].set(True, mode="drop")))
        return attend_keys(q, kv, mark(jnp.where(indices < 0, entries, indices)), scale)

    chunk = chunk_length(q.shape[1], entries * q.shape[2])
    return join(jax.lax.map(one, (split(q, chunk), split(indices, chunk, fill=-1))), q.shape[1])


def _window(config: DeepseekV4Config, queries: int, draw: Draw) -> Iterator[Operation]:
    heads, width, window = config.num_attention_heads, config.head_dim, config.sliding_window
    q, kv, scale = draw(1, queries, heads, width), draw(1, queries, width), width**-0.5
    run = lambda q, kv: sparse_attention.window_attention(q, kv, None, window, scale)  # noqa: E731
    part = _some(queries)
    at = np.arange(queries)[part]
    distance = at[:, None] - np.arange(queries)
    visible = ((distance >= 0) & (distance < window))[None]
    wanted = _exact(q[:, part], kv, visible, scale)
    seen = np.minimum(np.arange(queries) + 1, window).sum()
    flops, moved = 4.0 * heads * width * seen, float(q.dtype.itemsize * (2 * q.size + kv.size))
    check = lambda found: error(found[0][:, part], wanted)  # noqa: E731
    yield Operation("window, prefill", (q, kv), run, flops, moved, check)

    weights = draw(*q.shape)
    gradient = jax.grad(lambda q, kv: (run(q, kv)[0] * weights).sum(), (0, 1))
    exact = _exact_gradients(q[:, part], kv, visible, scale, weights[:, part])
    # The last entries are seen by the last queries alone, so that these say their gradient too.
    check = lambda found: max(error(found[0][:, part], exact[0]), error(found[1][:, part], exact[1][:, part]))  # noqa: E731
    tolerance = {"float32": 1e-3, "bfloat16": 6e-2}
    name = "window, forward and backward"
    yield Operation(name, (q, kv), gradient, 3.5 * flops, 3 * moved, check, tolerance=tolerance)


def _index(config: DeepseekV4Config, entries: int, queries: int, draw: Draw) -> Operation:
    heads, width, k = config.index_n_heads, config.index_head_dim, config.index_topk
    operands = IndexOperands(
        draw(1, queries, heads, width), draw(1, entries, width), draw(1, queries, heads).astype(jnp.float32)
    )
    lo, hi = jnp.zeros((1, queries), jnp.int32), jnp.full((1, queries), entries, jnp.int32)
    run = lambda operands, lo, hi: indexer_topk.index_topk(operands, lo, hi, k)  # noqa: E731
    part = _some(queries)
    scores = _exact_scores(operands.queries[:, part], operands.keys, operands.weights[:, part])
    flops = 2.0 * queries * entries * heads * (width + 1)
    moved = float(operands.queries.nbytes + operands.keys.nbytes + 4 * queries * min(k, entries))
    check = lambda found: _lost(found[:, part], scores)  # noqa: E731
    return Operation("index scores and top-k, prefill", (operands, lo, hi), run, flops, moved, check)


def _index_loss(config: DeepseekV4Config, entries: int, queries: int, draw: Draw) -> Iterator[Operation]:
    heads, width, scale = config.num_attention_heads, config.head_dim, config.head_dim**-0.5
    index_heads, index_width = config.index_n_heads, config.index_head_dim
    operands = IndexOperands(
        draw(1, queries, index_heads, index_width),
        draw(1, entries, index_width),
        draw(1, queries, index_heads, scale=0.1 / index_width).astype(jnp.float32),
    )
    q, kv, lse = draw(1, queries, heads, width), draw(1, entries, width), draw(1, queries, heads).astype(jnp.float32)
    choice = draw.choices(1, queries, entries, config.index_topk)
    given, part = (operands, q, kv, lse, choice), _some(queries)
    loss = lambda *given: indexer_topk.index_loss(*given, scale, 0).kl  # noqa: E731
    kl, d_queries, d_weights = _exact_loss(given, part, scale)
    products, index_products = (2.0 * choice.size * n for n in (heads * width, index_heads * index_width))
    size = q.dtype.itemsize
    moved = float(size * (q.size + operands.queries.size + choice.size * (width + index_width)))
    check = lambda found: error(found[:, part], kl)  # noqa: E731
    yield Operation("index loss, forward", given, loss, products + index_products, moved, check)

    gradient = jax.grad(lambda *given: loss(*given).sum())
    check = lambda found: max(error(found[0][:, part], d_queries), error(found[2][:, part], d_weights))  # noqa: E731
    flops, moved = products + 4 * index_products, moved + size * (2 * operands.queries.size + choice.size * index_width)
    tolerance = {"float32": 1e-3, "bfloat16": 6e-2}
    name = "index loss, forward and backward"
    yield Operation(name, given, gradient, flops, moved, check, tolerance=tolerance)


def _paged_attention(
    name: str, kind: Literal["gather", "range"], config: DeepseekV4Config, entries: int, rows: int, draw: Draw
) -> Operation:
    heads, width, scale = config.num_attention_heads, config.head_dim, config.head_dim**-0.5
    storage = cache_format(config, "deployed").entry
    per_block = {"gather": 32, "range": 1}[kind]  # of CSA and HCA layers in blocks of 128 tokens
    q, (pages, kv) = draw(rows, 1, heads, width), _pages(storage, draw, rows, entries, width, per_block)
    if kind == "gather":
        choice = draw.choices(rows, 1, entries, config.index_topk)
        seen = choice.shape[-1]
        run = lambda q, pages, choice: sparse_attention.gather_attention(q, pages, choice, scale)  # noqa: E731
    else:
        choice, seen = jnp.full((rows, 1), entries, jnp.int32), entries
        run = lambda q, pages, hi: sparse_attention.range_attention(q, pages, jnp.zeros_like(hi), hi, scale)  # noqa: E731
    ranged = (jnp.zeros_like(choice), choice)
    visible = _visible(kind, (choice,) if kind == "gather" else ranged, entries, slice(None))
    wanted = _exact(q, kv, visible, scale)
    per_entry = sum(x.nbytes for x in pages.store.values()) / (rows * pages.capacity)
    moved = rows * seen * per_entry + 2 * q.nbytes
    check = lambda found: error(found[0], wanted)  # noqa: E731
    return Operation(name, (q, pages, choice), run, 4.0 * rows * heads * width * seen, moved, check)


def _paged_index(config: DeepseekV4Config, entries: int, rows: int, draw: Draw) -> Operation:
    heads, width, k = config.index_n_heads, config.index_head_dim, config.index_topk
    storage = cache_format(config, "deployed").index
    pages, keys = _pages(storage, draw, rows, entries, width)
    queries, weights = draw(rows, 1, heads, width), draw(rows, 1, heads).astype(jnp.float32)
    queries = storage.decode(storage.encode(queries), queries.dtype)  # as the indexer rounds them
    hi = jnp.full((rows, 1), entries, jnp.int32)
    run = lambda q, pages, w, hi: indexer_topk.index_topk(  # noqa: E731
        PagedOperands(q, pages, w), jnp.zeros_like(hi), hi, k
    )
    scores = _exact_scores(queries, keys, weights)
    moved = float(sum(x.nbytes for x in pages.store.values()) + queries.nbytes)
    flops = 2.0 * rows * entries * heads * (width + 1)
    check = lambda found: _lost(found, scores)  # noqa: E731
    return Operation("index scores and top-k, decode", (queries, pages, weights, hi), run, flops, moved, check)


def _pages(
    storage: Storage, draw: Draw, rows: int, entries: int, width: int, per_block: int = 32
) -> tuple[Pages, jax.Array]:
    """Pages of random entries, in as many blocks as they need and as a cache keeps them, and the entries as stored."""
    pool, columns = pool_of(storage, per_block, in_words=compiled_for() == "tpu"), -(-entries // per_block)
    tables = jnp.arange(rows * columns, dtype=jnp.int32).reshape(rows, columns)
    empty = Pages(pool.zeros(1, rows * columns), jnp.int32(0), tables, pool, own_blocks=True)
    values, index = draw(rows, entries, width), jnp.arange(entries, dtype=jnp.int32)
    pages = empty.write(jnp.broadcast_to(index, (rows, entries)), values)
    return pages, storage.decode(storage.encode(values), jnp.float32)


def _some(queries: int) -> slice:
    """The queries whose results are checked."""
    return slice(max(queries - 4, 0), queries)


def _visible(kind: str, choice: tuple[jax.Array, ...], entries: int, part: slice) -> np.ndarray:
    """[B, Q, T] of the checked queries."""
    chosen = [np.asarray(x)[:, part] for x in choice]
    index = np.arange(entries)
    if kind == "range":
        return (index >= chosen[0][..., None]) & (index < chosen[1][..., None])
    seen = np.zeros((*chosen[0].shape[:2], entries), bool)
    np.put_along_axis(seen, chosen[0], True, axis=-1)
    return seen


def _weights(q: np.ndarray, kv: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    scores = np.where(visible[:, :, None], np.einsum("bqhk,bnk->bqhn", q, kv) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _exact(q: jax.Array, kv: jax.Array, visible: np.ndarray, scale: float) -> np.ndarray:
    """The attention in float64."""
    q64, kv64 = wide(q), wide(kv)
    return np.einsum("bqhn,bnk->bqhk", _weights(q64, kv64, visible, scale), kv64)


def _exact_gradients(
    q: jax.Array, kv: jax.Array, visible: np.ndarray, scale: float, d_out: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of these queries, and what they add to those of the entries, in float64."""
    q64, kv64, d64 = wide(q), wide(kv), wide(d_out)
    weights = _weights(q64, kv64, visible, scale)
    d_weights = np.einsum("bqhk,bnk->bqhn", d64, kv64)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_kv = np.einsum("bqhn,bqhk->bnk", d_scores, q64) + np.einsum("bqhn,bqhk->bnk", weights, d64)
    return np.einsum("bqhn,bnk->bqhk", d_scores, kv64), d_kv


def _exact_scores(queries: jax.Array, keys: jax.Array, weights: jax.Array) -> np.ndarray:
    products = np.maximum(np.einsum("bqhd,bnd->bqhn", wide(queries), wide(keys)), 0)
    return np.einsum("bqhn,bqh->bqn", products, wide(weights))


def _exact_loss(given: tuple[Any, ...], part: slice, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The divergence of these queries and its gradients by index queries and weights, in float64."""
    operands, q, kv, lse, choice = given
    chosen = np.asarray(choice)[:, part]
    at = np.arange(len(chosen))[:, None, None], chosen
    logits = scale * np.einsum("bqhk,bqnk->bqhn", wide(q[:, part]), wide(kv)[at])
    p = np.exp(logits - wide(lse[:, part])[..., None]).sum(2)
    p /= p.sum(-1, keepdims=True)
    keys, weights = wide(operands.keys)[at], wide(operands.weights[:, part])
    products = np.einsum("bqhd,bqnd->bqhn", wide(operands.queries[:, part]), keys)
    scores = np.einsum("bqhn,bqh->bqn", np.maximum(products, 0), weights)
    scores -= scores.max(-1, keepdims=True)
    log_q = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    d_scores = (np.exp(log_q) - p)[:, :, None]
    d_queries = np.einsum("bqhn,bqnd->bqhd", (products > 0) * d_scores, keys) * weights[..., None]
    return (p * (np.log(p) - log_q)).sum(-1), d_queries, (np.maximum(products, 0) * d_scores).sum(-1)


def _lost(chosen: Any, scores: np.ndarray) -> float:
    """How far the worst chosen score lies below the true k-th best, relative to the largest score."""
    chosen = np.asarray(chosen)
    best = -np.sort(-scores, -1)[..., : chosen.shape[-1]]
    if (chosen < 0).any() or any(len(set(row)) < len(row) for row in chosen.reshape(-1, chosen.shape[-1]).tolist()):
        return np.inf
    worst = np.take_along_axis(scores, chosen, -1).min(-1)
    return float(((best[..., -1] - worst) / np.abs(best).max()).max())
