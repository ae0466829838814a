"""How much a precision policy changes what it rounds, by tensor role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax import weights
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels.grouped_matmul import Groups, collect, make_groups
from dsv4_jax.layers.experts import Matrices, hidden_rows, tile_rows
from dsv4_jax.observer import Passed
from dsv4_jax.quantization.policy import WEIGHTS, Policy, weight_role

Sums = dict[str, jax.Array]
"""By role the squared error of rounding and the square of what was rounded, [.., 2] float32: to be summed."""


@dataclass(frozen=True)
class Measured(Policy):
    """A policy that also notes, while a forward is traced, the sums of everything it rounds.

    One such object serves one forward. Whoever knows where values may leave the code at hand calls `take` there.
    """

    notes: list[tuple[str, jax.Array]] = field(default_factory=list, compare=False)

    def __call__(self, role: str, x: jax.Array) -> jax.Array:
        """See `Policy`."""
        rounded = super().__call__(role, x)
        if role in self.rounding:
            self.notes.append((role, error_sums(x, rounded)))
        return rounded

    def __hash__(self) -> int:
        """As of the policy."""
        return super().__hash__()

    def take(self, roles: Sequence[str] | None = None) -> Sums:
        """The sums [B, 1, 2] noted since the last `take`, of some roles or of all."""
        wanted = [note for note in self.notes if roles is None or note[0] in roles]
        self.notes[:] = [] if roles is None else [note for note in self.notes if note[0] not in roles]
        names = sorted({role for role, _ in wanted})
        return {name: sum((sums for role, sums in wanted if role == name), jnp.zeros(())) for name in names}


def error_sums(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """[B, 1, 2] of arrays [B, ..]: squared error and square, summed over all axes but the first."""
    exact, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
    parts = jnp.square(rounded.astype(jnp.float32) - exact), jnp.square(exact)
    return jnp.stack([part.sum(axes) for part in parts], axis=-1)[:, None]


def expert_sums(seen: Passed) -> jax.Array:
    """The sums [B, 1, 2] of the experts' hidden activations, computed again on whichever devices hold the experts."""
    config, policy = seen.ffn.experts.config, Policy(seen.options.attention.policy.rounding)
    x = policy("expert_input", seen.x)
    apply = partial(_token_sums, config.swiglu_limit, policy)
    routing, matrices = seen.routing, seen.ffn.experts.matrices()
    sums = seen.options.partition.experts(apply, matrices, x, routing.expert_ids, routing.weights)
    return sums[..., :2].astype(jnp.float32).sum(1, keepdims=True)


def _token_sums(
    limit: float, policy: Policy, experts: Matrices, x: jax.Array, expert_ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """As `apply_experts`, but the first two of D columns are each token's sums and the others zero."""
    count = len(experts.w1)
    groups: Groups = make_groups(expert_ids, count, tile_rows(expert_ids.size, count))
    hidden = hidden_rows(limit, experts, x, weights, groups)
    sums = error_sums(hidden, policy("expert_input", hidden))[:, 0]
    return collect(jnp.pad(sums, ((0, 0), (0, x.shape[1] - 2))), groups).astype(x.dtype)


def weight_sums(config: DeepseekV4Config, policy: Policy, params: Any) -> list[Sums]:
    """The sums [2] of the matrices of each block, the MTP block last, and of the module around it."""
    if not policy.rounding.keys() & set(WEIGHTS):
        return [{} for _ in config.layers + config.mtp_layers[:1]]
    facts = weights.facts(config)
    rounded = policy.weights(facts, params)
    layers: list[Sums] = []
    for i, segment in enumerate(config.segments):
        parts = [tree["segments"][str(i)] for tree in (facts, params, rounded)]
        for repeat in range(segment.repeats):
            own = [part[repeat] if isinstance(part, list) else part for part in parts]
            at = None if isinstance(parts[1], list) else repeat
            layers += [_tree_sums(policy, [tree[str(j)] for tree in own], at) for j in range(len(segment.unit))]
    if config.mtp_layers:
        layers.append(_tree_sums(policy, [tree["mtp"]["0"] for tree in (facts, params, rounded)], None))
    return layers


def _tree_sums(policy: Policy, trees: Sequence[Any], at: int | None) -> Sums:
    """The sums of trees of facts, arrays and rounded arrays; where arrays are stacked, of the part `at`."""
    take = lambda x: x if at is None else x[at]  # noqa: E731
    total: Sums = {}
    for fact, x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        role = weight_role(fact)
        if role in policy.rounding and role is not None:
            total[role] = total.get(role, 0.0) + error_sums(take(x)[None], take(y)[None])[0, 0]
    return total


def relative(sums: jax.Array) -> jax.Array:
    """Root mean square of the error over that of the values, from sums [.., 2] added up."""
    error, square = sums.reshape(-1, 2).sum(0)
    return jnp.sqrt(error / jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
