"""Index scores, the top-k of them, and the loss that teaches them."""

import jax

from dsv4_jax.kernels.indexer_topk import paged, xla
from dsv4_jax.kernels.indexer_topk.kl import IndexLoss, index_loss
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands, PagedOperands

__all__ = ["IndexLoss", "IndexOperands", "PagedOperands", "index_loss", "index_topk"]


def index_topk(operands: IndexOperands | PagedOperands, lo: jax.Array, hi: jax.Array, k: int) -> jax.Array:
    """The best k entries lo <= i < hi of each query [B, S, k], best first; see `xla.index_topk`.

    The keys are a row's, [B, T, di], or in the pages of a cache, where sequences begin at entry 0.
    """
    if isinstance(operands, PagedOperands):
        return paged.index_topk(*operands, hi, min(k, operands.pages.capacity))
    return xla.index_topk(operands, lo, hi, k)
