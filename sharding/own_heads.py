"""Attention whose heads are spread over a tensor axis: every device works on whole heads of its own.

Queries, output groups and sinks are a device's own; entries, their compressors and the indexer are whole on each, so
that all devices of the axis choose the same entries and remember the same. What is left to do is one sum of the
layer's outputs. Left to the compiler, a layer would take no kernels: it cannot cut them.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.facts import Fact
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.parameters import facts_of
from dsv4_jax.observer import NOBODY
from dsv4_jax.quantization.packed import Packed
from sharding.mesh import TENSOR
from sharding.rules import Strategy

BY_HEAD = "heads", "o_groups", "o_lora"  # logical axes that follow the heads; of a weight's the first is cut


def head_specs(state: nnx.State) -> Any:
    """How the weights of one layer are given to the devices: those that follow heads in parts, the others whole."""

    def one(fact: Fact) -> PartitionSpec:
        cut = next((n for n, axis in enumerate(fact.axes) if axis in BY_HEAD), None)
        return PartitionSpec() if cut is None else PartitionSpec(*(None,) * cut, TENSOR)

    return jax.tree.map(one, facts_of(state))


def splits_heads(layer: Any, options: AttentionOptions, strategy: Strategy, mesh: Mesh) -> bool:
    """Whether every device can have whole heads and whole output groups of this layer, and nobody looks at them all."""
    spread = {axis: rule for axis, rule in strategy.parameters.items() if axis != "experts"}
    ours = set(spread.values()) == {(TENSOR,)} and {*BY_HEAD} <= {*spread}
    if not ours or not isinstance(layer, Attention) or options.observer is not NOBODY:
        return False
    state = nnx.state(layer)
    ways, weights = mesh.shape[TENSOR], nnx.to_pure_dict(state)
    whole = layer.config.num_attention_heads % ways == 0 and layer.config.o_groups % ways == 0
    is_packed = lambda leaf: isinstance(leaf, Packed)  # noqa: E731
    pairs = zip(jax.tree.leaves(weights, is_leaf=is_packed), jax.tree.leaves(head_specs(state)), strict=True)
    return whole and all(_divides(weight, lies, ways) for weight, lies in pairs)


def _divides(weight: Any, lies: PartitionSpec, ways: int) -> bool:
    """Whether all arrays of a weight can be cut; scales of packed ones are fewer than their numbers."""
    sizes = [array.shape[lies.index(TENSOR)] for array in jax.tree.leaves(weight)] if TENSOR in lies else []
    return all(size % ways == 0 for size in sizes)
