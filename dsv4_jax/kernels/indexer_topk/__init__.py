"""Index scores, the top-k of them, and the loss that teaches them."""

from dsv4_jax.kernels.indexer_topk.kl import IndexLoss, index_loss
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.indexer_topk.xla import index_topk

__all__ = ["IndexLoss", "IndexOperands", "index_loss", "index_topk"]
