"""Rotary settings in config.json: flat `rope_scaling` (the release), nested `rope_parameters` (transformers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_checks import YARN_KEYS, ConfigError, refuse_unknown

Json = dict[str, Any]
ROPE_KEYS = (*YARN_KEYS, "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor")


def read_rotary(raw: Mapping[str, Any]) -> Json:
    """`rope_theta`, `compress_rope_theta`, `rope_scaling` and `qk_rope_head_dim` from either form.

    Raises:
        ConfigError: for unknown keys, scalings other than YaRN, rotary widths that contradict each other.
    """
    nested = raw.get("rope_parameters") or {}
    if not {"main", "compress"} & set(nested):  # transformers also takes the release's flat YaRN settings here
        nested = {"compress": raw.get("rope_scaling") or nested}
    refuse_unknown(nested, ("main", "compress"), "rope_parameters")
    main, compress = nested.get("main") or {}, nested.get("compress") or {}
    for where, part in (("rope_parameters.main", main), ("the scaling of CSA and HCA rotations", compress)):
        refuse_unknown(part, ROPE_KEYS, where)
    if _rope_type(main) != "default":
        raise ConfigError(f"rope_parameters.main has type {_rope_type(main)!r}: sliding layers rotate without scaling")
    values: Json = {"rope_scaling": _yarn(compress), "qk_rope_head_dim": _rope_dims(raw, main, compress)}
    # The nested numbers are the ones transformers computes with; the flat ones beside them are leftovers.
    for key, part in (("rope_theta", main), ("compress_rope_theta", compress)):
        theta = part.get("rope_theta", raw.get(key))
        values |= {} if theta is None else {key: theta}
    return values


def write_rope_parameters(config: DeepseekV4Config) -> Json:
    """Transformers' nested form."""
    fraction = config.qk_rope_head_dim / config.head_dim
    main = {"partial_rotary_factor": fraction, "rope_theta": config.rope_theta, "rope_type": "default"}
    compress: Json = main | {"rope_theta": config.compress_rope_theta}
    if config.rope_scaling is not None:
        settings = {key: whole(value) for key, value in config.rope_scaling.items() if key != "type"}
        settings["factor"] = config.rope_scaling["factor"]  # transformers wants a float here
        compress |= {"rope_type": "yarn", "attention_factor": 1.0, **settings}
    return {"main": main, "compress": compress}


def whole(value: Any) -> Any:
    """Whole floats as integers (10000.0 as 10000), the way the release writes them; inside mappings too."""
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _rope_type(part: Mapping[str, Any]) -> str:
    return part.get("rope_type", part.get("type", "default"))


def _yarn(part: Mapping[str, Any]) -> Json | None:
    kind = _rope_type(part)
    if kind == "default":
        return None
    if kind != "yarn" or part.get("attention_factor") not in (None, 1):
        raise ConfigError(
            f"the scaling of CSA and HCA rotations is {dict(part)}: V4 has YaRN with attention_factor 1, or none"
        )
    if missing := {"factor", "original_max_position_embeddings"} - set(part):
        raise ConfigError(f"the YaRN settings {dict(part)} lack {', '.join(sorted(missing))}")
    filled = {"beta_fast": 32, "beta_slow": 1, **part, "type": "yarn"}
    return {key: filled[key] for key in YARN_KEYS}


def _rope_dims(raw: Mapping[str, Any], *parts: Mapping[str, Any]) -> int:
    width = raw.get("head_dim", DeepseekV4Config.head_dim)
    fractions = [part.get("partial_rotary_factor") for part in (raw, *parts)]
    found = {int(width * fraction + 1e-6) for fraction in fractions if fraction is not None}
    found |= {raw["qk_rope_head_dim"]} if "qk_rope_head_dim" in raw else set()
    found = found or {int(width * 64 / 512)}  # the fraction that transformers assumes
    if len(found) > 1:
        raise ConfigError(
            f"qk_rope_head_dim and partial_rotary_factor disagree for head_dim = {width}: they give {sorted(found)} "
            "rotary dims"
        )
    return found.pop()
