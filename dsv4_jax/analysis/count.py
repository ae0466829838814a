"""Exact parameter counts and cache sizes per component, from the configuration alone.

Total: every float parameter of the model, MTP included; the integer tables of hash routing are not parameters. With
this rule V4-Flash has the published 290,942,289,362.

Activated: what one token multiplies with in the main stack: of the routed experts its `num_experts_per_tok`, of the
embedding its one row, of everything else the whole; no MTP. With this rule Flash has 13.3B and Pro 48.9B.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from dsv4_jax.baseline import cached_numbers
from dsv4_jax.config import CSA, DeepseekV4Config
from dsv4_jax.layer_plan import BASELINE_KINDS
from dsv4_jax.shapes import is_table, tree_shapes

COUNTED = (
    "total: all float parameters with MTP, without hash tables (integers); activated: per token "
    "{k} of {experts} routed experts, 1 of {rows} embedding rows, everything else whole, without MTP"
)


@dataclass(frozen=True)
class Component:
    """Parameters of one component: all of them, and those that one token uses."""

    name: str
    total: int
    activated: int


def count_parameters(config: DeepseekV4Config) -> tuple[Component, ...]:
    """Parameters per component, in the order of `COMPONENTS`; components without parameters are left out."""
    totals: dict[str, int] = defaultdict(int)
    for path, shape in tree_shapes(config).items():
        if not is_table(path):
            totals[component_of(path)] += math.prod(shape)
    return tuple(
        Component(name, totals[name], _activated(config, name, totals[name])) for name in COMPONENTS if totals[name]
    )


def total_parameters(config: DeepseekV4Config) -> int:
    """All float parameters, MTP included."""
    return sum(component.total for component in count_parameters(config))


def activated_parameters(config: DeepseekV4Config) -> int:
    """Parameters of the main stack that one token uses."""
    return sum(component.activated for component in count_parameters(config))


def table_entries(config: DeepseekV4Config) -> int:
    """Integers in the tables of hash routing, `[vocab_size, num_experts_per_tok]` per hash layer."""
    return config.mlp_layer_types.count("hash_moe") * config.vocab_size * config.num_experts_per_tok


def cache_elements_per_token(config: DeepseekV4Config) -> float:
    """Numbers that the cache grows by per token: compressed entries, and the indexer's keys in CSA layers.

    Of baseline layers: keys and values, or latents with the indexer's keys, as a cache of them would hold.
    """
    widths = {CSA: config.head_dim + config.index_head_dim}
    grown = sum(widths.get(layer.attention, config.head_dim) / layer.ratio for layer in config.layers if layer.ratio)
    whole = (layer for layer in config.layers if layer.attention in BASELINE_KINDS)
    return grown + sum(sum(cached_numbers(config, layer.attention)) for layer in whole)


def window_elements(config: DeepseekV4Config) -> int:
    """Numbers in all layers' full windows, whatever the context: one shared key/value entry per token and layer."""
    windows = sum(layer.attention not in BASELINE_KINDS for layer in config.layers)
    return windows * config.sliding_window * config.head_dim


def component_of(path: str) -> str:
    """The component of a parameter path, one of `COMPONENTS`."""
    if path.startswith("mtp/"):
        return "MTP"
    if path in _WHOLE:
        return _WHOLE[path]
    parts = path.split("/")
    if any(part.startswith("hc_") for part in parts):
        return "mHC"
    if parts[-1].endswith("norm") and "compressor" not in parts:
        return "norms"
    return next(name for part, name in _PARTS if part in parts)


_WHOLE = {"embed": "embedding", "head": "head", "norm": "norms"}
_PARTS = (  # the first that occurs in the path decides: an indexer's compressor belongs to the indexer
    ("indexer", "indexers"),
    ("compressor", "compressors"),
    ("attn", "attention projections"),
    ("gate", "routers"),
    ("shared_experts", "shared experts"),
    ("experts", "routed experts"),
)
COMPONENTS = (
    "embedding",
    "attention projections",
    "compressors",
    "indexers",
    "routers",
    "routed experts",
    "shared experts",
    "mHC",
    "norms",
    "head",
    "MTP",
)


def _activated(config: DeepseekV4Config, name: str, total: int) -> int:
    if name == "embedding":
        return total if config.tie_word_embeddings else config.hidden_size
    if name == "routed experts":
        return total * config.num_experts_per_tok // config.n_routed_experts
    return 0 if name == "MTP" else total
