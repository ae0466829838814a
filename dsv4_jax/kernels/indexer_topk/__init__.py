"""Index scores, the top-k of them, and the loss that teaches them."""

import jax

from dsv4_jax.kernels.indexer_topk import paged, xla
from dsv4_jax.kernels.indexer_topk.kl import IndexLoss, index_loss
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.pages import Pages

__all__ = ["IndexLoss", "IndexOperands", "index_loss", "index_topk"]


def index_topk(operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int) -> jax.Array:
    """The best k entries lo <= i < hi of each query [B, S, k], best first; see `xla.index_topk`.

    The keys are a row's, [B, T, di], or the pages of a cache, where sequences begin at entry 0.
    """
    if isinstance(operands.keys, Pages):
        return paged.index_topk(operands.queries, operands.weights, operands.keys, hi, min(k, operands.keys.capacity))
    return xla.index_topk(operands, lo, hi, k)
