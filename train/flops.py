"""Model FLOPs per token, from the configuration: what a perfect program would multiply, whatever ours does.

Counted: matrix products with the parameters that a token uses, attention over what each query sees, index scores.
Not counted: element-wise work (norms, stream mixing), rematerialisation, padding, the targets of the index loss.
"""

from __future__ import annotations

import math

import numpy as np

from dsv4_jax.analysis.flops import baseline_pair
from dsv4_jax.config import CSA, DeepseekV4Config, LayerSpec
from dsv4_jax.layer_plan import BASELINE_KINDS, GQA, MLA_SPARSE
from dsv4_jax.shapes import Shapes, block_shapes, is_table, mtp_shapes, top_shapes
from train.losses import OBJECTIVES
from train.step import Kind


def training_flops_per_token(config: DeepseekV4Config, length: int, kind: Kind) -> float:
    """Mean over the tokens of a row of `length`: forward and backward (twice the forward) of what a stage trains."""
    objective = OBJECTIVES[kind]
    blocks = config.layers + (config.mtp_layers[:1] if objective.language else ())
    backbone = sum(_block(config, spec, length, objective.attention) for spec in blocks)
    indexers = sum(_indexer(config, spec, length) for spec in blocks) if objective.index_loss else 0.0
    if not objective.language:
        return backbone + 3 * indexers  # the frozen backbone runs forward only
    return 3 * (backbone + indexers + _ends(config))


def _block(c: DeepseekV4Config, spec: LayerSpec, length: int, attention: str) -> float:
    shapes = {path: shape for path, shape in block_shapes(c, spec).items() if "/indexer/" not in path}
    if spec.attention in BASELINE_KINDS:
        limit = c.index_topk if spec.attention == MLA_SPARSE and attention == "sparse" else length
        return 2 * _matrices(c, shapes) + _baseline_pair(c, spec) * mean_visible(length, 1, limit)
    seen = mean_visible(length, 1, c.sliding_window)
    if spec.ratio:
        limit = c.index_topk if spec.attention == CSA and attention == "sparse" else length
        seen += mean_visible(length, spec.ratio, limit)
    return 2 * _matrices(c, shapes) + 4 * c.num_attention_heads * c.head_dim * seen


def _indexer(c: DeepseekV4Config, spec: LayerSpec, length: int) -> float:
    if spec.attention not in (CSA, MLA_SPARSE):
        return 0.0
    shapes = {path: shape for path, shape in block_shapes(c, spec).items() if "/indexer/" in path}
    seen = mean_visible(length, spec.ratio or 1, length)
    return 2 * _matrices(c, shapes) + 2 * c.index_n_heads * c.index_head_dim * seen


def _baseline_pair(c: DeepseekV4Config, spec: LayerSpec) -> int:
    """FLOPs of a query over one token; of latents, or of the keys and values that heads make of them, the fewer."""
    absorbed, sizes = baseline_pair(c, spec.attention), c.baseline
    if spec.attention == GQA:
        return absorbed
    expanded = sizes.qk_nope_head_dim + c.qk_rope_head_dim + sizes.v_head_dim
    return min(absorbed, 2 * c.num_attention_heads * expanded)


def _ends(c: DeepseekV4Config) -> float:
    """Head read and output matrix; with MTP those once more, and its two projections (h_proj on every stream)."""
    output = c.hidden_size * c.vocab_size
    total = output + math.prod(top_shapes(c)["hc_head/fn"])
    if c.mtp_layers:
        head_read = math.prod(mtp_shapes(c, c.mtp_layers[0])["hc_head/fn"])
        total += output + head_read + (1 + c.hc_mult) * c.hidden_size**2
    return 2.0 * total


def mean_visible(length: int, ratio: int, limit: int) -> float:
    """Entries of `ratio` tokens that a query sees, at most `limit`: the mean over the places of a row of `length`."""
    return float(np.minimum(np.arange(1, length + 1) // ratio, limit).mean())


def _matrices(c: DeepseekV4Config, shapes: Shapes) -> float:
    """Elements of the matrices that multiply one token; of the routed experts its share."""
    total = 0.0
    for path, shape in shapes.items():
        if len(shape) > 1 and not is_table(path) and not path.endswith("ape"):
            routed = "/experts/" in f"/{path}"
            total += math.prod(shape) * (c.num_experts_per_tok / c.n_routed_experts if routed else 1)
    return total
