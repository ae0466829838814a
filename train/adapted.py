"""The parameters of a run that trains adapters: {"base": the model's, which nothing moves, "lora": the adapters'}."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from dsv4_jax import lora as adapters
from dsv4_jax import weights
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.facts import Fact
from dsv4_jax.lora import Lora

Tree = Any


def init(lora: Lora, config: DeepseekV4Config, base: Tree, key: jax.Array) -> Tree:
    """The state's parameters around those of a model; what is computed at first is that model."""
    return {"base": base, "lora": adapters.init(lora, weights.facts(config), base, key)}


def facts(lora: Lora, config: DeepseekV4Config) -> Tree:
    """The facts beside them; nothing moves the base, its router biases neither."""
    own = weights.facts(config)
    held = jax.tree.map(lambda fact: Fact(fact.axes, "none", fact.role), own)
    return {"base": held, "lora": adapters.adapter_facts(lora, own)}


def model_params(lora: Lora, params: Tree) -> Tree:
    """The model's parameters with the adapters merged in."""
    return adapters.merged(lora, params["base"], params["lora"])


def shapes(lora: Lora, config: DeepseekV4Config) -> Tree:
    """The same as abstract arrays."""
    make = lambda key: init(lora, config, weights.init(config, key), key)  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


def to_json(lora: Lora | None) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters."""
    return None if lora is None else dataclasses.asdict(lora)


def from_json(found: dict[str, Any] | None) -> Lora | None:
    """The inverse of `to_json`."""
    return None if not found else Lora(**{**found, "targets": tuple(found["targets"])})


def abstract(host: dict[str, Any], base: Tree) -> Tree:
    """What a checkpoint with these host values holds in place of a model's abstract parameters."""
    if (lora := from_json(host.get("lora"))) is None:
        return base
    return {"base": base, "lora": shapes(lora, config_from_json(host["config"]))["lora"]}


def merged(host: dict[str, Any], params: Tree) -> Tree:
    """The model's parameters from those of a checkpoint with these host values."""
    lora = from_json(host.get("lora"))
    return params if lora is None else model_params(lora, params)


def describe(lora: Lora, config: DeepseekV4Config) -> str:
    """What is trained, and what becomes of the mHC maps, for a person."""
    whole = shapes(lora, config)
    base, trained = (sum(x.size for x in jax.tree.leaves(whole[part])) for part in ("base", "lora"))
    maps = (
        "the generators of the mHC maps are held: at equal streams the maps are those of pretraining"
        if lora.streams == "held"
        else "the generators of the mHC maps are adapted too: Sinkhorn keeps the maps doubly stochastic, but they move"
    )
    return f"adapters of rank {lora.rank} on {', '.join(lora.targets)}: {trained:,} numbers beside {base:,}; {maps}"
