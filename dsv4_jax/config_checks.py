"""What makes a configuration impossible: each rule with the sentence that says what would be right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsv4_jax.baseline import wrong_sizes
from dsv4_jax.errors import UserError
from dsv4_jax.layer_plan import ATTENTION_KINDS, BASELINE_KINDS, ROUTING_KINDS, SLIDING

if TYPE_CHECKING:
    from dsv4_jax.config import DeepseekV4Config

POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
POSITIVE_FLOATS = ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "compress_rope_theta", "initializer_range")
FLOATS = (*POSITIVE_FLOATS, "swiglu_limit", "hc_eps", "adaptive_routing_temperature")  # these may be 0
FIXED = {  # fields of a released config.json that have one value in every V4
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
CHOICES = {
    "scoring_func": ("sqrtsoftplus", "sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "greedy"),  # with a bias that balances the experts, or without
    "n_shared_experts": (0, 1),
    "torch_dtype": ("bfloat16", "float32", "float16"),
    "expert_dtype": (None, "fp4", "fp8"),
    "num_nextn_predict_layers": (0, 1),
    "tie_word_embeddings": (False, True),
}
YARN_KEYS = ("type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


class ConfigError(UserError):
    """A configuration that cannot be a DeepSeek-V4 model; the message names the field and what would be right."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (perhaps you meant 'x')`, or nothing when no known word is near."""
    match = difflib.get_close_matches(str(word), list(known), 1)
    return f" (perhaps you meant {match[0]!r})" if match else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError that lists the keys outside `known`, each with the nearest known one."""
    known = sorted(set(known))
    if unknown := [key for key in keys if key not in known]:
        raise ConfigError(f"{where} has no key " + ", no key ".join(repr(key) + nearest(key, known) for key in unknown))


def check_values(config: DeepseekV4Config) -> None:
    """Raise ConfigError that lists every field whose value alone is wrong."""
    _raise_if_any(_wrong_values(config))


def check_plan(config: DeepseekV4Config) -> None:
    """Raise ConfigError that lists what is wrong in the layer plan and between fields; values are right already."""
    _raise_if_any([*_wrong_plan(config), *_wrong_relations(config)])


def _raise_if_any(problems: Iterable[str]) -> None:
    if problems := list(problems):
        raise ConfigError("; ".join(problems))


def _wrong_values(c: DeepseekV4Config) -> Iterator[str]:
    for name in (*POSITIVE_INTEGERS, "num_hash_layers", "bos_token_id", "eos_token_id"):
        value, least = getattr(c, name), int(name in POSITIVE_INTEGERS)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            yield f"{name} is {value!r}: an integer of at least {least} is needed"
    for ratio in c.compress_ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 0:
            yield f"compress_ratios holds {ratio!r}: integers of at least 0 are needed"
    for name in FLOATS:
        value, positive = getattr(c, name), name in POSITIVE_FLOATS
        if not isinstance(value, float) or not math.isfinite(value) or value < 0 or (positive and value == 0):
            yield f"{name} is {value!r}: a number {'above 0' if positive else 'of at least 0'} is needed"
    for name, fixed in FIXED.items():
        if getattr(c, name) != fixed:
            yield f"{name} is {getattr(c, name)!r}: in V4 it is always {fixed!r}"
    for name, choices in CHOICES.items():
        if getattr(c, name) not in choices:
            yield f"{name} is {getattr(c, name)!r}: one of {', '.join(map(repr, choices))} is needed"
    if c.rope_scaling is not None:
        yield from _wrong_yarn(c.rope_scaling)


def _wrong_yarn(scaling: Mapping[str, Any]) -> Iterator[str]:
    if set(scaling) != set(YARN_KEYS) or scaling["type"] != "yarn":
        yield f"rope_scaling is {dict(scaling)}: V4 has null, or YaRN: exactly {', '.join(YARN_KEYS)}, with type 'yarn'"
        return
    numbers = [scaling[key] for key in YARN_KEYS[1:]]
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or n <= 0 for n in numbers):
        yield f"rope_scaling is {dict(scaling)}: {', '.join(YARN_KEYS[1:])} are positive numbers"
    elif scaling["factor"] < 1 or scaling["beta_fast"] <= scaling["beta_slow"]:
        yield f"rope_scaling is {dict(scaling)}: factor is at least 1 and beta_fast is above beta_slow"


def _wrong_plan(c: DeepseekV4Config) -> Iterator[str]:
    depth, modules = c.num_hidden_layers, c.num_nextn_predict_layers
    rows = f"num_hidden_layers + num_nextn_predict_layers = {depth} + {modules}"
    if len(c.compress_ratios) != depth + modules:
        yield f"compress_ratios has {len(c.compress_ratios)} values: {rows} are needed"
    if len(c.layer_types) != depth + modules:
        yield f"layer_types has {len(c.layer_types)} values: num_hidden_layers = {depth} are needed"
    if len(c.mlp_layer_types) != depth:
        yield f"mlp_layer_types has {len(c.mlp_layer_types)} values: num_hidden_layers = {depth} are needed"
    for index, (kind, ratio) in enumerate(zip(c.layer_types, c.compress_ratios, strict=False)):
        if kind not in ATTENTION_KINDS:
            known = ", ".join(ATTENTION_KINDS)
            yield f"layer_types[{index}] is {kind!r}: one of {known} is needed{nearest(kind, ATTENTION_KINDS)}"
        elif kind in (SLIDING, *BASELINE_KINDS) and ratio != 0:
            yield f"compress_ratios[{index}] is {ratio} for a {kind} layer: 0 is needed"
        elif kind not in (SLIDING, *BASELINE_KINDS) and ratio < 2:
            yield f"compress_ratios[{index}] is {ratio} for a {kind} layer: 2 or more tokens per entry are needed"
        elif kind != SLIDING and index >= depth:
            yield f"compress_ratios[{index}] is {ratio}, {kind}, for the MTP block: V4's is a sliding layer, 0"
    for index, kind in enumerate(c.mlp_layer_types):
        if kind not in ROUTING_KINDS:
            yield f"mlp_layer_types[{index}] is {kind!r}: 'hash_moe' or 'moe' is needed"


def _wrong_relations(c: DeepseekV4Config) -> Iterator[str]:
    yield from wrong_sizes(c)
    if c.num_attention_heads % c.o_groups:
        yield f"o_groups = {c.o_groups} does not divide num_attention_heads = {c.num_attention_heads}"
    if c.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim is {c.qk_rope_head_dim}: rotary dims come in pairs, an even number is needed"
    if c.qk_rope_head_dim > c.head_dim:
        yield f"qk_rope_head_dim = {c.qk_rope_head_dim} exceeds head_dim = {c.head_dim}"
    if c.has_indexer and c.qk_rope_head_dim > c.index_head_dim:
        yield (
            f"index_head_dim = {c.index_head_dim} is smaller than qk_rope_head_dim = {c.qk_rope_head_dim}: "
            "indexer keys carry the same rotary dims"
        )
    if c.num_experts_per_tok > c.n_routed_experts:
        yield f"num_experts_per_tok = {c.num_experts_per_tok} exceeds n_routed_experts = {c.n_routed_experts}"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(c, name) >= c.vocab_size:
            yield f"{name} = {getattr(c, name)} lies outside the vocabulary (vocab_size = {c.vocab_size})"
