"""The lightning indexer: cheap scores that choose which compressed entries a query attends (report 2.3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels.indexer_topk import IndexOperands, PagedOperands
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.kv_cache import LayerCache
from dsv4_jax.layers.layout import NOBODY, Blocks, Neighbours
from dsv4_jax.layers.norm import dense
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.layers.rotary import Rotation, rotate
from dsv4_jax.quantization.policy import Policy


class Indexer(nnx.Module):
    """Makes the operands of the index scores: queries, keys and head weights."""

    def __init__(self, config: DeepseekV4Config, ratio: int, rngs: nnx.Rngs):
        """Parameters wq_b [rq, Hi*di], weights_proj [D, Hi] and a compressor of width di."""
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        shape = (config.q_lora_rank, self.heads * self.width)
        self.wq_b = parameter(normal(rngs, shape, config), ("q_lora", "index_heads"), "muon", "indexer")
        shape = (config.hidden_size, self.heads)
        self.weights_proj = parameter(normal(rngs, shape, config), ("embed", "index_heads"), "muon", "indexer")
        self.compressor = Compressor(config, ratio, self.width, overlap=True, role="indexer", rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        qr: jax.Array,
        rope: Rotation,
        blocks: Blocks,
        policy: Policy,
        neighbours: Neighbours = NOBODY,
    ) -> IndexOperands:
        """Operands from the layer input x [B, S, D] and the query latent qr [B, S, rq]; keys are those of whole rows.

        Both are detached: the indexer learns from its own loss, and its loss trains only the indexer.
        """
        x, qr = jax.lax.stop_gradient((x, qr))
        queries, weights = self._queries(x, qr, rope)
        keys = policy("index_k", hadamard(self.compressor(x, blocks, neighbours)))
        return IndexOperands(policy("index_q", queries), neighbours.gather(keys, blocks), weights)

    def extend(
        self, x: jax.Array, qr: jax.Array, rope: Rotation, blocks: Blocks, policy: Policy, past: LayerCache
    ) -> tuple[PagedOperands, LayerCache]:
        """The same with a cache: the keys are all of the sequence's, new ones included."""
        assert past.index_tail is not None and past.index_pages is not None and blocks.places is not None
        queries, weights = self._queries(x, qr, rope)
        keys, tail = self.compressor.extend(x, past.index_tail, blocks)
        storage = past.index_pages.storage
        pages = past.index_pages.write(blocks.places, policy("index_k", hadamard(keys)))
        # Queries are rounded as keys are: a score is a product of two FP4 vectors in the deployed format.
        queries = storage.decode(storage.encode(policy("index_q", queries)), queries.dtype)
        return PagedOperands(queries, pages, weights), past._replace(index_tail=tail, index_pages=pages)

    def _queries(self, x: jax.Array, qr: jax.Array, rope: Rotation) -> tuple[jax.Array, jax.Array]:
        """Queries [B, S, Hi, di] and head weights [B, S, Hi], scales included."""
        queries = dense(qr, self.wq_b[...]).reshape(*qr.shape[:-1], self.heads, self.width)
        queries = hadamard(rotate(queries, Rotation(*(a[..., None, :] for a in rope))))
        weights = dense(x, self.weights_proj[...], jnp.float32) * (self.width**-0.5 * self.heads**-0.5)
        return queries, weights


def hadamard(x: jax.Array) -> jax.Array:
    """The normalised Walsh-Hadamard rotation of the last axis; spreads outliers before FP4 rounding.

    Sizes that are not a power of two are rotated in blocks of their largest power-of-two factor.
    """
    size = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = jnp.dot(blocks, (matrix / np.sqrt(size)).astype(x.dtype), preferred_element_type=jnp.float32)
    return turned.astype(x.dtype).reshape(x.shape)
