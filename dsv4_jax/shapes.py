"""The parameter tree as shapes, from the configuration alone: nothing is allocated and JAX is not imported.

Leaves are named by their path (`"segments/2/0/attn/wq_a"`). Matrices are `[in, out]`; the blocks of a segment are
stacked in a leading axis over its repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4_jax.config import CSA, DeepseekV4Config, LayerSpec
from dsv4_jax.layer_plan import BASELINE_KINDS, GQA, MLA_SPARSE

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def tree_shapes(config: DeepseekV4Config) -> Shapes:
    """Path and shape of every leaf, with the leading `repeats` axis of stacked blocks."""
    shapes = top_shapes(config)
    for name, segment in enumerate(config.segments):
        for position, spec in enumerate(segment.unit):
            block = {key: (segment.repeats, *shape) for key, shape in block_shapes(config, spec).items()}
            shapes |= _under(f"segments/{name}/{position}", block)
    for module, spec in enumerate(config.mtp_layers):
        shapes |= _under(f"mtp/{module}", mtp_shapes(config, spec))
    return shapes


def top_shapes(config: DeepseekV4Config) -> Shapes:
    """Embedding, output matrix (absent when tied to the embedding), last norm and the head's stream read."""
    c = config
    head: Shapes = {} if c.tie_word_embeddings else {"head": (c.hidden_size, c.vocab_size)}
    return {"embed": (c.vocab_size, c.hidden_size), **head, "norm": (c.hidden_size,), **_under("hc_head", _hc_head(c))}


def block_shapes(config: DeepseekV4Config, spec: LayerSpec) -> Shapes:
    """One block, unstacked."""
    c = config
    return {
        **_under("hc_attn", _hc(c)),
        **_under("hc_ffn", _hc(c)),
        "attn_norm": (c.hidden_size,),
        "ffn_norm": (c.hidden_size,),
        **_under("attn", (_baseline if spec.attention in BASELINE_KINDS else _attention)(c, spec)),
        **_under("ffn", _experts(c, spec)),
    }


def mtp_shapes(config: DeepseekV4Config, spec: LayerSpec) -> Shapes:
    """One multi-token-prediction module: a block and what joins it to the main stack."""
    width = config.hidden_size
    joints: Shapes = {"e_proj": (width, width), "h_proj": (width, width)}
    norms: Shapes = {name: (width,) for name in ("enorm", "hnorm", "norm")}
    return _under("block", block_shapes(config, spec)) | joints | norms | _under("hc_head", _hc_head(config))


def layer_slots(config: DeepseekV4Config) -> Iterator[tuple[LayerSpec, str, int]]:
    """For every block of the main stack in order: its spec, its path in the tree, its index in the stacked axis."""
    for name, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for position, spec in enumerate(segment.unit):
                yield spec, f"segments/{name}/{position}", repeat


def keeps_float32(path: str) -> bool:
    """Whether the leaf stays float32 in every checkpoint: stream maps, sinks, position biases, router biases."""
    return path.endswith(("attn_sink", "ape", "gate/bias")) or any(part.startswith("hc_") for part in path.split("/"))


def is_table(path: str) -> bool:
    """Whether the leaf is an integer table (the experts of hash routing)."""
    return path.endswith("tid2eid")


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a/b": x}`; the inverse of `nest`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return leaves


def _hc(c: DeepseekV4Config) -> Shapes:
    mixes = (2 + c.hc_mult) * c.hc_mult
    return {"fn": (c.hc_mult * c.hidden_size, mixes), "base": (mixes,), "scale": (3,)}


def _hc_head(c: DeepseekV4Config) -> Shapes:
    return {"fn": (c.hc_mult * c.hidden_size, c.hc_mult), "base": (c.hc_mult,), "scale": (1,)}


def _attention(c: DeepseekV4Config, spec: LayerSpec) -> Shapes:
    queries = c.num_attention_heads * c.head_dim
    shapes: Shapes = {
        "wq_a": (c.hidden_size, c.q_lora_rank),
        "q_norm": (c.q_lora_rank,),
        "wq_b": (c.q_lora_rank, queries),
        "wkv": (c.hidden_size, c.head_dim),
        "kv_norm": (c.head_dim,),
        "attn_sink": (c.num_attention_heads,),
        "wo_a": (c.o_groups, queries // c.o_groups, c.o_lora_rank),
        "wo_b": (c.o_groups * c.o_lora_rank, c.hidden_size),
    }
    if spec.ratio:
        series = 2 if spec.attention == CSA else 1  # CSA pools two overlapping series
        shapes |= _under("compressor", _compressor(c, spec.ratio, series, c.head_dim))
    if spec.attention == CSA:
        shapes |= _under("indexer", _indexer(c, spec.ratio))
    return shapes


def _baseline(c: DeepseekV4Config, spec: LayerSpec) -> Shapes:
    heads, width, sizes, rope = c.num_attention_heads, c.hidden_size, c.baseline, c.qk_rope_head_dim
    if spec.attention == GQA:
        wide, narrow = heads * c.head_dim, sizes.num_key_value_heads * c.head_dim
        return {"wq": (width, wide), "wk": (width, narrow), "wv": (width, narrow), "wo": (wide, width)}
    shapes: Shapes = {
        "wq_a": (width, c.q_lora_rank),
        "q_norm": (c.q_lora_rank,),
        "wq_b": (c.q_lora_rank, heads * (sizes.qk_nope_head_dim + rope)),
        "wkv_a": (width, sizes.kv_lora_rank + rope),
        "kv_norm": (sizes.kv_lora_rank,),
        "wkv_b": (sizes.kv_lora_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)),
        "wo": (heads * sizes.v_head_dim, width),
    }
    if spec.attention == MLA_SPARSE:
        key = c.index_head_dim
        shapes |= {"indexer/wq_b": (c.q_lora_rank, c.index_n_heads * key), "indexer/wk": (width, key)}
        shapes |= {"indexer/k_norm": (key,), "indexer/k_norm_bias": (key,)}
        shapes["indexer/weights_proj"] = (width, c.index_n_heads)
    return shapes


def _compressor(c: DeepseekV4Config, ratio: int, series: int, width: int) -> Shapes:
    wide = series * width
    return {"wkv": (c.hidden_size, wide), "wgate": (c.hidden_size, wide), "ape": (ratio, wide), "norm": (width,)}


def _indexer(c: DeepseekV4Config, ratio: int) -> Shapes:
    return {
        "wq_b": (c.q_lora_rank, c.index_n_heads * c.index_head_dim),
        "weights_proj": (c.hidden_size, c.index_n_heads),
        **_under("compressor", _compressor(c, ratio, 2, c.index_head_dim)),
    }


def _experts(c: DeepseekV4Config, spec: LayerSpec) -> Shapes:
    experts, width, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    hashed = spec.routing == "hash_moe"
    bias: Shapes = {"gate/bias": (experts,)} if c.topk_method == "noaux_tc" else {}
    choice = {"gate/tid2eid": (c.vocab_size, c.num_experts_per_tok)} if hashed else bias
    mlp: Shapes = {"w1": (width, inner), "w3": (width, inner), "w2": (inner, width)}
    routed = {name: (experts, *shape) for name, shape in mlp.items()}
    shared = _under("shared_experts", mlp) if c.n_shared_experts else {}
    return {"gate/weight": (width, experts), **choice, **_under("experts", routed), **shared}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}/{name}": shape for name, shape in shapes.items()}
