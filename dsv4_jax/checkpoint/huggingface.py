"""Hugging Face folders (config.json and safetensors) to our parameter tree and back, in every naming scheme.

Tensors are read one at a time, straight to their place in the stacked arrays: memory is the tree plus one tensor. Every
stored name must match exactly one rule of `names.py`, and every place in the tree must be filled exactly once.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.files import CheckpointError, Entry, list_tensors, listed, read_tensors, write_tensors
from dsv4_jax.checkpoint.names import SCHEMES, Scheme, Stored, stored_tensors, tensors_of_scheme
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json, has_dspark, read_json, to_released_json, to_transformers_json
from dsv4_jax.shapes import flatten, is_table, keeps_float32, nest, tree_shapes

log = logging.getLogger(__name__)
Params = dict[str, Any]
FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
INTEGERS = ("I64", "I32")
QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "F4")


def load_checkpoint(folder: str | Path) -> tuple[DeepseekV4Config, Params]:
    """`read_config` and `load_params` of one folder."""
    config = read_config(folder)
    return config, load_params(folder, config)


def read_config(folder: str | Path) -> DeepseekV4Config:
    """The architecture of a checkpoint: its config.json, without an MTP module when the files hold none.

    transformers keeps `num_nextn_predict_layers` in config.json but never the module's weights.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError: see `config_from_json` and `load_params`.
    """
    config, names = config_from_json(_folder(folder)), list_tensors(_folder(folder))
    if config.num_nextn_predict_layers and not any(name.startswith("mtp.") for name in names):
        log.warning("%s holds no MTP weights: the model is loaded without its MTP module", folder)
        return config.replace(num_nextn_predict_layers=0)
    return config


def load_params(folder: str | Path, config: DeepseekV4Config) -> Params:
    """Read the weights of `folder` as a tree of numpy arrays for `config`.

    Args:
        folder: holds `model.safetensors`, or files with `model.safetensors.index.json`; any of the three schemes.
        config: the architecture, usually `read_config(folder)`.

    Returns:
        Nested dictionaries, matrices `[in, out]`, blocks stacked by segment. Floats keep their dtype (stream maps,
        sinks, position and router biases are always float32); hash tables are int32.

    Raises:
        FileNotFoundError: when there is no safetensors model.
        CheckpointError: for damaged or quantised files, and for names that match no rule, match twice, are missing or
            have another shape; all of them are listed.
    """
    folder = _folder(folder)
    entries = list_tensors(folder)
    if (folder / "config.json").exists() and has_dspark(read_json(folder)):
        dropped = [name for name in entries if name.startswith("mtp.")]
        log.warning("%d tensors of DSpark drafting blocks are left out", len(dropped))
        entries = {name: entry for name, entry in entries.items() if not name.startswith("mtp.")}
    _refuse_quantised(entries)
    matched = _match(entries, config)
    leaves = _allocate(entries, matched, config)
    for name, array in read_tensors(entries):
        _place(leaves, matched[name], name, array, config)
    return nest(leaves)


def save(
    folder: str | Path,
    config: DeepseekV4Config,
    params: Params,
    scheme: Scheme = "released",
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write `config.json` and safetensors files that `load_params` reads back bitwise.

    Args:
        folder: created when absent; must not hold a model yet.
        config: the architecture of `params`. Quantisation entries are left out, the weights are plain.
        params: the tree, of numpy or JAX arrays.
        scheme: "released", or "transformers", which has no MTP module: it is left out with a message.
        max_file_bytes: larger models are split into files with an index.

    Raises:
        FileExistsError: when the folder already holds a model.
        CheckpointError: when `params` is not a tree of `config`, or the scheme is unknown.
    """
    folder = Path(folder)
    if scheme not in SCHEMES:
        raise CheckpointError(f"there is no naming scheme {scheme!r}: one of {', '.join(SCHEMES)}")
    if present := sorted(p.name for pattern in ("config.json", "*.safetensors*") for p in folder.glob(pattern)):
        raise FileExistsError(f"{folder} already holds {present[0]}: choose another folder, nothing is overwritten")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    _refuse_other_tree(leaves, config)
    config_json = _config_to_write(config, scheme, leaves["embed"].dtype)
    tensors = tensors_of_scheme(config, scheme)
    sizes = {name: _stored_bytes(stored, leaves) for name, stored in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, sizes, _stream(tensors, leaves), max_file_bytes)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")


def _folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: a folder with config.json and safetensors files is needed")
    return Path(folder)


def _refuse_quantised(entries: dict[str, Entry]) -> None:
    names = [name for name, entry in entries.items() if entry.dtype in QUANTISED]
    if names:
        raise CheckpointError(f"quantised checkpoints are not supported yet; quantised here: {listed(names, 4)}")


def _match(entries: dict[str, Entry], config: DeepseekV4Config) -> dict[str, Stored]:
    """The rule of every stored name; raises with all names that have none, share a place, or have another shape."""
    rules = {name: stored for stored in stored_tensors(config) for name in stored.names if name is not None}
    matched = {name: rules[name] for name in entries if name in rules}
    claims: dict[Any, list[str]] = defaultdict(list)
    for name, stored in matched.items():
        for slot in stored.slots:
            claims[slot].append(name)
    twice = {" and ".join(names) for names in claims.values() if len(names) > 1}
    missing = [s.names[0] for s in tensors_of_scheme(config, "released").values() if not set(s.slots) <= set(claims)]
    shapes = [
        f"{name} {list(entries[name].shape)} instead of {list(stored.shape)}"
        for name, stored in matched.items()
        if entries[name].shape != stored.shape
    ]
    problems = {
        "without a place in this architecture": set(entries) - set(rules),
        "stored twice": twice,
        "missing (released names)": missing,
        "of another shape": shapes,
    }
    if any(problems.values()):
        lines = [f"  {len(found)} {problem}: {listed(found)}" for problem, found in problems.items() if found]
        raise CheckpointError("the tensors do not fit the configuration:\n" + "\n".join(lines))
    return matched


def _allocate(entries: dict[str, Entry], matched: dict[str, Stored], config: DeepseekV4Config) -> dict[str, np.ndarray]:
    """Empty arrays in the tree's shapes; a stack of unequal float dtypes becomes float32, which holds them all."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, stored in matched.items():
        for leaf in stored.leaves:
            found[leaf].add(entries[name].dtype)
            allowed = INTEGERS if is_table(leaf) else tuple(FLOATS)
            if entries[name].dtype not in allowed:
                raise CheckpointError(f"{name} has dtype {entries[name].dtype}: one of {', '.join(allowed)} is needed")

    def dtype(leaf: str) -> np.dtype:
        if is_table(leaf):
            return np.dtype(np.int32)
        return FLOATS["F32" if keeps_float32(leaf) or len(found[leaf]) > 1 else next(iter(found[leaf]))]

    return {leaf: np.empty(shape, dtype(leaf)) for leaf, shape in tree_shapes(config).items()}


def _place(
    leaves: dict[str, np.ndarray], stored: Stored, name: str, array: np.ndarray, config: DeepseekV4Config
) -> None:
    if is_table(stored.leaves[0]) and (array.min() < 0 or array.max() >= config.n_routed_experts):
        raise CheckpointError(f"{name} names experts outside 0..{config.n_routed_experts - 1}")
    for leaf, part in zip(stored.leaves, stored.unpack(array), strict=True):
        leaves[leaf][stored.index] = part


def _refuse_other_tree(leaves: dict[str, np.ndarray], config: DeepseekV4Config) -> None:
    needed = tree_shapes(config)
    wrong = [
        f"{path} {list(leaves[path].shape)}" for path in leaves.keys() & needed if leaves[path].shape != needed[path]
    ]
    for problem, paths in (
        ("lacks", set(needed) - set(leaves)),
        ("has leaves the configuration has not", set(leaves) - set(needed)),
        ("has leaves of another shape", wrong),
    ):
        if paths:
            raise CheckpointError(f"the parameter tree {problem}: {listed(paths)}")


def _config_to_write(config: DeepseekV4Config, scheme: Scheme, dtype: np.dtype) -> dict[str, Any]:
    config = config.replace(quantization_config=None, expert_dtype=None, torch_dtype=dtype.name)
    if scheme == "released":
        return to_released_json(config)
    if config.num_nextn_predict_layers:
        log.warning("transformers has no MTP module: its weights are left out")
    return to_transformers_json(config.replace(num_nextn_predict_layers=0))


def _stored_bytes(stored: Stored, leaves: dict[str, np.ndarray]) -> int:
    count = int(np.prod(stored.shape, dtype=np.int64))
    return count * (8 if is_table(stored.leaves[0]) else leaves[stored.leaves[0]].itemsize)


def _stream(tensors: dict[str, Stored], leaves: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, stored in tensors.items():
        array = stored.pack([leaves[leaf][stored.index] for leaf in stored.leaves])
        yield name, array.astype(np.int64) if is_table(stored.leaves[0]) else array
