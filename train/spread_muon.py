"""Muon over many devices: every matrix is orthogonalised whole, on one device, and all devices get equally many.

Left to itself the partitioner multiplies sharded matrices, which all-reduces a Gram matrix in every one of the ten
iterations. Instead the matrices of one shape are dealt out: the axis that counts them is spread over all devices
(padded with zero matrices, which stay zero), one reshard in and one out, and nothing travels in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.facts import Fact
from sharding.rules import Strategy, spec
from train.newton_schulz import orthogonalize_columns

# Devices take matrices in the order in which the strategies' state rules cut a weight's wide dimension, and experts'
# weights are cut by expert first: then one all-to-all moves parts to whole matrices, and nothing is gathered.
ORDER = ("fsdp", "expert", "context", "data", "tensor")
EXPERT_ORDER = ("expert", "fsdp", "context", "data", "tensor")


@dataclass(frozen=True)
class SpreadMuon:
    """`newton_schulz.orthogonalize_all` for arrays that lie on a mesh.

    Attributes:
        mesh: the devices; all its axes share the matrices.
        strategy: by whose rules for the state the arrays lie on it.
    """

    mesh: Mesh
    strategy: Strategy

    def __call__(
        self, arrays: Sequence[jax.Array], facts: Sequence[Fact], dtype: jax.typing.DTypeLike | None = None
    ) -> list[jax.Array]:
        """Each array's matrices (the last two dimensions) orthogonalised; other layouts of the same numbers."""
        results: dict[int, jax.Array] = {}
        for members in self._batches(arrays, facts):
            counted = [_matrices(arrays[i], facts[i]) for i in members]
            stack = jnp.concatenate(counted) if len(counted) > 1 else counted[0]
            done = self._orthogonalize(stack, arrays[members[0]], facts[members[0]], dtype)
            ends = [sum(len(x) for x in counted[: k + 1]) for k in range(len(counted) - 1)]
            for i, part in zip(members, jnp.split(done, ends), strict=True):
                results[i] = _unmatrices(part, arrays[i], facts[i])
        return [results[i] for i in range(len(arrays))]

    def share(self, arrays: Sequence[jax.Array], facts: Sequence[Fact]) -> dict[tuple[int, ...], tuple[int, int]]:
        """By matrix shape: how many matrices there are, and how many one device orthogonalises (padding included)."""
        shares: dict[tuple[int, ...], tuple[int, int]] = {}
        for members in self._batches(arrays, facts):
            count = sum(math.prod(arrays[i].shape[:-2]) for i in members)
            shape = tuple(sorted(arrays[members[0]].shape[-2:]))
            before = shares.get(shape, (0, 0))
            owners = self.mesh.shape["expert"] if "experts" in facts[members[0]].axes[:-2] else 1
            shares[shape] = before[0] + count, before[1] + -(-count // owners // (self.mesh.size // owners))
        return shares

    def _batches(self, arrays: Sequence[jax.Array], facts: Sequence[Fact]) -> list[list[int]]:
        """Indices of arrays that are dealt out together: of one shape, and all or none of them counted by a mesh axis.

        Those that are already spread go one by one: joining them would move them once more.
        """
        batches: dict[tuple[int, ...], list[int]] = {}
        for i, (x, fact) in enumerate(zip(arrays, facts, strict=True)):
            alone = (i,) if "experts" in fact.axes[:-2] else ()
            batches.setdefault((*sorted(x.shape[-2:]), *alone), []).append(i)
        return list(batches.values())

    def _orthogonalize(
        self, stack: jax.Array, like: jax.Array, fact: Fact, dtype: jax.typing.DTypeLike | None
    ) -> jax.Array:
        """[M, rows, cols] with rows <= cols; padded on each owner of experts to a multiple of the devices it shares.

        Padding and its removal happen while every device has its part of each matrix, as the state lies: between that
        layout and whole matrices both dimensions divide, and the partitioner has no reason to gather.
        """
        experts = "experts" in fact.axes[:-2]
        owners = self.mesh.shape["expert"] if experts else 1
        sharing = self.mesh.size // owners
        by_owner = stack.reshape(owners, -1, *stack.shape[1:])
        count = by_owner.shape[1]
        own = -(-count // sharing)
        order, parts = EXPERT_ORDER if experts else ORDER, self._parts(like, fact, experts)
        padded = jnp.pad(by_owner, ((0, 0), (0, own * sharing - count), (0, 0), (0, 0)))
        padded = self._constrain(padded, *parts)
        dealt = self._constrain(padded.reshape(-1, own, *stack.shape[1:]), order)
        done = orthogonalize_columns(dealt.swapaxes(0, 1), dtype).swapaxes(0, 1)
        back = self._constrain(self._constrain(done, order).reshape(padded.shape), *parts)
        return back[:, :count].reshape(stack.shape)

    def _parts(self, like: jax.Array, fact: Fact, experts: bool) -> tuple[Any, ...]:
        """Mesh axes of [owners, matrices, rows, cols] as the state lies."""
        state = self.strategy.state or self.strategy.parameters
        rules = {name: tuple(a for a in axes if not (experts and a == "expert")) for name, axes in state.items()}
        lies = spec(rules, fact.axes[-2:], self.mesh, like.shape[-2:])
        rows, cols = (*lies, None, None)[:2]
        turned = like.shape[-2] > like.shape[-1]
        return "expert" if experts else None, None, *((cols, rows) if turned else (rows, cols))

    def _constrain(self, x: jax.Array, *axes: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


def _matrices(x: jax.Array, fact: Fact) -> jax.Array:
    """[.., rows, cols] as [M, smaller, larger] in FP32 at least; a dimension of experts counts slowest."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if "experts" in fact.axes[:-2]:
        x = jnp.moveaxis(x, fact.axes.index("experts"), 0)
    x = x.reshape(-1, *x.shape[-2:])
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _unmatrices(y: jax.Array, like: jax.Array, fact: Fact) -> jax.Array:
    """The inverse of `_matrices`."""
    y = y.mT if like.shape[-2] > like.shape[-1] else y
    if "experts" in fact.axes[:-2]:
        place = fact.axes.index("experts")
        lead = [size for axis, size in enumerate(like.shape) if axis != place]
        return jnp.moveaxis(y.reshape(like.shape[place], *lead), 0, place).astype(like.dtype)
    return y.reshape(like.shape).astype(like.dtype)
