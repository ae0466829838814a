"""Named architectures: the two releases, and three small ones that keep every mechanism of V4."""

from __future__ import annotations

from typing import Any

from dsv4_jax.config import CSA, HCA, SLIDING, AttentionKind, ConfigError, DeepseekV4Config
from dsv4_jax.config_checks import nearest


def preset(name: str) -> DeepseekV4Config:
    """The architecture called `name`, one of `PRESETS`.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, PRESETS)}: presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def article_plan(config: DeepseekV4Config, csa_per_hca: int) -> DeepseekV4Config:
    """The article's layer plan (section 2.3): `csa_per_hca` CSA layers per HCA layer, HCA late in the depth.

    Sliding layers stay where they are. Of the other layers one in `csa_per_hca + 1` (rounded) is HCA; these are spread
    evenly over the last two thirds of the depth, each closing a run of CSA layers. The article names 3 for Pro and 4
    for Flash; the releases alternate one to one instead.

    Raises:
        ConfigError: when `csa_per_hca` is below 1, or `config` has no CSA or HCA layer.
    """
    if csa_per_hca < 1:
        raise ConfigError(f"csa_per_hca is {csa_per_hca}: at least 1 CSA layer per HCA layer")
    ratios = {layer.attention: layer.ratio for layer in reversed(config.layers)}
    if not {CSA, HCA} <= set(ratios):
        raise ConfigError("the article's plan needs a config with both CSA and HCA layers, which give it their ratios")
    depth, ratios[SLIDING] = config.num_hidden_layers, 0
    late = [i for i in range(-(-depth // 3), depth) if config.layer_types[i] != SLIDING]
    wanted = round(sum(layer.ratio > 0 for layer in config.layers) / (csa_per_hca + 1))
    heavy = {late[i] for i in _ends_of_runs(len(late), max(1, wanted))}

    def kind(index: int) -> AttentionKind:
        return SLIDING if config.layer_types[index] == SLIDING else HCA if index in heavy else CSA

    kinds = tuple(kind(index) for index in range(depth))
    modules = (0,) * config.num_nextn_predict_layers
    return config.replace(layer_types=kinds, compress_ratios=tuple(ratios[k] for k in kinds) + modules)


def _ends_of_runs(length: int, runs: int) -> list[int]:
    """The last index of each of `runs` runs that cover `range(length)`, longer runs first: few segments to trace."""
    short, longer = divmod(length, runs)
    ends = [(i + 1) * short + min(i + 1, longer) - 1 for i in range(runs)]
    return [end for end in ends if end >= 0]


def _yarn(factor: float, original: int) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
    }


_RELEASED: dict[str, Any] = {
    "rope_scaling": _yarn(16, 65536),
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}

PRESETS: dict[str, DeepseekV4Config] = {
    "v4-pro": DeepseekV4Config(
        hidden_size=7168,
        num_hidden_layers=61,
        compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        **_RELEASED,
    ),
    "v4-flash": DeepseekV4Config(**_RELEASED),
    "nano": DeepseekV4Config(
        vocab_size=8192,
        hidden_size=192,
        num_hidden_layers=5,
        compress_ratios=(0, 4, 32, 4, 32, 0),
        layer_types=(SLIDING, CSA, HCA, CSA, HCA),
        num_hash_layers=1,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=96,
        o_groups=2,
        o_lora_rank=48,
        sliding_window=64,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        max_position_embeddings=4096,
        rope_scaling=_yarn(4, 1024),
    ),
    "mini": DeepseekV4Config(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=11,
        compress_ratios=(0, 0, *(4, 128) * 4, 4, 0),
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=32,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        max_position_embeddings=16384,
        rope_scaling=_yarn(4, 4096),
    ),
    "small": DeepseekV4Config(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=13,
        compress_ratios=(0, 0, *(4, 128) * 5, 4, 0),
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=512,
        o_groups=4,
        o_lora_rank=512,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=256,
        n_routed_experts=48,
        num_experts_per_tok=6,
        moe_intermediate_size=384,
        max_position_embeddings=65536,
        rope_scaling=_yarn(16, 4096),
    ),
}
