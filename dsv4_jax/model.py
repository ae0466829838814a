"""DeepSeek-V4, whole: embedding, blocks on n residual streams, head, and the multi-token-prediction module.

Read it top to bottom; the layers it names are one file each in `layers/`. What the letters of shapes and words like
"head read" and "record" mean is in `layers/__init__.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.layers.attention import Attention, AttentionOptions, Mode
from dsv4_jax.layers.baseline_attention import BASELINE_LAYERS
from dsv4_jax.layers.hyper_connections import HyperConnection, HyperHead, enter, leave, stochastic_errors
from dsv4_jax.layers.kv_cache import Cache, LayerCache, split_layer
from dsv4_jax.layers.layout import Past, make_cached_layout, make_layout
from dsv4_jax.layers.moe import MoE
from dsv4_jax.layers.norm import dense, rms_norm
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.observer import NOBODY, Observer, Passed
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization import policy as precision
from dsv4_jax.segments import STREAMS, Batch, Options, Params, Record, check_expert_ids, run_segment, trimmed


class Block(nnx.Module):
    """mHC-read, norm, attention, mHC-write; then the same around the mixture of experts."""

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """One block of kind `spec`."""
        self.eps = config.rms_norm_eps
        self.hc_attn = HyperConnection(config, rngs)
        self.attn_norm = parameter(jnp.ones(config.hidden_size), ("embed",), "adamw", "norm")
        self.attn = BASELINE_LAYERS.get(spec.attention, Attention)(config, spec, rngs)
        self.hc_ffn = HyperConnection(config, rngs)
        self.ffn_norm = parameter(jnp.ones(config.hidden_size), ("embed",), "adamw", "norm")
        self.ffn = MoE(config, spec.routing, rngs)

    def __call__(self, streams: jax.Array, batch: Batch, options: Options, past: LayerCache | None = None):
        """streams [B, S, n, D] -> (streams, record of this block, what its attention remembers)."""
        with jax.named_scope("attention"):
            maps = self.hc_attn(streams, options.partition)
            x = rms_norm(enter(streams, maps.pre, options.partition), self.attn_norm[...], self.eps)
            attn_out, seen, past = options.partition.attention(self.attn, x, batch.layout, options.attention, past)
            streams = leave(streams, attn_out, maps, options.partition)
        with jax.named_scope("moe"):
            ffn_maps = self.hc_ffn(streams, options.partition)
            x = rms_norm(enter(streams, ffn_maps.pre, options.partition), self.ffn_norm[...], self.eps)
            given = batch.tokens, batch.counted, batch.expert_ids
            mlp_out, routed = self.ffn(x, *given, options.partition, options.attention.policy)
            streams = leave(streams, mlp_out, ffn_maps, options.partition)
        errors = jnp.maximum(jnp.stack(stochastic_errors(maps.comb)), jnp.stack(stochastic_errors(ffn_maps.comb)))
        record = {"load": routed["load"], "balance": routed["balance"], "hc_errors": errors}
        record |= {"index_loss": seen["index_loss"]} if "index_loss" in seen else {}
        if options.record:
            record |= {"layer_out": streams, "attn_out": attn_out, "mlp_out": mlp_out}
            record |= {name: value for name, value in (routed | seen).items() if name in ("expert_ids", "selected")}
        passed = Passed(self.ffn, x, routed["routing"], (maps, ffn_maps), seen, options)
        return streams, record | options.attention.observer.block(passed), past


class MultiTokenPrediction(nnx.Module):
    """One more block that predicts the token after next, from the streams and the next token's embedding."""

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """A block with its input projections, norms and head read."""
        c = self.config = config
        self.e_proj = parameter(normal(rngs, (c.hidden_size,) * 2, c), ("embed", "embed_out"), "muon", "mtp")
        self.h_proj = parameter(normal(rngs, (c.hidden_size,) * 2, c), ("embed", "embed_out"), "muon", "mtp")
        self.enorm = parameter(jnp.ones(c.hidden_size), ("embed",), "adamw", "norm")
        self.hnorm = parameter(jnp.ones(c.hidden_size), ("embed",), "adamw", "norm")
        self.block = Block(c, spec, rngs)
        self.hc_head = HyperHead(c, rngs)
        self.norm = parameter(jnp.ones(c.hidden_size), ("embed",), "adamw", "norm")

    def __call__(
        self,
        streams: jax.Array,
        next_embedding: jax.Array,
        batch: Batch,
        options: Options,
        past: LayerCache | None = None,
    ) -> tuple[jax.Array, Record, LayerCache | None]:
        """Streams [B, S, n, D] before the head read, next tokens' embeddings [B, S, D] -> ([B, S, D], record, past)."""
        eps, policy = self.config.rms_norm_eps, options.attention.policy
        embedded = dense(policy("mtp_input", rms_norm(next_embedding, self.enorm[...], eps)), self.e_proj[...])
        carried = dense(policy("mtp_input", rms_norm(streams, self.hnorm[...], eps)), self.h_proj[...])
        streams, record, past = self.block(embedded[..., None, :] + carried, batch, options, past)
        return rms_norm(self.hc_head(streams, options.partition), self.norm[...], eps), record, past


class Ends(nnx.Module):
    """What stands before and behind the blocks: embedding, head read, final norm, output matrix, MTP modules."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs):
        """The output matrix is absent when embeddings are tied."""
        c = config
        self.embed = parameter(normal(rngs, (c.vocab_size, c.hidden_size), c), ("vocab", "embed"), "adamw", "embed")
        self.hc_head = HyperHead(c, rngs)
        self.norm = parameter(jnp.ones(c.hidden_size), ("embed",), "adamw", "norm")
        if not c.tie_word_embeddings:
            self.head = parameter(normal(rngs, (c.hidden_size, c.vocab_size), c), ("embed", "vocab"), "adamw", "head")
        if c.mtp_layers:
            self.mtp = nnx.Dict({str(i): MultiTokenPrediction(c, spec, rngs) for i, spec in enumerate(c.mtp_layers)})


class Output(NamedTuple):
    """What a forward returns.

    logits: [B, S, V] float32, or None when not asked for.
    hidden: [B, S, D] in the compute dtype, normed: what the output matrix multiplies.
    mtp_hidden: the same of the MTP module, or None; position t predicts token t+2.
    layers: one record per block, the MTP block last when it ran: "load", "balance", "hc_errors", "index_loss".
    streams: [B, S, n, D] behind the last block: what the MTP module reads.
    cache: the given one with these tokens added, or None. A row that it has no room for comes out as NaN.
    """

    logits: jax.Array | None
    hidden: jax.Array
    mtp_hidden: jax.Array | None
    layers: list[Record]
    streams: jax.Array
    cache: Cache | None


def forward(
    config: DeepseekV4Config,
    params: Params,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    expert_ids: jax.Array | None = None,
    cache: Cache | None = None,
    counts: jax.Array | None = None,
    attention: Mode = "sparse",
    dtype: Any = None,
    logits: bool = True,
    mtp: bool = False,
    index_loss: bool = False,
    record: bool = False,
    keep_all: bool = False,
    remat: Literal["none", "block"] = "none",
    unroll: int | bool = 1,
    policy: precision.Policy = precision.NONE,
    partition: Partition = ALONE,
    observer: Observer = NOBODY,
) -> Output:
    """The whole model on tokens [B, S]; pure: jit, differentiate and vmap it freely.

    Args:
        config: the architecture; static, like every keyword but `segment_ids`, `expert_ids`, `cache` and `counts`.
        params: the tree of `init` or of a checkpoint.
        tokens: int32 [B, S].
        segment_ids: [B, S], documents as runs of equal ids in packed rows; 0 marks padding, which is not counted in the
            statistics. None: every row is one document. Padding is exact on either side.
        expert_ids: int32 [B, S, L, k], the experts that the L learned routers (the MTP block's last, if it runs) are
            to use instead of their own choice, weighted by their own scores; `segments.learned_choices` makes it.
        cache: what came before (see `init_cache`); `Output.cache` holds the tokens too. Rows without room are NaN.
        counts: with a cache, how many tokens of each row are real, [B]; the rest is padding behind them. Default: all.
        attention: "sparse" (the indexer chooses), "dense" (all visible entries), "approximate" (it chooses nearly).
        dtype: compute dtype; the parameters' own by default. mHC, routing and compressor pooling stay float32.
        logits: also multiply the output matrix (a loss in chunks does that itself).
        mtp: also run the MTP module.
        index_loss: also compute the indexers' loss.
        record: also return every block's streams, sublayer outputs and choices.
        keep_all: with a cache, do not decide yet how many tokens are real: `Output.cache` waits for `kv_cache.commit`.
        remat: "block" recomputes a unit of blocks in the backward pass instead of keeping its activations.
        unroll: how many units the layer loop unrolls (True: all).
        policy: rounding by tensor role.
        partition: how arrays lie on devices (`sharding/`); by default on one, or as the compiler finds best.
        observer: sees what the layers computed with and adds to their records (`analysis/trace.py`).

    Raises:
        ValueError: for a cache together with `segment_ids`, `mtp` or `index_loss`, and `expert_ids` of a wrong shape.
    """
    asked = AttentionOptions(attention, index_loss, policy, observer)
    options = Options(asked, record, keep_all, remat == "block", unroll, partition)
    if cache is not None and (mtp or index_loss or segment_ids is not None):
        raise ValueError("a cache holds one document a row, has no index loss, and its MTP module runs by forward_mtp")
    check_expert_ids(config, tokens, mtp and bool(config.mtp_layers), expert_ids)
    batch = _describe(config, tokens, segment_ids, cache, counts)._replace(expert_ids=expert_ids)
    ends = nnx.merge(_graph(config, None), {k: v for k, v in params.items() if k != "segments"})

    x = partition.look_up(ends.embed[...], tokens).astype(dtype or ends.embed.dtype)
    streams = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], config.hc_mult, x.shape[-1]))  # [B, S, n, D]
    streams = partition.constrain(streams, STREAMS)
    layers: list[Record] = []
    for i, segment in enumerate(config.segments):
        graphs = [_graph(config, spec) for spec in segment.unit]
        layer_params = params["segments"][str(i)]
        streams, records, cache = run_segment(config, i, graphs, layer_params, streams, batch, options, cache)
        layers += records
    hidden = rms_norm(ends.hc_head(streams, partition), ends.norm[...], config.rms_norm_eps)
    if cache is not None and batch.layout.past is not None:
        counts = batch.layout.past.counts
        hidden = jnp.where(cache.holds(counts)[:, None, None], hidden, jnp.nan)
        cache = cache if keep_all else replace(cache, lengths=cache.lengths + counts)

    mtp_hidden = None
    if mtp and config.mtp_layers:
        following = _next_in_document(x, segment_ids)
        with jax.named_scope("mtp"):
            own = batch._replace(expert_ids=None if expert_ids is None else expert_ids[:, :, -1])
            mtp_hidden, mtp_record, _ = ends.mtp["0"](streams, following, own, options)
        layers.append(mtp_record)
    return Output(output_logits(params, hidden) if logits else None, hidden, mtp_hidden, layers, streams, cache)


def forward_mtp(
    config: DeepseekV4Config,
    params: Params,
    streams: jax.Array,
    next_tokens: jax.Array,
    cache: Cache,
    lengths: jax.Array,
    counts: jax.Array,
    keep_all: bool = False,
    policy: precision.Policy = precision.NONE,
    partition: Partition = ALONE,
) -> tuple[jax.Array, Cache]:
    """The MTP module with a cache, behind a `forward` over the same tokens.

    Args:
        config: the architecture, with an MTP module.
        params: the parameters.
        streams: `Output.streams` of the tokens, [B, S, n, D].
        next_tokens: the token that follows each of them, [B, S].
        cache: the cache; only its "mtp" state is used.
        lengths: tokens before these, [B].
        counts: how many of these are real, [B].
        keep_all: as in `forward`.
        policy: as in `forward`.
        partition: as in `forward`.

    Returns:
        Normed hidden states [B, S, D], which predict the token after the next; and the cache with the new "mtp" state.
    """
    past = Past(lengths, counts)
    layout = make_cached_layout(config, streams.shape[1], past)
    batch = Batch(next_tokens, jnp.arange(streams.shape[1]) < counts[:, None], layout)
    options = Options(AttentionOptions("sparse", False, policy), False, keep_all, False, 1, partition)
    ends = nnx.merge(_graph(config, None), {k: v for k, v in params.items() if k != "segments"})
    state = jax.tree.map(lambda x: x[0], cache.states["mtp"])
    memory = cache.layer(config.mtp_layers[0], state, cache.pools["mtp"], jnp.int32(0))
    embedded = partition.look_up(ends.embed[...], next_tokens).astype(streams.dtype)
    hidden, _, memory = ends.mtp["0"](streams, embedded, batch, options, memory)
    state, pools = split_layer(memory)
    state = jax.tree.map(lambda x: x[None], trimmed(config, config.mtp_layers[0], state, batch, options))
    return hidden, replace(cache, states=cache.states | {"mtp": state}, pools=cache.pools | {"mtp": pools})


def output_matrix(params: Params) -> jax.Array:
    """[D, V]; the embedding's transpose when tied."""
    return params["head"] if "head" in params else params["embed"].T


def output_logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [.., V] float32 of normed hidden states [.., D]."""
    return dense(hidden, output_matrix(params), jnp.float32)


def _next_in_document(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The next token's x [B, S, D], zero at the end of each document."""
    following = jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segment_ids is None:
        return following
    continues = segment_ids == jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(continues[..., None], following, 0)


def _describe(
    config: DeepseekV4Config,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    counts: jax.Array | None,
) -> Batch:
    """The tokens [B, S], which of them count, and where their documents and entries lie."""
    rows, length = tokens.shape
    if cache is None:
        counted = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        return Batch(tokens, counted, make_layout(config, rows, length, segment_ids))
    counts = jnp.full(rows, length, jnp.int32) if counts is None else counts
    layout = make_cached_layout(config, length, Past(cache.lengths, counts, cache.sealed))
    return Batch(tokens, jnp.arange(length) < counts[:, None], layout)


def abstract(config: DeepseekV4Config, spec: LayerSpec | None) -> nnx.Module:
    """A block (or the ends, for None) with shapes and no arrays."""
    return nnx.eval_shape(lambda: Ends(config, nnx.Rngs(0)) if spec is None else Block(config, spec, nnx.Rngs(0)))


def _graph(config: DeepseekV4Config, spec: LayerSpec | None) -> nnx.GraphDef:
    """The structure of a block (or of the ends): `nnx.merge` makes a module of it and arrays."""
    return nnx.split(abstract(config, spec))[0]
