"""What weights weigh, by component and format, from the configuration alone; JAX is not imported.

Written from the release's description (report 3.4) and not from the code that stores, so that each checks the other:
FP8 values with a byte of scale per 128 x 128 tile, FP4 experts with a byte per 32 numbers of the input dimension, the
rest BF16 or float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, get_args

from dsv4_jax.analysis.count import COMPONENTS, component_of
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_checks import nearest
from dsv4_jax.errors import UserError
from dsv4_jax.shapes import Shape, is_table, keeps_float32, tree_shapes

Weights = Literal["released", "fp8", "bf16"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
TABLES = "hash tables"
TILE, FP4_BLOCK = 128, 32
_DENSE = ("attn/wq_a", "attn/wq_b", "attn/wkv", "attn/wo_a", "attn/wo_b", "indexer/wq_b", "e_proj", "h_proj")


@dataclass(frozen=True)
class WeightPart:
    """Numbers of one component in one format, and their bytes with scales."""

    component: str
    format: str
    numbers: int
    bytes: int


def check_weights(weights: str) -> Weights:
    """`weights`, when it is one of `WEIGHTS`.

    Raises:
        UserError: for another name.
    """
    for known in WEIGHTS:
        if weights == known:
            return known
    raise UserError(
        f"there are no weights {weights!r}{nearest(weights, WEIGHTS)}: 'released' (FP4 experts, FP8 projections), "
        "'fp8' (FP8 experts too) or 'bf16'"
    )


def stored_format(path: str, weights: Weights) -> str:
    """How the leaf at `path` is stored: fp4, fp8, bf16, float32, or int64 for tables."""
    if is_table(path):
        return "int64"
    if keeps_float32(path):
        return "float32"
    if weights == "bf16":
        return "bf16"
    if "/experts/" in f"/{path}":
        return "fp4" if weights == "released" else "fp8"
    return "fp8" if path.endswith(_DENSE) or "/shared_experts/" in f"/{path}" else "bf16"


def leaf_bytes(shape: Shape, format: str) -> int:
    """Bytes of matrices `[.., in, out]` in one format, scales included."""
    if format == "fp4":
        *lead, rows, columns = shape
        return math.prod(lead) * columns * (-(-rows // 2) + -(-rows // FP4_BLOCK))
    if format == "fp8":
        *lead, rows, columns = shape
        return math.prod(lead) * (rows * columns + -(-rows // TILE) * -(-columns // TILE))
    return math.prod(shape) * {"bf16": 2, "float32": 4, "int64": 8}[format]


def weight_parts(config: DeepseekV4Config, weights: Weights = "released") -> tuple[WeightPart, ...]:
    """All weights, MTP and tables included, by component and format; components as in `analysis.count`."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for path, shape in tree_shapes(config).items():
        format = stored_format(path, weights)
        size = sizes[TABLES if is_table(path) else component_of(path), format]
        size[0] += math.prod(shape)
        size[1] += leaf_bytes(shape, format)
    order = (*COMPONENTS, TABLES)
    ranked = sorted(sizes.items(), key=lambda item: (order.index(item[0][0]), -item[1][1]))
    return tuple(WeightPart(component, format, *size) for (component, format), size in ranked)


def total_bytes(config: DeepseekV4Config, weights: Weights = "released") -> int:
    """Bytes of all weights."""
    return sum(part.bytes for part in weight_parts(config, weights))
