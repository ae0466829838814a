"""config.json in its two forms, the release's and transformers', read and written.

The release writes one `compress_ratios` number per block; transformers writes `layer_types` with one `compress_rates`
number per kind, and the rotary settings nested in `rope_parameters`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv4_jax.baseline import BaselineSizes, refuse_other_models
from dsv4_jax.config import FIELDS, DeepseekV4Config
from dsv4_jax.config_checks import ConfigError, refuse_unknown
from dsv4_jax.config_rope_json import read_rotary, whole, write_rope_parameters
from dsv4_jax.layer_plan import ATTENTION_KINDS, CSA, HCA, RELEASED_KINDS, SLIDING
from dsv4_jax.paths import local_path

log = logging.getLogger(__name__)
Json = dict[str, Any]

RELEASED_CONSTANTS: Json = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "model_type": "deepseek_v4",
    "transformers_version": "4.57.1",
    "use_cache": True,
}
TRANSFORMERS_CONSTANTS: Json = {
    **RELEASED_CONSTANTS,
    "mlp_bias": False,
    "output_router_logits": False,
    "pad_token_id": None,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "transformers_version": "5.23.0",
}
FIXED_EXTRAS: Json = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
}
# Keys every transformers model may carry; they say nothing about the architecture.
GENERIC = frozenset(
    """_name_or_path _attn_implementation _commit_hash _experts_implementation add_cross_attention auto_map
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    do_sample dtype finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type pruned_heads
    repetition_penalty return_dict router_aux_loss_coef sep_token_id suppress_tokens task_specific_params temperature
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p use_bfloat16 use_cache
    use_return_dict""".split()
)
TRANSFORMERS_KEYS = ("compress_rates", "compress_rate_csa", "compress_rate_hca", "partial_rotary_factor")
LISTS = ("compress_ratios", "layer_types", "mlp_layer_types")
OBJECTS = ("baseline", "compress_rates", "rope_parameters", "rope_scaling", "quantization_config")
COUNTS = ("num_hidden_layers", "num_nextn_predict_layers", "head_dim")
DEFAULT_RATES = {kind: ratio for ratio, kind in RELEASED_KINDS.items() if ratio}


def config_from_json(source: str | Path | Mapping[str, Any]) -> DeepseekV4Config:
    """Read a config.json of either form.

    Args:
        source: the file, a folder that holds a `config.json`, or the parsed dictionary.

    Returns:
        The configuration. A release with DSpark drafting blocks (`dspark_*` keys) gives its main stack:
        `num_nextn_predict_layers` is 0, with a message.

    Raises:
        ConfigError: for another architecture, unknown keys (with the nearest known one), wrong or contradictory values.
        FileNotFoundError: when there is no such file.
    """
    raw = dict(source) if isinstance(source, Mapping) else read_json(source)
    _refuse_other_architectures(raw)
    raw = {key: value for key, value in _without_dspark(raw).items() if value is not None}
    refuse_unknown(raw, (*FIELDS, *FIXED_EXTRAS, *GENERIC, *TRANSFORMERS_KEYS, "rope_parameters"), "config.json")
    _refuse_wrong_kinds(raw)
    for key, fixed in FIXED_EXTRAS.items():
        if raw.get(key, fixed) != fixed:
            raise ConfigError(f"{key} is {raw[key]!r}: in V4 it is always {fixed!r}")
    values = {key: raw[key] for key in FIELDS if key in raw}
    values |= {"torch_dtype": raw["dtype"]} if isinstance(raw.get("dtype"), str) else {}
    return DeepseekV4Config(**values | read_rotary(raw) | _plan(raw))


def to_released_json(config: DeepseekV4Config) -> Json:
    """The release's form, equal as a dictionary to the config.json of the releases.

    `layer_types` and `mlp_layer_types` are added only when ratios and `num_hash_layers` do not imply them.
    """
    values = RELEASED_CONSTANTS | {key: _plain(getattr(config, key)) for key in FIELDS}
    values |= {key: whole(values[key]) for key in ("rope_theta", "compress_rope_theta", "rope_scaling")}
    optional: Json = {"expert_dtype": None, "quantization_config": None, "adaptive_routing_temperature": 0.0}
    optional["baseline"] = _plain(BaselineSizes())
    for key, default in optional.items():
        if values[key] == default:
            del values[key]
    depth = config.num_hidden_layers
    values["layer_types"] = values["layer_types"][:depth]  # the MTP block's kind follows from its ratio, 0
    if values["layer_types"] == [RELEASED_KINDS.get(ratio) for ratio in config.compress_ratios[:depth]]:
        del values["layer_types"]
    if not _hash_layers_elsewhere(config):
        del values["mlp_layer_types"]
    return values


def to_transformers_json(config: DeepseekV4Config) -> Json:
    """The form that transformers writes.

    Raises:
        ConfigError: when the ratios differ among layers of one kind, or an option is on that transformers has not.
        UserError: for layers and experts that are no V4.
    """
    refuse_other_models(config, "transformers' form of a configuration")
    if config.adaptive_routing_temperature:
        raise ConfigError(
            "adaptive_routing_temperature is on: transformers has no such option; write the released form"
        )
    dropped = ("compress_ratios", "num_hash_layers", "rope_scaling", "topk_method", "torch_dtype")
    optional = ("expert_dtype", "quantization_config", "adaptive_routing_temperature", "baseline")
    values = {key: _plain(getattr(config, key)) for key in FIELDS if key not in dropped + optional}
    values |= {key: getattr(config, key) for key in optional[:2] if getattr(config, key) is not None}
    return (
        TRANSFORMERS_CONSTANTS
        | values
        | {
            "compress_rates": _rates_per_kind(config),
            "dtype": config.torch_dtype,
            "layer_types": list(config.layer_types[: config.num_hidden_layers]),
            "partial_rotary_factor": config.qk_rope_head_dim / config.head_dim,
            "rope_parameters": write_rope_parameters(config),
        }
    )


def read_json(path: str | Path) -> Json:
    """The JSON object in a file, or in `config.json` of a folder.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: when it is not a JSON object.
    """
    file = local_path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: a model folder holds a config.json")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a JSON {type(value).__name__}: an object is needed")
    return value


def has_dspark(raw: Mapping[str, Any]) -> bool:
    """Whether a raw config.json is of a release whose `mtp.` blocks are DSpark drafting stages, not V4's MTP."""
    return any(key.startswith("dspark_") for key in raw)


def _refuse_other_architectures(raw: Json) -> None:
    kind = raw.get("model_type", "deepseek_v4")
    if str(kind).startswith("deepseek_v41"):
        raise ConfigError(
            f"model_type is {kind!r}: DeepSeek-V4.1 is another architecture (engram tables, shared key/value "
            "sources across layers, vision); a deepseek_v4 model is needed"
        )
    if kind != "deepseek_v4":
        raise ConfigError(f"model_type is {kind!r}: 'deepseek_v4' is needed")


def _without_dspark(raw: Json) -> Json:
    if not has_dspark(raw):
        return raw
    log.warning(
        "config.json has dspark_* keys: its drafting blocks are not V4's MTP; the main stack is used without MTP"
    )
    kept = {key: value for key, value in raw.items() if not key.startswith("dspark_")}
    return kept | {"num_nextn_predict_layers": 0}


def _refuse_wrong_kinds(raw: Json) -> None:
    """The keys that are taken apart below must be lists, objects and integers; the rest is checked as a config."""
    for keys, kind, name in (
        (LISTS, list | tuple, "a list"),
        (OBJECTS, Mapping, "an object"),
        (COUNTS, int, "an integer"),
    ):
        for key in keys:
            if key in raw and not isinstance(raw[key], kind):
                raise ConfigError(f"{key} is {raw[key]!r}: {name} is needed")


def _plan(raw: Json) -> Json:
    """`compress_ratios`, `layer_types` and `mlp_layer_types` from whichever of them (and of the rates) are given."""
    depth = raw.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)
    modules = raw.get("num_nextn_predict_layers", DeepseekV4Config.num_nextn_predict_layers)
    kinds, ratios = raw.get("layer_types"), raw.get("compress_ratios")
    if kinds is None and ratios is None:
        raise ConfigError("config.json gives neither compress_ratios nor layer_types: one of them is needed")
    plan: Json = {} if kinds is None else {"layer_types": tuple(kinds)}
    if ratios is None:
        plan["compress_ratios"] = _ratios_from_rates(raw, plan["layer_types"][:depth]) + (0,) * modules
    else:
        plan["compress_ratios"] = _without_extra_zeros(ratios, depth + modules)
    hashed, routing = raw.get("num_hash_layers"), raw.get("mlp_layer_types")
    if hashed is not None and routing is not None and hashed != list(routing).count("hash_moe"):
        raise ConfigError(
            f"num_hash_layers is {hashed} but mlp_layer_types has {list(routing).count('hash_moe')} hash_moe"
        )
    return plan


def _without_extra_zeros(ratios: Iterable[int], needed: int) -> tuple[int, ...]:
    """Later releases append a zero per drafting block; only zeros may be cut."""
    ratios = tuple(ratios)
    return ratios[:needed] if not any(ratios[needed:]) else ratios


def _ratios_from_rates(raw: Json, kinds: Iterable[str]) -> tuple[int, ...]:
    rates: Json = DEFAULT_RATES | dict(raw.get("compress_rates") or {})
    for kind, key in ((CSA, "compress_rate_csa"), (HCA, "compress_rate_hca")):
        rates[kind] = raw.get(key, rates[kind])
    refuse_unknown(rates, ATTENTION_KINDS, "compress_rates")
    rates[SLIDING] = 0
    return tuple(rates.get(kind, 0) for kind in kinds)  # unknown kinds are named by the configuration's own check


def _rates_per_kind(config: DeepseekV4Config) -> Json:
    rates: Json = {}
    for kind, default in DEFAULT_RATES.items():
        found = sorted({layer.ratio for layer in config.layers if layer.attention == kind}) or [default]
        if len(found) > 1:
            raise ConfigError(
                f"compress_ratios gives {kind} layers the ratios {found}: transformers has one compress_rates number "
                "per kind; write the released form"
            )
        rates[kind] = found[0]
    return rates


def _hash_layers_elsewhere(config: DeepseekV4Config) -> bool:
    return "hash_moe" in config.mlp_layer_types[config.num_hash_layers :]


def _plain(value: Any) -> Any:
    """Tuples as JSON lists, mappings and sizes as dictionaries."""
    if isinstance(value, BaselineSizes):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
