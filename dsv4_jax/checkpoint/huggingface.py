"""Hugging Face folders (config.json and safetensors) to our parameter tree, in every naming scheme and format.

Every stored name must match exactly one rule of `names.py`, and every place in the tree must be filled exactly once;
this and the values of all scales are checked before memory is filled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint.files import Entry, Reader, list_tensors
from dsv4_jax.checkpoint.loading import Shardings, load_tree
from dsv4_jax.checkpoint.matching import Source, match
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json, has_dspark, read_json
from dsv4_jax.paths import local_path

log = logging.getLogger(__name__)
Params = dict[str, Any]


def load_checkpoint(
    folder: str | Path, shardings: Shardings | None = None, dtype: Any = None, packed: bool = False
) -> tuple[DeepseekV4Config, Params]:
    """`read_config` and `load_params` of one folder."""
    config = read_config(folder)
    return config, load_params(folder, config, shardings, dtype, packed)


def read_config(folder: str | Path) -> DeepseekV4Config:
    """The architecture of a checkpoint: its config.json, without an MTP module when the files hold none.

    transformers keeps `num_nextn_predict_layers` in config.json but never the module's weights.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError: see `config_from_json` and `load_params`.
    """
    config, names = config_from_json(model_folder(folder)), list_tensors(model_folder(folder))
    if config.num_nextn_predict_layers and not any(name.startswith("mtp.") for name in names):
        log.warning("%s holds no MTP weights: the model is loaded without its MTP module", folder)
        return config.replace(num_nextn_predict_layers=0)
    return config


def load_params(
    folder: str | Path,
    config: DeepseekV4Config,
    shardings: Shardings | None = None,
    dtype: Any = None,
    packed: bool = False,
) -> Params:
    """Read the weights of `folder` as a parameter tree for `config`, quantised matrices as numbers.

    Args:
        folder: holds `model.safetensors`, or files with `model.safetensors.index.json`; any of the three schemes; plain
            floats, FP8 with a scale per 128 x 128 numbers, FP4 experts with a scale per 32 inputs.
        config: the architecture, usually `read_config(folder)`.
        shardings: where the arrays shall lie: one sharding for all, a tree of them, or a function of a leaf's path and
            shape. Each process reads the byte ranges that its devices hold. None gives numpy arrays on the host.
        dtype: of all floats; by default each keeps its own, and what was quantised gets `config.torch_dtype`. bfloat16
            holds every quantised number exactly.
        packed: keep matrices that are stored in FP8 or FP4 so, as `quantization.packed.Packed`, in the bytes of the
            files. Where an axis of devices cuts tiles that share a scale, a matrix becomes numbers all the same.

    Returns:
        Nested dictionaries, matrices `[in, out]`, blocks stacked by segment. Stream maps, sinks, position and router
        biases are always float32; hash tables are int32.

    Raises:
        FileNotFoundError: when there is no safetensors model.
        CheckpointError: for damaged files; for names that match no rule, match twice or are missing, and shapes or
            formats that the configuration does not imply (all are listed); for NaN scales.
    """
    sources, _ = find_sources(folder, config)
    with Reader() as reader:
        return load_tree(reader, sources, config, shardings, dtype, packed)


def find_sources(folder: str | Path, config: DeepseekV4Config) -> tuple[list[Source], dict[str, Entry]]:
    """The tensors of `config` in a folder, and those of DSpark's drafting blocks, which are not used.

    Raises:
        FileNotFoundError, CheckpointError: as `load_params`; nothing but headers is read.
    """
    folder = model_folder(folder)
    entries = list_tensors(folder)
    drafting: dict[str, Entry] = {}
    if (folder / "config.json").exists() and has_dspark(read_json(folder)):
        drafting = {name: entry for name, entry in entries.items() if name.startswith("mtp.")}
        log.warning("%d tensors of DSpark drafting blocks (mtp.*) are not used", len(drafting))
    return match({name: entry for name, entry in entries.items() if name not in drafting}, config), drafting


def model_folder(folder: str | Path) -> Path:
    """`folder` as a path.

    Raises:
        FileNotFoundError: when it is no folder.
    """
    folder = local_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: a folder with config.json and safetensors files is needed")
    return folder
