"""Muon for matrices and AdamW for the rest, chosen by the facts that each parameter carries.

Source: DeepSeek-V4 report 2.4, Algorithm 1 (Muon with hybrid Newton-Schulz) and 4.2.2 (hyperparameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv4_jax.facts import Fact
from train.newton_schulz import orthogonalize, orthogonalize_all

__all__ = ["MuonState", "OptimizerConfig", "at_step", "make_optimizer", "orthogonalize", "scale_by_muon", "update_rms"]

Tree = Any  # a nested dict of arrays, facts or booleans
Orthogonalizer = Callable[[list[jax.Array], list[Fact], Any], list[jax.Array]]

# Adam squares the gradient. In FP32, with subnormals flushed as XLA does on CPUs, the second moment of a gradient below
# 5e-19 is zero, and its first moment over eps = 1e-20 alone would be an update of up to 48. (Scaling gradient and eps
# by a power of two would be exact, but XLA folds the factor out of the square.)
ADAM_SMALLEST = 1e-18


@dataclass(frozen=True)
class OptimizerConfig:
    """Numbers of the optimizer; the defaults are those of the report (4.2.2).

    Attributes:
        momentum: decay of Muon's momentum sum.
        update_rms: RMS of an orthogonalised update, so that AdamW's learning rates carry over.
        weight_decay: decoupled, for both optimizers.
        adam_b1: decay of AdamW's first moment.
        adam_b2: decay of AdamW's second moment.
        adam_eps: added to the root of AdamW's second moment.
        clip_norm: bound on the global norm of the gradients of the trainable parameters, or None. Not in the report.
        newton_schulz_dtype: "bfloat16" multiplies in BF16 with FP32 accumulation, 1% off the direction of "float32".
    """

    momentum: float = 0.95
    update_rms: float = 0.18
    weight_decay: float = 0.1
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-20
    clip_norm: float | None = None
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32"


class MuonState(NamedTuple):
    """State of `scale_by_muon`: the momentum sum of each parameter."""

    momentum: Tree


def make_optimizer(
    facts: Tree,
    learning_rate: optax.ScalarOrSchedule,
    config: OptimizerConfig = OptimizerConfig(),
    *,
    trainable: Tree | Callable[[Fact], bool] | None = None,
    orthogonalize: Orthogonalizer | None = None,
) -> optax.GradientTransformation:
    """The optimizer of FP32 master weights: W <- W (1 - lr * decay) - lr * O, with O from Muon or AdamW.

    Its state has the same structure whatever is `trainable`: a stage that trains only some parameters can use the
    state, and the checkpoint, of the stage before it. Moments of frozen parameters are kept as they are.

    Args:
        facts: `Fact` leaves in the structure of the parameters. "muon" parameters are stacks of matrices in their
            last two dimensions; "none" parameters get a zero update.
        learning_rate: a number or an optax schedule of the step.
        config: the numbers.
        trainable: which parameters move, as booleans in the structure of the parameters or as a predicate on `Fact`;
            all others get an update of exactly zero and do not count for clipping. None: all move.
        orthogonalize: of Muon, for parameters on many devices (`train.spread_muon`). None: on one device.

    Raises:
        ValueError: from here or from `init`, if facts and parameters disagree or a parameter is not FP32 (or FP64).
    """
    moves = _moves(facts, trainable)
    labels = jax.tree.map(lambda fact: fact.optimizer, facts)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "muon": scale_by_muon(config, _only(moves, labels, "muon"), _only(facts, labels, "muon"), orthogonalize),
        "adamw": _scale_by_adam(config, _only(moves, labels, "adamw")),
        "none": optax.set_to_zero(),
    }
    return optax.chain(
        _masters(facts, moves),
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.partition(groups, labels),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        _zero_frozen(moves),
    )


def at_step(state: Tree, step: jax.Array) -> Tree:
    """The optimizer's state with its learning rate at `step` of the schedule, int32; every moment keeps its own count.

    The two counts part where a step is skipped: it is a step of the run, which ends at the schedule's floor, but not
    one that AdamW's moments have seen.
    """
    scheduled = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda x: x._replace(count=step) if scheduled(x) else x, state, is_leaf=scheduled)


def scale_by_muon(
    config: OptimizerConfig,
    moves: Tree | None = None,
    facts: Tree = None,
    orthogonalize: Orthogonalizer | None = None,
) -> optax.GradientTransformation:
    """Muon's update before decay and learning rate: M = mu M + G, then rms sqrt(max(rows, cols)) NS(mu M + G).

    `optax.contrib.scale_by_muon` is not used because three of its points differ from Algorithm 1: its momentum is a
    bias-corrected moving average whose Nesterov sum is not proportional to mu M + G; it adds eps to the norm, which
    damps small gradients; and it runs one Newton-Schulz for each parameter, in the parameter's precision.

    Args:
        config: the numbers.
        moves: booleans in the structure of the parameters; the others keep their momentum and get zero. None: all.
        facts: of the parameters, which only `orthogonalize` reads.
        orthogonalize: `(arrays, facts, dtype) -> arrays`; by default `newton_schulz.orthogonalize_all`.
    """

    def init(params: Tree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, MuonState]:
        del params
        mask = jax.tree.map(lambda _: True, updates) if moves is None else moves
        mu = config.momentum
        momentum = jax.tree.map(lambda move, g, m: mu * m + g if move else m, mask, updates, state.momentum)
        nesterov = jax.tree.map(lambda g, m: mu * m + g, updates, momentum)
        return _scaled_directions(nesterov, mask, config, facts, orthogonalize), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def update_rms(updates: Tree, facts: Tree, by: Literal["optimizer", "role"] = "optimizer") -> dict[str, jax.Array]:
    """RMS over all elements of the updates (frozen ones too), for each optimizer or each role. FP32 scalars."""
    groups: dict[str, list[jax.Array]] = {}
    for fact, update in zip(jax.tree.leaves(facts), jax.tree.leaves(updates), strict=True):
        if fact.optimizer != "none":
            groups.setdefault(getattr(fact, by), []).append(update)
    return {name: _rms(members) for name, members in sorted(groups.items())}


def _rms(arrays: list[jax.Array]) -> jax.Array:
    squares = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays)
    return jnp.sqrt(squares / float(sum(x.size for x in arrays)))  # more than int32 holds


def _scaled_directions(
    nesterov: Tree, moves: Tree, config: OptimizerConfig, facts: Tree, orthogonalize: Orthogonalizer | None
) -> Tree:
    leaves, structure = jax.tree.flatten(nesterov)
    moving = jax.tree.leaves(moves)
    dtype = jnp.bfloat16 if config.newton_schulz_dtype == "bfloat16" else None
    moved = [x for x, move in zip(leaves, moving, strict=True) if move]
    if orthogonalize is None:
        directions = iter(orthogonalize_all(moved, dtype=dtype))
    else:
        chosen = [fact for fact, move in zip(jax.tree.leaves(facts), moving, strict=True) if move]
        directions = iter(orthogonalize(moved, chosen, dtype))
    return structure.unflatten(
        config.update_rms * math.sqrt(max(x.shape[-2:])) * next(directions) if move else jnp.zeros_like(x)
        for x, move in zip(leaves, moving, strict=True)
    )


def _scale_by_adam(config: OptimizerConfig, moves: Tree) -> optax.GradientTransformation:
    """`optax.scale_by_adam` without gradients below ADAM_SMALLEST, keeping the moments of frozen parameters."""
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        new: Any
        updates = jax.tree.map(lambda g: jnp.where(jnp.abs(g) < ADAM_SMALLEST, 0, g), updates)
        updates, new = adam.update(updates, state, params)
        keep = partial(jax.tree.map, lambda move, after, before: after if move else before, moves)
        return updates, new._replace(mu=keep(new.mu, state.mu), nu=keep(new.nu, state.nu))

    return optax.GradientTransformation(adam.init, update)


def _moves(facts: Tree, trainable: Tree | Callable[[Fact], bool] | None) -> Tree:
    """Booleans in the structure of the facts."""
    if trainable is None:
        chosen = jax.tree.map(lambda _: True, facts)
    elif callable(trainable):
        chosen = jax.tree.map(lambda fact: bool(trainable(fact)), facts)
    else:
        _same_structure(trainable, facts, "trainable")
        chosen = trainable
    return jax.tree.map(lambda fact, move: bool(move) and fact.optimizer != "none", facts, chosen)


def _only(moves: Tree, labels: Tree, group: str) -> Tree:
    """The tree as `optax.partition` shows it to one group."""
    return jax.tree.map(lambda move, label: move if label == group else optax.MaskedNode(), moves, labels)


def _masters(facts: Tree, moves: Tree) -> optax.GradientTransformation:
    """Checks the parameters at `init`; brings gradients to their dtype; drops those of frozen parameters."""

    def init(params: Tree) -> optax.EmptyState:
        _same_structure(params, facts, "the parameters")
        jax.tree_util.tree_map_with_path(_check_parameter, params, facts)
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if params is None:
            raise ValueError("The optimizer decays weights: call update(gradients, state, params) with the parameters.")
        return jax.tree.map(_master_gradient, updates, params, moves), state

    return optax.GradientTransformation(init, update)


def _master_gradient(grad: jax.Array, param: jax.Array, move: bool) -> jax.Array:
    return grad.astype(param.dtype) if move else jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32))


def _zero_frozen(moves: Tree) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, move: u if move else jnp.zeros_like(u), updates, moves)
    )


def _check_parameter(path: tuple[Any, ...], param: jax.Array, fact: Fact) -> None:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if len(fact.axes) != param.ndim:
        raise ValueError(f"{name} has shape {param.shape} but its fact names {len(fact.axes)} axes {fact.axes}.")
    if fact.optimizer == "muon" and param.ndim < 2:
        raise ValueError(f"{name} has shape {param.shape}: Muon needs a matrix in the last two dimensions; use adamw.")
    if fact.optimizer != "none" and param.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name} is {param.dtype}: the optimizer moves FP32 master weights; cast it to float32.")


def _same_structure(tree: Tree, facts: Tree, what: str) -> None:
    paths = [{jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(t)}
             for t in (tree, facts)]  # fmt: skip
    if paths[0] != paths[1]:
        extra, missing = sorted(paths[0] - paths[1]), sorted(paths[1] - paths[0])
        raise ValueError(f"{what} must have the structure of the facts; without a fact: {extra}; missing: {missing}.")
