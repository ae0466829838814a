"""Low-rank adaptation as a transform of the parameter tree; no module knows of it.

A target matrix W [in, out] is computed with as W + alpha / rank * A B, with A [in, rank] and B [rank, out] (Hu et al.
2021, arXiv 2106.09685). Stacked matrices have stacked adapters: one for each layer, expert and output group. B starts
at zero, so an adapted model starts as the model it adapts.

The mHC maps are made doubly stochastic by Sinkhorn inside every forward pass, from generators. No change of a generator
can therefore leave the manifold, as far as Sinkhorn's rounds converge; it can only move the maps along it. `streams`
says whether it may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsv4_jax.errors import UserError
from dsv4_jax.facts import Fact
from dsv4_jax.shapes import flatten, nest

Tree = Any
Adapters = dict[str, Any]
"""The tree of the parameters with the targets alone, each as its "a" [.., in, rank] and "b" [.., rank, out]."""

TARGETS = ("attn", "compressor", "indexer", "shared", "experts", "router", "mtp")


@dataclass(frozen=True)
class Lora:
    """Which matrices are adapted, and how.

    Attributes:
        rank: of every adapter.
        alpha: the product of an adapter counts alpha / rank.
        targets: of `TARGETS`; "shared" and "experts" are the shared and the routed experts.
        streams: "held" leaves the generators of the mHC maps as they are, which respects what pretraining made of the
            manifold; "adapted" puts adapters on them too.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn", "shared")
    streams: Literal["held", "adapted"] = "held"

    def problems(self) -> list[str]:
        """What is wrong with it."""
        unknown = [name for name in self.targets if name not in TARGETS]
        found = [f"lora.targets has {unknown}; there are {', '.join(TARGETS)}"] if unknown else []
        found += [] if self.rank > 0 else [f"lora.rank is {self.rank}, at least 1 is needed"]
        return found + ([] if self.targets or self.streams == "adapted" else ["lora.targets is empty"])

    def adapts(self, fact: Fact) -> bool:
        """Whether a parameter is a target: a matrix of one of the groups."""
        if fact.optimizer != "muon":
            return False
        if fact.role == "hc":
            return self.streams == "adapted"
        return target_of(fact) in self.targets


def target_of(fact: Fact) -> str:
    """The name in `TARGETS` of a matrix's group."""
    return "shared" if fact.role == "experts" and "experts" not in fact.axes else fact.role


def init(lora: Lora, facts: Tree, shapes: Tree, key: jax.Array) -> Adapters:
    """Fresh adapters, float32: A is normal with deviation 1 / sqrt(in), B is zero.

    Args:
        lora: the targets.
        facts: `weights.facts`.
        shapes: the parameters, or abstract arrays.
        key: of the random numbers.

    Raises:
        UserError: when the model has none of the targets, or an adapter would be no smaller than its matrix.
    """
    shapes, made = flatten(shapes), {}
    targets = [path for path, fact in flatten(facts).items() if lora.adapts(fact)]
    if not targets:
        raise UserError(f"the model has no matrix of {', '.join(lora.targets)} to adapt")
    for path, part in zip(targets, jax.random.split(key, len(targets)), strict=True):
        *stacked, rows, columns = shapes[path].shape
        if lora.rank * (rows + columns) >= rows * columns:
            raise UserError(f"lora.rank {lora.rank} is no low rank for {path}, a matrix of {rows} x {columns}")
        a = jax.random.normal(part, (*stacked, rows, lora.rank), jnp.float32) * rows**-0.5
        made |= {f"{path}/a": a, f"{path}/b": jnp.zeros((*stacked, lora.rank, columns), jnp.float32)}
    return nest(made)


def adapter_facts(lora: Lora, facts: Tree) -> Tree:
    """The facts beside `init`'s adapters: AdamW moves them, where their matrix's role trains."""
    made = {}
    for path, fact in flatten(facts).items():
        if lora.adapts(fact):
            *stacked, inner, outer = fact.axes
            made[f"{path}/a"] = Fact((*stacked, inner, "lora"), "adamw", fact.role)
            made[f"{path}/b"] = Fact((*stacked, "lora", outer), "adamw", fact.role)
    return nest(made)


def adapted_paths(adapters: Adapters) -> list[str]:
    """Paths of the adapted matrices, "segments/0/1/attn/wq_a"."""
    return [path.removesuffix("/a") for path in flatten(adapters) if path.endswith("/a")]


def merged(lora: Lora, params: Tree, adapters: Adapters) -> Tree:
    """The parameters that are computed with, in the structure of `params`: W + alpha / rank * A B."""
    leaves, factors = flatten(params), flatten(adapters)
    for path in adapted_paths(adapters):
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        leaves[path] = leaves[path] + (lora.alpha / lora.rank * update).astype(leaves[path].dtype)
    return nest(leaves)
