"""What a variant of an ablation costs: parameters, FLOPs of a token and bytes of a cache, from its configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dsv4_jax.analysis.count import total_parameters
from dsv4_jax.analysis.flops import SCORES, token_products
from dsv4_jax.analysis.memory import cache_plan
from train.recipe import Recipe


@dataclass(frozen=True)
class Costs:
    """The price of one variant at the length of its last stage; without an MTP module, which drafts.

    Attributes:
        parameters: all of them.
        flops: of the row's last token, forward; a multiplication and its addition are two.
        cache_token: bytes that a BF16 cache grows by per token.
        cache_row: bytes that it holds of a row, windows and incomplete blocks included.
        length: tokens of the row.
    """

    parameters: int
    flops: float
    cache_token: float
    cache_row: int
    length: int


def costs_of(recipe: Recipe) -> dict[str, Any]:
    """`Costs` as JSON. Where the last stage attends all entries, no index score is counted."""
    config, last = recipe.model.config, recipe.stages[-1]
    length, stack = last.sequence_length, config.replace(num_nextn_predict_layers=0)
    sparse = last.kind == "sparse"
    seen = stack if sparse else stack.replace(index_topk=length)
    unused = () if sparse else (SCORES, "indexers")
    flops = sum(p.flops for p in token_products(seen, length, "bf16", "bfloat16") if p.component not in unused)
    plan = cache_plan(stack, "bfloat16")
    return asdict(Costs(total_parameters(config), flops, plan.token, plan.sequence(length), length))
