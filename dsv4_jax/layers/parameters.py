"""Making parameters that carry their own facts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.facts import Fact, Optimizer


class Buffer(nnx.Variable):
    """An array of the model that no gradient moves: router bias, hash table."""


def parameter(value: jax.Array, axes: tuple[str, ...], optimizer: Optimizer, role: str) -> nnx.Param:
    """A trainable array with its logical axes, optimizer and role (`dsv4_jax.facts.Fact`)."""
    return nnx.Param(value, fact=Fact(axes, optimizer, role))


def buffer(value: jax.Array, axes: tuple[str, ...], role: str) -> Buffer:
    """An array that training moves by rule or not at all."""
    return Buffer(value, fact=Fact(axes, "none", role))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: DeepseekV4Config) -> jax.Array:
    """Normal values with the config's `initializer_range` as standard deviation, float32."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range


def facts_of(state: nnx.State) -> dict[str, Any]:
    """The tree of `Fact`s with the structure of `nnx.to_pure_dict(state)`."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    facts = jax.tree.map(lambda leaf: leaf.get_metadata()["fact"], state, is_leaf=is_variable)
    return nnx.to_pure_dict(facts)
