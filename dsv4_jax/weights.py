"""Making the parameter tree: fresh values, the facts beside them, and the two ways its layers can lie."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
from flax import nnx

from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.layers.parameters import facts_of
from dsv4_jax.model import Block, Ends, abstract

Params = dict[str, Any]


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


@lru_cache(maxsize=8)
def shapes(config: DeepseekV4Config) -> Params:
    """`init`'s tree with a `jax.ShapeDtypeStruct` for each array; one tree for all callers, not to be changed."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def draw_quickly() -> dict[str, int]:
    """Compiler options for `init`: on a CPU its many random numbers take far longer to optimise than to draw."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def _init_block(config: DeepseekV4Config, spec: LayerSpec, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Block(config, spec, nnx.Rngs(key))))


def facts(config: DeepseekV4Config) -> Params:
    """The tree of `Fact`s beside `init`'s parameters; stacked blocks gain the leading axis "layers"."""
    tree = facts_of(nnx.state(abstract(config, None)))
    stack = lambda fact: type(fact)(("layers", *fact.axes), fact.optimizer, fact.role)  # noqa: E731
    tree["segments"] = {
        str(i): {
            str(j): jax.tree.map(stack, facts_of(nnx.state(abstract(config, spec))))
            for j, spec in enumerate(segment.unit)
        }
        for i, segment in enumerate(config.segments)
    }
    return tree


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
