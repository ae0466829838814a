"""What serving a model at one context takes, whatever the hardware: bytes that stay, bytes and FLOPs per step."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_jax.analysis.count import activated_parameters, total_parameters
from dsv4_jax.analysis.flops import Product, in_fp8, token_products
from dsv4_jax.analysis.memory import cache_parts, cache_plan
from dsv4_jax.analysis.weight_bytes import TABLES, WeightPart, Weights, weight_parts
from dsv4_jax.config import DeepseekV4Config


@dataclass(frozen=True)
class Serving:
    """A model at one context.

    Attributes:
        name: for tables.
        parameters: all of them.
        activated: those that one token uses.
        weights: bytes of all weights.
        dense: bytes of weights that every step reads.
        routed: bytes of the routed experts, of which a step reads those that its tokens choose.
        chosen: experts that a token chooses, as a share of a layer's.
        token: bytes that a sequence's cache grows by per token.
        shareable: bytes of a sequence's cache that other sequences with the same beginning can use.
        own: bytes of a sequence's cache that they cannot.
        read: bytes of the cache that the next token reads.
        products: FLOPs of the next token.
    """

    name: str
    parameters: int
    activated: int
    weights: float
    dense: float
    routed: float
    chosen: float
    token: float
    shareable: float
    own: float
    read: float
    products: tuple[Product, ...]

    @property
    def sequence(self) -> float:
        """Bytes of one sequence's cache."""
        return self.shareable + self.own

    @property
    def flops(self) -> float:
        """FLOPs of one token, in equivalents of FP8."""
        return in_fp8(self.products)

    def agents(self, number: int) -> float:
        """Bytes of the caches of `number` sequences over one document."""
        return self.shareable + number * self.own

    def resident(self, batch: int) -> float:
        """Bytes of weights and of the caches of `batch` sequences that share nothing."""
        return self.weights + batch * self.sequence

    def step_bytes(self, batch: int) -> float:
        """Bytes that one step of `batch` sequences reads.

        Tokens are taken to choose experts evenly and independently: of a layer's experts 1 - (1 - chosen)**batch are
        read on average.
        """
        return self.dense + self.routed * (1 - (1 - self.chosen) ** batch) + batch * self.read


def v4_serving(
    config: DeepseekV4Config,
    context: int,
    weights: Weights = "released",
    cache: str = "deployed",
    name: str = "V4",
    in_words: bool = False,
) -> Serving:
    """Serving `config`: blocks of the pool are shareable, windows, tails and an incomplete block are not.

    With `in_words` the pool is that of TPUs (`cache_plan`).
    """
    plan, parts = cache_plan(config, cache, in_words), weight_parts(config, weights)
    total, routed = sum(part.bytes for part in parts), bytes_of(parts, "routed experts")
    shareable = context // plan.block_tokens * plan.block
    return Serving(
        name=name,
        parameters=total_parameters(config),
        activated=activated_parameters(config),
        weights=total,
        dense=total - routed - bytes_of(parts, "embedding") * (not config.tie_word_embeddings) - bytes_of(parts, "MTP")
        - bytes_of(parts, TABLES),
        routed=routed,
        chosen=config.num_experts_per_tok / config.n_routed_experts,
        token=plan.token,
        shareable=shareable,
        own=plan.sequence(context) - shareable,
        read=sum(part.read for part in cache_parts(config, context, cache, in_words)),
        products=token_products(config, context, weights, cache),
    )  # fmt: skip


def bytes_of(parts: tuple[WeightPart, ...], component: str) -> int:
    """Bytes of one component of `weight_parts`."""
    return sum(part.bytes for part in parts if part.component == component)
