"""The state of a training run, and the two halves of its parameters: what a gradient moves and what is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.facts import Fact
from dsv4_jax.shapes import layer_slots

Tree = Any  # a nested dict of arrays or facts


class TrainState(NamedTuple):
    """Everything a step reads and returns; a checkpoint holds exactly this.

    step: int32 scalar, optimizer steps done.
    params: float32 masters, with router biases and hash tables among them.
    optimizer: state of the optimizer.
    key: uint32, the data of the run's random key; whatever is random in a step folds `step` into it.
    """

    step: jax.Array
    params: Tree
    optimizer: Tree
    key: jax.Array


def init_state(params: Tree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step. Under `jax.eval_shape` it is the abstract state of a restore."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(key))


def split(params: Tree, facts: Tree, moves: Callable[[Fact], bool]) -> tuple[Tree, Tree]:
    """The leaves whose fact `moves`, and the others: two trees with None where the other has the leaf."""
    moved = jax.tree.map(lambda x, fact: x if moves(fact) else None, params, facts)
    held = jax.tree.map(lambda x, fact: None if moves(fact) else x, params, facts)
    return moved, held


def join(moved: Tree, held: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, moved, held, is_leaf=lambda x: x is None)


def add_updates(params: Tree, updates: Tree, facts: Tree) -> Tree:
    """Parameters plus updates; buffers (`optimizer == "none"`) stay the same arrays, bit by bit."""
    return jax.tree.map(lambda p, u, fact: p if fact.optimizer == "none" else p + u, params, updates, facts)


def move_router_biases(config: DeepseekV4Config, params: Tree, load: jax.Array, speed: float) -> Tree:
    """Each learned router's bias moved by `speed * sign(mean load - load)` (V3 report 2.1.2), where it has one.

    Args:
        config: the architecture.
        params: the parameters; a copy with new biases is returned.
        load: [L, E] pairs per expert of the whole batch, blocks in order, the MTP block last if it ran.
        speed: the step.
    """
    if config.topk_method == "greedy":
        return params
    moves = speed * jnp.sign(load.mean(-1, keepdims=True) - load)
    stacks: dict[str, list[jax.Array]] = {}
    for (spec, path, _), move in zip(layer_slots(config), moves, strict=False):
        if spec.routing == "moe":
            stacks.setdefault(path, []).append(move)
    for path, stack in stacks.items():
        params = _changed(params, f"{path}/ffn/gate/bias".split("/"), jnp.stack(stack))
    if len(load) > config.num_hidden_layers:
        params = _changed(params, ("mtp", "0", "block", "ffn", "gate", "bias"), moves[-1])
    return params


def _changed(tree: Tree, path: Sequence[str], by: jax.Array) -> Tree:
    """A copy of nested dicts with `by` added to the leaf at `path`."""
    first, *rest = path
    return {**tree, first: _changed(tree[first], rest, by) if rest else tree[first] + by}
