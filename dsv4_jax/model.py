"""DeepSeek-V4, whole: embedding, blocks on n residual streams, head, and the multi-token-prediction module.

Read it top to bottom; the layers it names are one file each in `layers/`. Shapes: B batch, S tokens, D hidden size,
n residual streams, V vocabulary, L blocks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.kernels.streams import read, write
from dsv4_jax.layers.attention import Attention, AttentionOptions, Mode
from dsv4_jax.layers.hyper_connections import HyperConnection, HyperHead, stochastic_errors
from dsv4_jax.layers.kv_cache import Cache, LayerCache, split_layer, trim
from dsv4_jax.layers.layout import Layout, Past, make_cached_layout, make_layout
from dsv4_jax.layers.moe import MoE
from dsv4_jax.layers.norm import dense, rms_norm
from dsv4_jax.layers.parameters import facts_of, normal, parameter
from dsv4_jax.quantization import policy as precision

Params = dict[str, Any]
Record = dict[str, Any]


class Block(nnx.Module):
    """mHC-read, norm, attention, mHC-write; then the same around the mixture of experts."""

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """One block of kind `spec`."""
        self.eps = config.rms_norm_eps
        self.hc_attn = HyperConnection(config, rngs)
        self.attn_norm = parameter(jnp.ones(config.hidden_size), ("embed",), "adamw", "norm")
        self.attn = Attention(config, spec, rngs)
        self.hc_ffn = HyperConnection(config, rngs)
        self.ffn_norm = parameter(jnp.ones(config.hidden_size), ("embed",), "adamw", "norm")
        self.ffn = MoE(config, spec.routing, rngs)

    def __call__(self, streams: jax.Array, batch: Batch, options: Options, past: LayerCache | None = None):
        """streams [B, S, n, D] -> (streams, record of this block, what its attention remembers)."""
        with jax.named_scope("attention"):
            maps = self.hc_attn(streams)
            x = rms_norm(read(streams, maps.pre), self.attn_norm[...], self.eps)
            attn_out, seen, past = self.attn(x, batch.layout, options.attention, past)
            streams = write(streams, attn_out, maps.post, maps.comb)
        with jax.named_scope("moe"):
            ffn_maps = self.hc_ffn(streams)
            x = rms_norm(read(streams, ffn_maps.pre), self.ffn_norm[...], self.eps)
            mlp_out, routed = self.ffn(x, batch.tokens, batch.counted)
            streams = write(streams, mlp_out, ffn_maps.post, ffn_maps.comb)
        errors = jnp.maximum(jnp.stack(stochastic_errors(maps.comb)), jnp.stack(stochastic_errors(ffn_maps.comb)))
        record = {"load": routed["load"], "balance": routed["balance"], "hc_errors": errors}
        record |= {"index_loss": seen["index_loss"]} if "index_loss" in seen else {}
        if options.record:
            record |= {
                "layer_out": streams,
                "attn_out": attn_out,
                "mlp_out": mlp_out,
                "expert_ids": routed["expert_ids"],
            }
            record |= {"selected": seen["selected"]} if "selected" in seen else {}
        return streams, record, past


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
        eps = self.config.rms_norm_eps
        embedded = dense(rms_norm(next_embedding, self.enorm[...], eps), self.e_proj[...])
        carried = dense(rms_norm(streams, self.hnorm[...], eps), self.h_proj[...])
        streams, record, past = self.block(embedded[..., None, :] + carried, batch, options, past)
        return rms_norm(self.hc_head(streams), self.norm[...], eps), record, past


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


class Batch(NamedTuple):
    """What every block may look at: token ids [B, S], the tokens that count [B, S], and the layout of documents."""

    tokens: jax.Array
    counted: jax.Array
    layout: Layout


class Options(NamedTuple):
    """Static choices of one forward."""

    attention: AttentionOptions
    record: bool
    keep_all: bool
    remat: bool
    unroll: int | bool


class Output(NamedTuple):
    """What a forward returns.

    logits: [B, S, V] float32, or None when not asked for.
    hidden: [B, S, D], normed: what the output matrix multiplies.
    mtp_hidden: the same of the MTP module, or None; position t predicts token t+2.
    layers: one record per block, the MTP block last when it ran: "load", "balance", "hc_errors", "index_loss".
    streams: [B, S, n, D] behind the last block: what the MTP module reads.
    cache: the given one with these tokens added, or None.
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
) -> Output:
    """The whole model on tokens [B, S]; pure: jit, differentiate and vmap it freely.

    Args:
        config: the architecture; static, like every keyword but `segment_ids`, `cache` and `counts`.
        params: the tree of `init` or of a checkpoint.
        tokens: int32 [B, S].
        segment_ids: [B, S], documents as runs of equal ids in packed rows; 0 marks padding, which is not counted in the
            statistics. None: every row is one document. Padding is exact on either side.
        cache: what came before: the tokens go on from there (see `init_cache`), and `Output.cache` holds them too.
        counts: with a cache, how many tokens of each row are real, [B]; the rest is padding behind them. Default: all.
        attention: "sparse" (the indexer chooses) or "dense" (all visible entries).
        dtype: compute dtype; the parameters' own by default. mHC, routing and compressor pooling stay float32.
        logits: also multiply the output matrix (a loss in chunks does that itself).
        mtp: also run the MTP module.
        index_loss: also compute the indexers' loss.
        record: also return every block's streams, sublayer outputs and choices.
        keep_all: with a cache, do not decide yet how many tokens are real: `Output.cache` waits for `kv_cache.commit`.
        remat: "block" recomputes a unit of blocks in the backward pass instead of keeping its activations.
        unroll: how many units the layer loop unrolls (True: all).
        policy: rounding by tensor role.
    """
    options = Options(AttentionOptions(attention, index_loss, policy), record, keep_all, remat == "block", unroll)
    if cache is not None and (mtp or index_loss or segment_ids is not None):
        raise ValueError("a cache holds one document a row, has no index loss, and its MTP module runs by forward_mtp")
    batch = _describe(config, tokens, segment_ids, cache, counts)
    ends = nnx.merge(_graph(config, None), {k: v for k, v in params.items() if k != "segments"})

    x = ends.embed[...][tokens].astype(dtype or ends.embed.dtype)
    streams = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], config.hc_mult, x.shape[-1]))  # [B, S, n, D]
    layers: list[Record] = []
    for i in range(len(config.segments)):
        streams, records, cache = _run_segment(config, i, params["segments"][str(i)], streams, batch, options, cache)
        layers += records
    hidden = rms_norm(ends.hc_head(streams), ends.norm[...], config.rms_norm_eps)

    mtp_hidden = None
    if mtp and config.mtp_layers:
        following = _next_in_document(x, segment_ids)
        with jax.named_scope("mtp"):
            mtp_hidden, mtp_record, _ = ends.mtp["0"](streams, following, batch, options)
        layers.append(mtp_record)
    if cache is not None and batch.layout.past is not None and not keep_all:
        cache = replace(cache, lengths=cache.lengths + batch.layout.past.counts)
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

    Returns:
        Normed hidden states [B, S, D], which predict the token after the next; and the cache with the new "mtp" state.
    """
    past = Past(lengths, counts)
    layout = make_cached_layout(config, streams.shape[1], past)
    batch = Batch(next_tokens, jnp.arange(streams.shape[1]) < counts[:, None], layout)
    options = Options(AttentionOptions("sparse", False, policy), False, keep_all, False, 1)
    ends = nnx.merge(_graph(config, None), {k: v for k, v in params.items() if k != "segments"})
    state = jax.tree.map(lambda x: x[0], cache.states["mtp"])
    memory = cache.layer(config.mtp_layers[0], state, cache.pools["mtp"], jnp.int32(0))
    embedded = ends.embed[...][next_tokens].astype(streams.dtype)
    hidden, _, memory = ends.mtp["0"](streams, embedded, batch, options, memory)
    state, pools = split_layer(memory)
    state = jax.tree.map(lambda x: x[None], _trimmed(config, config.mtp_layers[0], state, batch, options))
    return hidden, replace(cache, states=cache.states | {"mtp": state}, pools=cache.pools | {"mtp": pools})


def _trimmed(config: DeepseekV4Config, spec: LayerSpec, state: Any, batch: Batch, options: Options) -> Any:
    """A layer's state after these tokens; with `keep_all` all rows stay."""
    return state if options.keep_all or batch.layout.past is None else trim(config, spec, state, batch.layout.past)


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
    rows, length = tokens.shape
    if cache is None:
        counted = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        return Batch(tokens, counted, make_layout(config, rows, length, segment_ids))
    counts = jnp.full(rows, length, jnp.int32) if counts is None else counts
    layout = make_cached_layout(config, length, Past(cache.lengths, counts, cache.sealed))
    return Batch(tokens, jnp.arange(length) < counts[:, None], layout)


def _run_segment(
    config: DeepseekV4Config,
    number: int,
    params: Params,
    streams: jax.Array,
    batch: Batch,
    options: Options,
    cache: Cache | None,
) -> tuple[jax.Array, list[Record], Cache | None]:
    """Scan a segment's unit over its stacked parameters and states; the pools go along whole and change in place."""
    segment = config.segments[number]
    graphs = [_graph(config, spec) for spec in segment.unit]
    names = [f"{number}/{i}" for i in range(len(graphs))]
    states = {name: cache.states[name] for name in names} if cache is not None else None
    pools = {name: cache.pools[name] for name in names} if cache is not None else None

    def unit(carry: tuple[jax.Array, Any], stacked: tuple[Params, Any, jax.Array]) -> tuple[Any, Any]:
        (streams, pools), (params, states, layer) = carry, stacked
        records, new_states, new_pools = [], {}, {}
        for i, (graph, name) in enumerate(zip(graphs, names, strict=True)):
            past = cache and cache.layer(segment.unit[i], states[name], pools[name], layer)
            streams, record, past = nnx.merge(graph, params[str(i)])(streams, batch, options, past)
            records.append(record)
            if past is not None:
                state, new_pools[name] = split_layer(past)
                new_states[name] = _trimmed(config, segment.unit[i], state, batch, options)
        return (streams, new_pools if cache else None), (records, new_states if cache else None)

    body = jax.checkpoint(unit) if options.remat else unit
    if isinstance(params, list):
        (streams, pools), (stacked, states) = _loop(body, (streams, pools), params, states)
    else:
        xs = (params, states, jnp.arange(segment.repeats, dtype=jnp.int32))
        (streams, pools), (stacked, states) = jax.lax.scan(body, (streams, pools), xs, unroll=options.unroll)
    if cache is not None:
        cache = replace(cache, states=cache.states | states, pools=cache.pools | pools)
    take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    return streams, [take(record, i) for i in range(segment.repeats) for record in stacked], cache


def _loop(body: Any, carry: Any, params: list[Params], states: Any) -> tuple[Any, Any]:
    """What `lax.scan` does, over parameters that lie apart: no layer's weights are ever sliced out of a stack."""
    outputs = []
    for layer, own in enumerate(params):
        state = jax.tree.map(lambda x, layer=layer: x[layer], states)
        carry, output = body(carry, (own, state, jnp.int32(layer)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)


def unstack(params: Params) -> Params:
    """The same parameters with every layer's arrays apart: each segment becomes a list of units.

    `forward` takes either form. Stacked ones are scanned, which compiles once per unit but copies every layer's weights
    out of the stack where the backend cannot read them in place. Decoding one token reads each weight once, so there
    the copy doubles the traffic; apart, a depth of L compiles L times as long.
    """
    apart = {}
    for number, segment in params["segments"].items():
        repeats = len(jax.tree.leaves(segment)[0])
        apart[number] = [jax.tree.map(lambda x, layer=layer: x[layer], segment) for layer in range(repeats)]
    return params | {"segments": apart}


def init(config: DeepseekV4Config, key: jax.Array) -> Params:
    """Fresh parameters in float32; call it under `jax.jit` with `out_shardings` to create them sharded."""
    ends_key, *keys = jax.random.split(key, 1 + len(config.segments))
    params = nnx.to_pure_dict(nnx.state(Ends(config, nnx.Rngs(ends_key))))
    params["segments"] = {}
    for i, (segment, segment_key) in enumerate(zip(config.segments, keys, strict=True)):
        unit = {}
        for j, spec in enumerate(segment.unit):
            block_keys = jax.random.split(jax.random.fold_in(segment_key, j), segment.repeats)
            unit[str(j)] = jax.vmap(partial(_init_block, config, spec))(block_keys)
        params["segments"][str(i)] = unit
    return params


def _init_block(config: DeepseekV4Config, spec: LayerSpec, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Block(config, spec, nnx.Rngs(key))))


def facts(config: DeepseekV4Config) -> Params:
    """The tree of `Fact`s beside `init`'s parameters; stacked blocks gain the leading axis "layers"."""
    tree = facts_of(nnx.state(_abstract(config, None)))
    stack = lambda fact: type(fact)(("layers", *fact.axes), fact.optimizer, fact.role)  # noqa: E731
    tree["segments"] = {
        str(i): {
            str(j): jax.tree.map(stack, facts_of(nnx.state(_abstract(config, spec))))
            for j, spec in enumerate(segment.unit)
        }
        for i, segment in enumerate(config.segments)
    }
    return tree


def _abstract(config: DeepseekV4Config, spec: LayerSpec | None) -> nnx.Module:
    """A block (or the ends, for None) with shapes and no arrays."""
    make = lambda: Ends(config, nnx.Rngs(0)) if spec is None else Block(config, spec, nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(make)


def _graph(config: DeepseekV4Config, spec: LayerSpec | None) -> nnx.GraphDef:
    return nnx.split(_abstract(config, spec))[0]
