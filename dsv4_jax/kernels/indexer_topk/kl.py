"""The loss that teaches the indexer: KL from the attention's own distribution to the index scores'."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk import gpu_loss, tpu_loss, xla_loss
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.indexer_topk.xla_loss import mass_of
from dsv4_jax.kernels.platforms import by_platform, kernels_allowed

ENTRY_TILE = 2048


class IndexLoss(NamedTuple):
    """Per token [B, S]: the divergence, the share of attention mass on the chosen entries, and whether it counts.

    A token without a visible entry does not count; its other values are 0.
    """

    kl: jax.Array
    recall: jax.Array
    counts: jax.Array


def index_loss(
    operands: IndexOperands, q: jax.Array, entries: jax.Array, lse: jax.Array, choice: jax.Array, scale: float, k: int
) -> IndexLoss:
    """KL(p || softmax(index scores)) per token; only `operands` receive a gradient.

    p is the attention's probability of each compressed entry under the layer's JOINT softmax (window, entries and sink
    share its log-sum-exp), summed over heads, then normalised over the entries compared.

    Args:
        operands: of the index scores; the only differentiated argument.
        q: attention queries [B, S, H, K].
        entries: compressed entries [B, T, K].
        lse: joint log-sum-exp [B, S, H] of the layer's attention.
        choice: chosen indices [B, S, k] (-1 unused, others once), to compare over these entries (`recall` is then 1),
            or bounds [B, S, 2] (lo, hi) to compare over all visible ones.
        scale: factor of the attention scores.
        k: top-k whose recall is measured in the dense case; 0 when `choice` holds chosen indices.
    """
    q, entries, lse = jax.lax.stop_gradient((q, entries, lse))
    if k:
        return _over_visible(operands, q, entries, lse, choice, scale, k)
    return _over_chosen(operands, q, entries, lse, choice, scale)


def _over_chosen(operands, q, entries, lse, choice, scale) -> IndexLoss:
    """The loss over chosen entries; besides theirs, nothing of its backward pass is kept that can be had again."""
    mass, scores = _compared(operands, q, entries, lse, choice, scale, kernels_allowed())  # type: ignore[misc]
    return jax.checkpoint(_divergence, static_argnums=3)(mass, scores, choice >= 0, 0)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _compared(operands, q, entries, lse, choice, scale, kernels) -> Any:
    """Attention mass and index scores of chosen entries, [B, S, k] both; see `xla_loss.forward`."""
    backends = _kernels(operands, q, entries, kernels)
    taking = {name: partial(_forward, backend, scale) for name, backend in backends.items()}
    return by_platform(*operands, q, entries, lse, choice, xla=partial(_forward, xla_loss, scale), **taking)


def _compared_fwd(operands, q, entries, lse, choice, scale, kernels):
    return _compared(operands, q, entries, lse, choice, scale, kernels), (operands, q, entries, lse, choice)


def _compared_bwd(scale, kernels, saved, cotangents):
    operands, q, entries, lse, choice = saved
    taking = {name: partial(_backward, x) for name, x in _kernels(operands, q, entries, kernels).items()}
    gradients = by_platform(*operands, choice, cotangents[1], xla=partial(_backward, xla_loss), **taking)
    return IndexOperands(*gradients), None, None, None, None  # the loss detaches the attention


_compared.defvjp(_compared_fwd, _compared_bwd)


def _kernels(operands, q, entries, allowed) -> dict[str, Any]:
    """The backends that take these operands, by platform."""
    backends = {"tpu": tpu_loss, "gpu": gpu_loss}
    return {name: x for name, x in backends.items() if allowed and x.supports(operands, q, entries)}


def _forward(backend, scale, queries, keys, weights, q, entries, lse, choice):
    return backend.forward(IndexOperands(queries, keys, weights), q, entries, lse, choice, scale)


def _backward(backend, queries, keys, weights, choice, d_scores):
    return backend.backward(IndexOperands(queries, keys, weights), choice, d_scores)


def _over_visible(operands, q, entries, lse, bounds, scale, k) -> IndexLoss:
    """The loss over visible entries: chunks of queries over tiles of entries; only in a tile are heads apart.

    A chunk keeps two numbers for each of its queries' entries. The backward pass computes every tile again.
    """
    batch, length, heads, _ = q.shape
    count = entries.shape[1]
    tile = min(ENTRY_TILE, count)
    tiles = split((operands.keys, entries), tile)  # each [tiles, B, tile, ..]
    chunk = chunk_length(length, batch * (count + tile * max(heads, operands.weights.shape[-1])))

    @jax.checkpoint
    def one(args: tuple[jax.Array, ...]) -> IndexLoss:
        q, lse, bounds, queries, weights = args

        def seen_of(index: jax.Array) -> jax.Array:
            return (index >= bounds[..., :1]) & (index < jnp.minimum(bounds[..., 1:], count))

        @jax.checkpoint
        def step(first: jax.Array, rows: tuple[jax.Array, jax.Array]):
            keys, entries = rows
            mass = mass_of(q, entries, lse, seen_of(first + jnp.arange(tile, dtype=jnp.int32)), scale)
            return first + tile, (mass, IndexOperands(queries, keys, weights).scores())

        _, found = jax.lax.scan(step, jnp.int32(0), tiles)
        mass, scores = (jnp.moveaxis(x, 0, 2).reshape(*lse.shape[:2], -1) for x in found)  # [B, chunk, T]
        return _divergence(mass, scores, seen_of(jnp.arange(mass.shape[-1], dtype=jnp.int32)), k)

    chunks = split((q, lse, bounds, operands.queries, operands.weights), chunk)
    return join(jax.lax.map(one, chunks), length)


def _divergence(mass, scores, seen, k) -> IndexLoss:
    counts = seen.any(-1)
    p = mass / jnp.where(counts, mass.sum(-1), 1.0)[..., None]
    scores = jnp.where(seen, scores, -1e30)
    log_q = jnp.where(seen, jax.nn.log_softmax(scores, axis=-1), 0.0)
    kl = jnp.where(counts, (jax.scipy.special.xlogy(p, p) - p * log_q).sum(-1), 0.0)
    return IndexLoss(kl, _recall(p, jax.lax.stop_gradient(scores), k) if k else counts.astype(jnp.float32), counts)


def _recall(p: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """Attention mass of the entries that the top k of the scores would choose."""
    _, chosen = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.take_along_axis(p, chosen, axis=-1).sum(-1)
