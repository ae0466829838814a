"""The architecture as one frozen dataclass with the released field names, and the layer plan derived from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv4_jax.baseline import SIZES, BaselineSizes
from dsv4_jax.config_checks import FLOATS, ConfigError, check_plan, check_values, nearest, refuse_unknown
from dsv4_jax.layer_plan import (
    CSA,
    HCA,
    MLA_SPARSE,
    RELEASED_KINDS,
    SLIDING,
    AttentionKind,
    LayerSpec,
    RoutingKind,
    Segment,
    find_segments,
)

__all__ = [
    "CSA",
    "HCA",
    "SLIDING",
    "AttentionKind",
    "ConfigError",
    "DeepseekV4Config",
    "LayerSpec",
    "RoutingKind",
    "Segment",
    "find_segments",
]


@dataclass(frozen=True)
class DeepseekV4Config:
    """A DeepSeek-V4 architecture. Field names and defaults are those of the released config.json (V4-Flash).

    `layer_types` and `mlp_layer_types` are derived from `compress_ratios` and `num_hash_layers` when left out; give
    them for ratios other than 0/4/128 or for hash routing elsewhere than in the first blocks.

    Raises:
        ConfigError: on construction, for values that are wrong or contradict each other.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_nextn_predict_layers: int = 1
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)  # one per layer, then one per MTP module
    layer_types: tuple[AttentionKind, ...] = ()
    num_hash_layers: int = 3
    mlp_layer_types: tuple[RoutingKind, ...] = ()
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    hidden_act: str = "silu"
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Mapping[str, Any] | None = None  # YaRN, used by CSA and HCA layers only
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    expert_dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None
    adaptive_routing_temperature: float = 0.0  # the article's section 3.2; 0 is off, as in every release
    baseline: BaselineSizes = BaselineSizes()  # of layers that are no V4, to compare with; a mapping will do

    def __post_init__(self) -> None:
        """Normalise numbers, check every value, fill the derived fields, check the plan."""
        for name in FLOATS:
            self._fill(name, _as_float(getattr(self, name)))
        if self.rope_scaling is not None:
            self._fill("rope_scaling", {key: _as_float(value) for key, value in self.rope_scaling.items()})
        if isinstance(self.baseline, Mapping):
            refuse_unknown(self.baseline, SIZES, "baseline")
            self._fill("baseline", BaselineSizes(**self.baseline))
        self._fill("compress_ratios", tuple(self.compress_ratios))
        check_values(self)
        self._fill("layer_types", self._attention_kinds())
        self._fill("mlp_layer_types", tuple(self.mlp_layer_types) or self._routing_from_hash_layers())
        self._fill("num_hash_layers", self.mlp_layer_types.count("hash_moe"))
        check_plan(self)

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def __hash__(self) -> int:
        """Hash over the JSON form, so that a config can be a static argument of `jax.jit`."""
        return hash(self._json)

    @cached_property
    def _json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def _attention_kinds(self) -> tuple[AttentionKind, ...]:
        if not self.layer_types:
            return self._kinds_from_ratios()
        kinds = tuple(self.layer_types)
        missing_mtp = len(kinds) == self.num_hidden_layers  # transformers names the kinds of the main stack only
        return kinds + (SLIDING,) * (self.num_nextn_predict_layers if missing_mtp else 0)

    def _kinds_from_ratios(self) -> tuple[AttentionKind, ...]:
        unknown = sorted(set(self.compress_ratios) - set(RELEASED_KINDS))
        if unknown:
            raise ConfigError(
                f"compress_ratios holds {unknown}: only 0 (sliding), 4 (CSA) and 128 (HCA) name an attention kind by "
                "themselves; give layer_types as well for other ratios"
            )
        return tuple(RELEASED_KINDS[r] for r in self.compress_ratios)

    def _routing_from_hash_layers(self) -> tuple[RoutingKind, ...]:
        hashed = min(self.num_hash_layers, self.num_hidden_layers)
        hash_rows: tuple[RoutingKind, ...] = ("hash_moe",) * hashed
        return hash_rows + ("moe",) * (self.num_hidden_layers - hashed)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One spec per block of the main stack."""
        rows = zip(self.layer_types, self.compress_ratios, self.mlp_layer_types, strict=False)
        return tuple(LayerSpec(*row) for row in rows)[: self.num_hidden_layers]

    @cached_property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """One spec per MTP module; their routing is learned."""
        rows = list(zip(self.layer_types, self.compress_ratios, strict=True))[self.num_hidden_layers :]
        return tuple(LayerSpec(kind, ratio, "moe") for kind, ratio in rows)

    @property
    def has_indexer(self) -> bool:
        """Whether any layer chooses by an indexer: a CSA layer, or `mla_sparse`."""
        return CSA in self.layer_types or MLA_SPARSE in self.layer_types

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The stack as few traced blocks: V4-Pro is 2 x HCA hash, 1 x CSA hash, 29 x (HCA, CSA)."""
        return find_segments(self.layers)

    def replace(self, **changes: Any) -> DeepseekV4Config:
        """A copy with `changes`; derived fields are derived anew when what they depend on changes.

        Raises:
            ConfigError: for unknown fields and for values that contradict each other.
        """
        for name in changes:
            if name not in FIELDS:
                raise ConfigError(f"{name} is not a field of the configuration{nearest(name, FIELDS)}")
        if "compress_ratios" in changes:
            changes.setdefault("layer_types", ())
        elif "num_nextn_predict_layers" in changes and "num_hidden_layers" not in changes:
            depth, modules = self.num_hidden_layers, changes["num_nextn_predict_layers"]
            changes["compress_ratios"] = self.compress_ratios[:depth] + (0,) * modules
            changes.setdefault("layer_types", self.layer_types[:depth])
        if {"num_hash_layers", "num_hidden_layers"} & set(changes):
            changes.setdefault("mlp_layer_types", ())
        return dataclasses.replace(self, **changes)


FIELDS = tuple(field.name for field in dataclasses.fields(DeepseekV4Config))


def _as_float(value: Any) -> Any:
    """Integers as floats, so that 16 and 16.0 make one configuration with one hash; anything else as it is."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
