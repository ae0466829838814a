"""What training minimises: next token, the token after next, balanced experts, and an indexer that follows attention.

Sources: DeepSeek-V4 report 4.2.2, DeepSeek-V3 report 2.1.2 and 2.2 (balance, MTP), V3.2 report eq. 3-4 (indexer).
Shapes: N tokens, D hidden size, V vocabulary, B rows, S tokens a row, E experts, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import model
from dsv4_jax.config import CSA, DeepseekV4Config
from dsv4_jax.kernels.indexer_topk import IndexLoss
from dsv4_jax.layer_plan import MLA_SPARSE
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.partition import ALONE, Partition

Batch = dict[str, jax.Array]
Parts = dict[str, jax.Array]

# Logits held at once, so that a chunk stays in a CPU's outer cache; see `chunk_rows` for wide models.
LOGIT_ELEMENTS = 1 << 21


@jax.custom_vjp
def chunked_cross_entropy(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum of cross-entropies in nats, without ever holding [N, V] logits.

    When differentiated, each chunk's logits are turned into gradients at once, so that the backward pass recomputes
    nothing: three matrix products in all. `weights` are data and get no gradient.

    Args:
        hidden: [N, D], the compute dtype.
        matrix: [D, V], multiplied in hidden's dtype with float32 accumulation.
        targets: int32 [N].
        weights: float32 [N]; tokens of weight 0 are padding.

    Returns:
        float32 scalar, the sum of `weights * cross-entropy`.
    """
    narrow = matrix.astype(hidden.dtype)

    def chunk(total: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _chunk_loss(rows[0], narrow, *rows[1:])[0], None

    chunks = _chunks(matrix.shape[1], hidden, targets, weights)
    return jax.lax.scan(chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _cross_entropy_fwd(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array):
    narrow = matrix.astype(hidden.dtype)

    def chunk(carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]):
        total, d_matrix = carry
        loss, d_logits = _chunk_loss(rows[0], narrow, *rows[1:])
        d_logits = d_logits.astype(hidden.dtype)
        d_rows = jnp.einsum("nv,dv->nd", d_logits, narrow, preferred_element_type=jnp.float32)
        d_matrix += jnp.einsum("nd,nv->dv", rows[0], d_logits, preferred_element_type=jnp.float32)
        return (total + loss, d_matrix), d_rows.astype(hidden.dtype)

    chunks = _chunks(matrix.shape[1], hidden, targets, weights)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(matrix.shape, jnp.float32))
    (total, d_matrix), d_hidden = jax.lax.scan(chunk, start, chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (d_hidden, d_matrix.astype(matrix.dtype))


def _cross_entropy_bwd(saved: tuple[jax.Array, jax.Array], d_total: jax.Array):
    d_hidden, d_matrix = (gradient * d_total.astype(gradient.dtype) for gradient in saved)
    return d_hidden, d_matrix, None, None


chunked_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunk_loss(rows: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array):
    """The loss of one chunk and the gradient of its logits [n, V], float32."""
    logits = jnp.dot(rows, matrix, preferred_element_type=jnp.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    exponent = jnp.exp(shifted)
    norm = exponent.sum(-1, keepdims=True)
    at_target = jnp.take_along_axis(shifted, targets[:, None], axis=1)
    loss = ((jnp.log(norm) - at_target)[:, 0] * weights).sum()
    is_target = jnp.arange(matrix.shape[1]) == targets[:, None]
    return loss, (exponent / norm - is_target) * weights[:, None]


def chunk_rows(vocab: int, width: int) -> int:
    """Tokens per chunk: LOGIT_ELEMENTS of logits, but no fewer than the matrix is wide.

    Every chunk adds to the matrix's gradient [D, V]; with D rows or more its logits are at least as large as that.
    """
    return max(LOGIT_ELEMENTS // vocab, width)


def _chunks(vocab: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [N, ...] as [chunks, n, ...], padded with zeros (so with weight 0); chunks of even size."""
    tokens = arrays[0].shape[0]
    count = -(-tokens // chunk_rows(vocab, arrays[0].shape[1]))
    size = -(-tokens // count)
    pad = lambda x: jnp.pad(x, [(0, count * size - tokens)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
    return tuple(pad(x).reshape(count, size, *x.shape[1:]) for x in arrays)


def shifted_targets(
    tokens: jax.Array, segment_ids: jax.Array, shift: int, loss_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """For each position t the token t + shift, and weight 1 where all of t .. t + shift are in one document.

    tokens, segment_ids int32 [B, S] -> (targets int32 [B, S], weights float32 [B, S]). Padding (id 0) has weight 0, and
    so have targets where `loss_mask` [B, S] is 0.
    """
    ahead = lambda x, by: jnp.pad(x[:, by:], ((0, 0), (0, by)))  # noqa: E731
    inside = segment_ids != 0
    for by in range(1, shift + 1):
        inside &= ahead(segment_ids, by) == segment_ids
    if loss_mask is not None:
        inside &= ahead(loss_mask, shift) != 0
    return ahead(tokens, shift), inside.astype(jnp.float32)


@dataclass(frozen=True)
class Objective:
    """What one kind of stage trains.

    Attributes:
        attention: which entries CSA layers attend.
        index_loss: whether the indexer's loss is computed.
        language: whether next token, MTP and balance are; without it only the indexers train.
    """

    attention: Literal["dense", "sparse"]
    index_loss: bool
    language: bool


OBJECTIVES = {
    "dense": Objective("dense", index_loss=False, language=True),
    "indexer_warmup": Objective("dense", index_loss=True, language=False),
    "sparse": Objective("sparse", index_loss=True, language=True),
}


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses beside the next token's, and the speed of the router biases (report 4.2.2).

    Attributes:
        mtp: of the token after next, until the learning rate starts to decay.
        mtp_decayed: from then on.
        balance: of the sequence-wise balance loss.
        index: of the indexers' KL; its scale hardly matters to Muon and Adam, but clipping sees it.
        bias_speed: step of the router biases after each batch.
    """

    mtp: float = 0.3
    mtp_decayed: float = 0.1
    balance: float = 1e-4
    index: float = 1.0
    bias_speed: float = 1e-3


class Totals(NamedTuple):
    """What a batch divides its losses by: counted targets; of each indexer the tokens of text that see an entry."""

    ce: jax.Array
    mtp: jax.Array
    index: tuple[jax.Array, ...]


def batch_totals(config: DeepseekV4Config, batch: Batch) -> Totals:
    """The totals of a whole batch [B, S], known before any microbatch of it is computed."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    ce, mtp = (shifted_targets(tokens, segment_ids, shift, batch.get("loss_mask"))[1].sum() for shift in (1, 2))
    blocks = make_layout(config, tokens.shape[0], tokens.shape[1], segment_ids).blocks
    specs, text = _blocks_run(config), segment_ids != 0
    ratios = [
        spec.ratio
        for spec in specs
        if (spec.attention == CSA and spec.compression in blocks) or spec.attention == MLA_SPARSE
    ]
    chosen = {ratio: blocks[CSA, ratio] for ratio in set(ratios) - {0}}
    seeing = {ratio: text & (found.hi > found.lo) for ratio, found in chosen.items()}
    seeing[0] = text  # where nothing is compressed, every token sees itself
    return Totals(ce, mtp, tuple(seeing[ratio].sum().astype(jnp.float32) for ratio in ratios))


def training_loss(
    config: DeepseekV4Config,
    params: model.Params,
    batch: Batch,
    totals: Totals,
    objective: Objective,
    weights: LossWeights,
    mtp_weight: jax.Array | float,
    forward: Callable[..., model.Output] = model.forward,
    share: float = 1.0,
    partition: Partition = ALONE,
) -> tuple[jax.Array, Parts]:
    """The loss of one microbatch, as its part of the whole batch's: the parts of all microbatches add up.

    loss = CE + mtp_weight * MTP + balance * mean over learned-routing blocks + index * mean over CSA blocks of the KL.
    CE and MTP are means over the counted targets, the KL over the tokens of text that see an entry, of the whole batch.

    Args:
        config: the architecture.
        params: all parameters, buffers included.
        batch: "tokens" and "segment_ids" int32 [B, S] (0 is padding); with "loss_mask" int32 [B, S] only
            tokens where it is not 0 are targets of the next-token and MTP losses.
        totals: `batch_totals` of the whole batch.
        objective: what this stage trains; what it does not train is not computed.
        weights: of the losses.
        mtp_weight: of the MTP loss at this step.
        forward: `model.forward`, possibly with dtype, rematerialisation and policy filled in.
        share: this microbatch's share of the batch's rows, for the balance loss (a mean over rows).
        partition: how tokens lie on devices.

    Returns:
        (loss, parts): float32 scalars "ce", "mtp", "balance", "index_kl", "index_recall" where computed; "load" [L, E],
        pairs per expert; "hc_errors" [2], the largest of this microbatch.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    mtp = bool(config.mtp_layers) and (objective.language or config.mtp_layers[0].attention == CSA)
    out = forward(
        config,
        params,
        tokens,
        segment_ids=segment_ids,
        attention=objective.attention,
        index_loss=objective.index_loss,
        logits=False,
        mtp=mtp,
        partition=partition,
    )
    parts: Parts = {
        "load": jnp.stack([layer["load"] for layer in out.layers]),
        "hc_errors": jnp.stack([layer["hc_errors"] for layer in out.layers]).max(0),
    }
    loss = jnp.zeros((), jnp.float32)
    if objective.language:
        mean_ce = partial(_mean_cross_entropy, partition, model.output_matrix(params), batch)
        parts["ce"] = mean_ce(out.hidden, 1, totals.ce)
        loss += parts["ce"]
        if out.mtp_hidden is not None:
            parts["mtp"] = mean_ce(out.mtp_hidden, 2, totals.mtp)
            loss += mtp_weight * parts["mtp"]
        if learned := learned_blocks(config):
            parts["balance"] = share * jnp.stack([out.layers[i]["balance"] for i in learned]).mean()
            loss += weights.balance * parts["balance"]
    if indexed := index_losses(out, segment_ids):
        parts["index_kl"] = _mean_over(indexed, "kl", totals.index)
        parts["index_recall"] = _mean_over(indexed, "recall", totals.index)
        loss += weights.index * parts["index_kl"]
    return loss, parts


def index_losses(out: model.Output, segment_ids: jax.Array) -> list[IndexLoss]:
    """The indexers' losses of a forward, in order of the blocks; what is no text (segment 0) does not count in them.

    To the layers padding is one more document, whose tokens see entries of their own.
    """
    found = [layer["index_loss"] for layer in out.layers if "index_loss" in layer]
    return [loss._replace(counts=loss.counts & (segment_ids != 0)) for loss in found]


def learned_blocks(config: DeepseekV4Config) -> list[int]:
    """Which of a forward's blocks (the MTP block last) route by learning."""
    return [i for i, layer in enumerate(_blocks_run(config)) if layer.routing == "moe"]


def _blocks_run(config: DeepseekV4Config) -> tuple[Any, ...]:
    return config.layers + config.mtp_layers[:1]


def _mean_cross_entropy(
    partition: Partition,
    matrix: jax.Array,
    batch: Batch,
    hidden: jax.Array,
    shift: int,
    total: jax.Array,
) -> jax.Array:
    with jax.named_scope("cross_entropy"):
        targets, counted = shifted_targets(batch["tokens"], batch["segment_ids"], shift, batch.get("loss_mask"))
        sums = lambda matrix, hidden, *rest: chunked_cross_entropy(hidden, matrix, *rest)  # noqa: E731
        return partition.token_sums(sums, matrix, hidden, targets, counted) / jnp.maximum(total, 1)


def _mean_over(losses: list[IndexLoss], field: str, totals: tuple[jax.Array, ...]) -> jax.Array:
    """Mean over CSA blocks of the mean over the tokens that count."""
    sums = [jnp.where(loss.counts, getattr(loss, field), 0.0).sum() for loss in losses]
    return jnp.stack([s / jnp.maximum(t, 1) for s, t in zip(sums, totals, strict=True)]).mean()
