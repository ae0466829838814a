"""Running a stack of blocks: a scan over stacked parameters, or a loop over parameters that lie apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.kv_cache import Cache, split_layer, trim
from dsv4_jax.layers.layout import Layout

Params = dict[str, Any]
Record = dict[str, Any]


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

    def unit(carry: tuple[jax.Array, Any], stacked: tuple[Params, Any, jax.Array]) -> tuple[Any, Any]:
        (streams, pools), (params, states, layer) = carry, stacked
        records, new_states, new_pools = [], {}, {}
        for i, (graph, name) in enumerate(zip(graphs, names, strict=True)):
            past = cache and cache.layer(segment.unit[i], states[name], pools[name], layer)
            streams, record, past = nnx.merge(graph, params[str(i)])(streams, batch, options, past)
            records.append(record)
            if past is not None:
                state, new_pools[name] = split_layer(past)
                new_states[name] = trimmed(config, segment.unit[i], state, batch, options)
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


def trimmed(config: DeepseekV4Config, spec: LayerSpec, state: Any, batch: Batch, options: Options) -> Any:
    """A layer's state after these tokens; with `keep_all` all rows stay."""
    return state if options.keep_all or batch.layout.past is None else trim(config, spec, state, batch.layout.past)
