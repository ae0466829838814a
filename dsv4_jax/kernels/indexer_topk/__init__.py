"""Index scores, the top-k of them, and the loss that teaches them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.indexer_topk import gpu, gpu_blackwell, gpu_paged, paged, tpu, tpu_few, xla
from dsv4_jax.kernels.indexer_topk.kl import IndexLoss, index_loss
from dsv4_jax.kernels.indexer_topk.operands import CANDIDATES, EXACT, IndexOperands, PagedOperands, Search
from dsv4_jax.kernels.laid_out import MANY, over_rows, rows_of
from dsv4_jax.kernels.platforms import by_platform

__all__ = ["CANDIDATES", "IndexLoss", "IndexOperands", "PagedOperands", "Search", "index_loss", "index_topk"]


def index_topk(
    operands: IndexOperands | PagedOperands, lo: jax.Array, hi: jax.Array, k: int, search: Search = EXACT
) -> jax.Array:
    """The best k entries lo <= i < hi of each query; no gradient passes.

    Args:
        operands: of the index scores. The keys are a row's, [B, T, di], or in the pages of a cache, where sequences
            begin at entry 0.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.
        search: exact or not; static.

    Returns:
        int32 [B, S, min(k, T)], -1 where fewer are visible. Of equal scores the earlier entry is the better. The order
        is the backend's: best first in XLA, by position from the kernels, in eight parts of the keys where a sequence
        decodes on a TPU.
    """
    if isinstance(operands, PagedOperands):
        return _over_pages(operands, hi, min(k, operands.pages.capacity), search)
    # The barrier ties the bounds to the operands. By themselves they are the same in every layer of a scan, and its
    # differentiation would compute their masks, queries x entries, before the loop and keep them.
    arrays = jax.lax.optimization_barrier(jax.lax.stop_gradient((*operands, lo, hi)))
    on_tpu = partial(_over, tpu.index_topk, k, search) if tpu.supports(operands) else None
    on_gpu = partial(_over, gpu.index_topk, k, search) if gpu.supports(operands, k) else None
    return by_platform(*arrays, xla=partial(_over, xla.index_topk, k, search), tpu=on_tpu, gpu=on_gpu)


def _over_pages(operands: PagedOperands, hi: jax.Array, k: int, search: Search) -> jax.Array:
    choose = {"k": k, "search": search}
    kernels: dict[str, Callable[..., jax.Array]] = {}
    rows = IndexOperands(operands.queries, rows_of(operands.queries, operands.pages, 1), operands.weights)
    for backend in (tpu, tpu_few):
        if backend.supports(rows):
            kernels["tpu"] = partial(_over_rows, backend.index_topk, k, search)
    if operands.queries.shape[1] >= MANY and gpu.supports(rows, k):
        kernels["gpu"] = partial(_over_rows, gpu.index_topk, k, search)
    for reading in (gpu_blackwell, gpu_paged):
        if reading.supports(operands, k):
            kernels["gpu"] = partial(reading.index_topk, **choose)
    return by_platform(*operands, hi, xla=partial(paged.index_topk, **choose), **kernels)


def _over_rows(backend, k, search, queries, pages, weights, hi) -> jax.Array:
    def choose(keys: jax.Array, queries: jax.Array, weights: jax.Array, hi: jax.Array) -> jax.Array:
        return backend(IndexOperands(queries, keys, weights), jnp.zeros_like(hi), hi, k, search)

    return over_rows(choose, pages, hi.max(1), queries, weights, hi)


def _over(backend, k, search, queries, keys, weights, lo, hi) -> jax.Array:
    return backend(IndexOperands(queries, keys, weights), lo, hi, k, search)
