"""Running a stack of blocks: a scan over stacked parameters, or a loop over parameters that lie apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.kernels.grouped_matmul import OfStack
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.kv_cache import Cache, split_layer, trim
from dsv4_jax.layers.layout import Layout
from dsv4_jax.partition import Partition

Params = dict[str, Any]
Record = dict[str, Any]

STREAMS = ("batch", "seq", None, None)  # logical axes of [B, S, n, D]


class Batch(NamedTuple):
    """What every block may look at: token ids [B, S], the tokens that count [B, S], and the layout of documents.

    expert_ids: experts given to the learned routers: [B, S, L, k] of all of them, inside a block its own [B, S, k].
    """

    tokens: jax.Array
    counted: jax.Array
    layout: Layout
    expert_ids: jax.Array | None = None


class Options(NamedTuple):
    """Static choices of one forward."""

    attention: AttentionOptions
    record: bool
    keep_all: bool
    remat: bool
    unroll: int | bool
    partition: Partition


def run_segment(
    config: DeepseekV4Config,
    number: int,
    graphs: list[nnx.GraphDef],
    params: Params,
    streams: jax.Array,
    batch: Batch,
    options: Options,
    cache: Cache | None,
) -> tuple[jax.Array, list[Record], Cache | None]:
    """Scan a segment's unit over its stacked parameters and states; the pools go along whole and change in place."""
    segment = config.segments[number]
    names = [f"{number}/{i}" for i in range(len(graphs))]
    states = {name: cache.states[name] for name in names} if cache is not None else None
    pools = {name: cache.pools[name] for name in names} if cache is not None else None

    given = given_experts(config, number, batch.expert_ids)
    stacks: Params = {}
    if cache is not None and not isinstance(params, list) and options.partition.experts_in_place:
        params, stacks = _without_experts(params)
    # Streams go along side by side, [B, S, nD]: a TPU lays out [B, S, n, D] in another way, and would copy.
    shape, start = streams.shape, streams.reshape(*streams.shape[:-2], -1)

    def unit(carry: tuple[jax.Array, Any], stacked: tuple[Params, Any, Any, jax.Array]) -> tuple[Any, Any]:
        (flat, pools), (params, states, given, layer) = carry, stacked
        streams = flat.reshape(shape)
        records, new_states, new_pools = [], {}, {}
        for i, (graph, name) in enumerate(zip(graphs, names, strict=True)):
            past = cache and cache.layer(segment.unit[i], states[name], pools[name], layer)
            own = batch._replace(expert_ids=given.get(i))
            block = _with_experts(params[str(i)], stacks[str(i)], layer) if stacks else params[str(i)]
            streams, record, past = nnx.merge(graph, block)(streams, own, options, past)
            records.append(record)
            if past is not None:
                state, new_pools[name] = split_layer(past)
                new_states[name] = trimmed(config, segment.unit[i], state, batch, options)
        return (streams.reshape(flat.shape), new_pools if cache else None), (records, new_states if cache else None)

    body = jax.checkpoint(unit) if options.remat else unit
    if isinstance(params, list):
        (streams, pools), (stacked, states) = _loop(body, (start, pools), params, (states, given))
    else:
        xs = (params, states, given, jnp.arange(segment.repeats, dtype=jnp.int32))
        (streams, pools), (stacked, states) = jax.lax.scan(body, (start, pools), xs, unroll=options.unroll)
    if cache is not None:
        cache = replace(cache, states=cache.states | states, pools=cache.pools | pools)
    take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    return streams.reshape(shape), [take(record, i) for i in range(segment.repeats) for record in stacked], cache


def _without_experts(params: Params) -> tuple[Params, Params]:
    """The parameters of a segment's blocks without their experts, and these alone."""
    experts = {name: block["ffn"]["experts"] for name, block in params.items()}
    rest = {
        name: block | {"ffn": {part: value for part, value in block["ffn"].items() if part != "experts"}}
        for name, block in params.items()
    }
    return rest, experts


def _with_experts(block: Params, stacks: Params, layer: jax.Array) -> Params:
    """A block with the experts of its layer, which stay in their stacks."""
    experts = {name: OfStack(stack, layer) for name, stack in stacks.items()}
    return block | {"ffn": block["ffn"] | {"experts": experts}}


def given_experts(config: DeepseekV4Config, number: int, expert_ids: jax.Array | None) -> dict[int, jax.Array]:
    """From expert_ids [B, S, L, k] those of a segment, [repeats, B, S, k], by the place in its unit; {} without any."""
    if expert_ids is None:
        return {}
    learned = [[i for i, spec in enumerate(s.unit) if spec.routing == "moe"] for s in config.segments]
    before = sum(s.repeats * len(places) for s, places in zip(config.segments[:number], learned, strict=False))
    places = learned[number]
    by_layer = jnp.moveaxis(expert_ids, 2, 0)[before : before + config.segments[number].repeats * len(places)]
    return {i: by_layer[rank :: len(places)] for rank, i in enumerate(places)}


def check_expert_ids(config: DeepseekV4Config, tokens: jax.Array, mtp: bool, expert_ids: jax.Array | None) -> None:
    """Raises ValueError unless `expert_ids` is None or has a choice for each learned router that runs."""
    blocks = config.layers + (config.mtp_layers[:1] if mtp else ())
    routers = sum(spec.routing == "moe" for spec in blocks)
    wanted = (*tokens.shape, routers, config.num_experts_per_tok)
    if expert_ids is not None and expert_ids.shape != wanted:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}; for {routers} learned routers it must be {wanted}")


def learned_choices(config: DeepseekV4Config, layers: list[Record]) -> jax.Array:
    """[B, S, L, k]: what the learned routers chose, from the `Output.layers` of a forward with `record=True`."""
    blocks = config.layers + config.mtp_layers[:1]
    routed = [layer["expert_ids"] for spec, layer in zip(blocks, layers, strict=False) if spec.routing == "moe"]
    return jnp.stack(routed, axis=2)


def _loop(body: Any, carry: Any, params: list[Params], stacked: Any) -> tuple[Any, Any]:
    """What `lax.scan` does, over parameters that lie apart: no layer's weights are ever sliced out of a stack."""
    outputs = []
    for layer, own in enumerate(params):
        state, given = jax.tree.map(lambda x, layer=layer: x[layer], stacked)
        carry, output = body(carry, (own, state, given, jnp.int32(layer)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)


def trimmed(config: DeepseekV4Config, spec: LayerSpec, state: Any, batch: Batch, options: Options) -> Any:
    """A layer's state after these tokens; with `keep_all` all rows stay."""
    return state if options.keep_all or batch.layout.past is None else trim(config, spec, state, batch.layout.past)
