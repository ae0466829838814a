"""FLOPs of one token at the end of a context, by component and by the format that its products multiply.

A multiplication and its addition are two FLOPs. Counted: products with the parameters that the token uses, its
attention over what it sees, its index scores. Not counted: element-wise work (norms, softmaxes, mixing of streams,
pooling), the choice of the top k. No MTP: it drafts, and is counted by nobody else either.

Formats: a product multiplies in the format its matrix is stored in; FP4 experts are widened to FP8 without loss and
multiply as FP8 (report 3.4). Attention multiplies in BF16, since entries are widened when they are read. Index scores
multiply in the cache's own format, FP4 in V4 and FP8 in V3.2.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from dsv4_jax.analysis.count import COMPONENTS, component_of
from dsv4_jax.analysis.hardware import Operand
from dsv4_jax.analysis.weight_bytes import Weights, stored_format
from dsv4_jax.config import CSA, DeepseekV4Config
from dsv4_jax.layer_plan import BASELINE_KINDS, GQA, MLA_SPARSE, AttentionKind
from dsv4_jax.shapes import Shapes, block_shapes, is_table, top_shapes

# One FP8 product counts once. Peak rates double with each halving of the width, on all hardware that has the formats.
IN_FP8: dict[Operand, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0, "float32": 4.0}
WINDOW, CHOSEN, ALL, SCORES = "attention: window", "attention: CSA", "attention: HCA", "index scores"
BASELINE = "attention: baseline"
_OPERAND: dict[str, Operand] = {"fp4": "fp8", "fp8": "fp8", "bf16": "bf16", "float32": "float32"}


@dataclass(frozen=True)
class Product:
    """FLOPs of one component in one format."""

    component: str
    operand: Operand
    flops: float

    @property
    def in_fp8(self) -> float:
        """FLOPs in equivalents of FP8."""
        return self.flops * IN_FP8[self.operand]


def token_products(
    config: DeepseekV4Config, context: int, weights: Weights = "released", cache: str = "deployed"
) -> tuple[Product, ...]:
    """The products of the token that makes a sequence `context` tokens long."""
    return matrix_products(config, weights) + attention_products(config, context, cache)


def in_fp8(products: Iterable[Product]) -> float:
    """FLOPs of all products in equivalents of FP8, as the report counts them."""
    return sum(product.in_fp8 for product in products)


def matrix_products(config: DeepseekV4Config, weights: Weights = "released") -> tuple[Product, ...]:
    """Products with parameters, in the order of `analysis.count.COMPONENTS`."""
    sums: dict[tuple[str, Operand], float] = defaultdict(float)
    head: Shapes = {"head": (config.hidden_size, config.vocab_size)}  # a tied embedding multiplies just as well
    trees = [({**top_shapes(config), **head}, 1)]
    trees += [(block_shapes(config, spec), number) for spec, number in Counter(config.layers).items()]
    for shapes, number in trees:
        for path, shape in shapes.items():
            if _multiplies(path, len(shape)):
                share = config.num_experts_per_tok / config.n_routed_experts if _is_routed(path) else 1.0
                operand = _OPERAND[stored_format(path, weights)]
                sums[component_of(path), operand] += 2 * number * math.prod(shape) * share
    ranked = sorted(sums.items(), key=lambda item: COMPONENTS.index(item[0][0]))
    return tuple(Product(component, operand, flops) for (component, operand), flops in ranked)


def attention_products(config: DeepseekV4Config, context: int, cache: str = "deployed") -> tuple[Product, ...]:
    """Products with cached entries: queries with them as keys, probabilities with them as values; index scores."""
    c, pair = config, 4 * config.num_attention_heads * config.head_dim
    seen: dict[str, float] = defaultdict(float)
    for layer in c.layers:
        if layer.attention in BASELINE_KINDS:
            sparse = layer.attention == MLA_SPARSE
            seen[BASELINE] += baseline_pair(c, layer.attention) * (min(context, c.index_topk) if sparse else context)
            seen[SCORES] += 2 * c.index_n_heads * c.index_head_dim * context * sparse
            continue
        seen[WINDOW] += pair * min(context, c.sliding_window)
        entries = context // layer.ratio if layer.ratio else 0
        if layer.attention == CSA:
            seen[CHOSEN] += pair * min(entries, c.index_topk)
            seen[SCORES] += 2 * c.index_n_heads * c.index_head_dim * entries
        elif layer.ratio:
            seen[ALL] += pair * entries
    index: Operand = {"deployed": "fp4", "bfloat16": "bf16"}.get(cache, "float32")  # type: ignore[assignment]
    return tuple(Product(name, index if name == SCORES else "bf16", flops) for name, flops in seen.items() if flops)


def baseline_pair(config: DeepseekV4Config, kind: AttentionKind) -> int:
    """FLOPs of a query over one cached token in a baseline layer: all heads, scores and values.

    Of latents as they are cached: every head multiplies the whole entry as key, and its latent as value.
    """
    heads = config.num_attention_heads
    if kind == GQA:
        return 4 * heads * config.head_dim
    return 2 * heads * (2 * config.baseline.kv_lora_rank + config.qk_rope_head_dim)


def _multiplies(path: str, axes: int) -> bool:
    return axes > 1 and not is_table(path) and not path.endswith("ape") and path != "embed"


def _is_routed(path: str) -> bool:
    return "/experts/" in f"/{path}"
