"""From parameters, or from another checkpoint, to a Hugging Face folder: both naming schemes, plain or quantised.

Matrices pass one by one, so memory is the largest of them, not the checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.decoding import STRIP
from dsv4_jax.checkpoint.files import DTYPES, CheckpointError, Entry, Reader, listed
from dsv4_jax.checkpoint.huggingface import find_sources, read_config
from dsv4_jax.checkpoint.names import SCHEMES, Scheme, Stored, scale_names, tensors_of_scheme
from dsv4_jax.checkpoint.parts import FolderParts, Parts, TreeParts, as_dtype
from dsv4_jax.checkpoint.storage import FLOAT_NAMES, Format, Quantise, Spec, quantisation_of, stored_as
from dsv4_jax.checkpoint.tokenizer_files import files_in, files_of
from dsv4_jax.checkpoint.writing import plan_files, write_files
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import read_json, to_released_json, to_transformers_json
from dsv4_jax.paths import local_path
from dsv4_jax.quantization.formats import NAN_SCALE, quantise_fp4, quantise_fp8_tiles
from dsv4_jax.shapes import flatten, is_table, tree_shapes

log = logging.getLogger(__name__)
FILE_BYTES = 5 << 30
UNEVEN = (
    "%d matrices are no multiples of the tiles that share a scale: this program reads them, but transformers guesses "
    "the tiles from the shapes and would read them wrongly: %s"
)


def save(
    folder: str | Path,
    config: DeepseekV4Config,
    params: Mapping[str, Any],
    scheme: Scheme = "released",
    quantise: Quantise = "none",
    *,
    dtype: str | None = None,
    tokenizer: Any = None,
    max_file_bytes: int = FILE_BYTES,
) -> None:
    """Write `config.json` and safetensors files that `load_params` reads back: bitwise when they are plain.

    Args:
        folder: created when absent; must not hold a model yet.
        config: the architecture of `params`.
        params: the tree, of numpy or JAX arrays.
        scheme: "released", or "transformers", which has no MTP module: it is left out with a message.
        quantise: "none"; "v4", FP8 with FP4 experts and the rest BF16; "fp8", with FP8 experts, as the base models are;
            "release", what `config` says, "v4" where it says nothing. transformers 5.23 undoes this without a GPU only
            for experts under released names.
        dtype: "bfloat16", "float16" or "float32" for the floats of a plain model; by default as they are. What is
            quantised has the rest in BF16.
        tokenizer: a `Tokenizer`, a folder whose tokenizer files are copied, or what else `load_tokenizer` takes.
        max_file_bytes: larger models are split into files with an index.

    Raises:
        FileExistsError: when the folder already holds a model, or a tokenizer that would be overwritten.
        FileNotFoundError, UserError: for a tokenizer that there is not.
        CheckpointError: when `params` is not a tree of `config`, the scheme is unknown, `dtype` is given for what is
            quantised or too narrow for a number, or what shall be quantised holds NaN or infinity.
    """
    _export_of_tree(config, params, scheme, quantise, dtype).write(folder, max_file_bytes, files_of(tokenizer))


def convert(
    source: str | Path,
    folder: str | Path,
    scheme: Scheme = "released",
    quantise: Quantise = "none",
    *,
    dtype: str | None = None,
    max_file_bytes: int = FILE_BYTES,
) -> None:
    """Write the checkpoint in folder `source` anew, matrix by matrix, with its tokenizer files.

    What is quantised in `source` and stays quantised keeps its scales, so it comes out bitwise. The drafting blocks of
    a DSpark release are copied byte for byte, under their names, with their settings.

    Args:
        source: a folder that `load_params` reads.
        folder: as in `save`.
        scheme: as in `save`.
        quantise: as in `save`.
        dtype: as in `save`; by default the source's, and its `torch_dtype` for what was quantised.
        max_file_bytes: as in `save`.

    Raises:
        FileNotFoundError, FileExistsError, ConfigError, CheckpointError: as `load_params` and `save`.
    """
    with Reader() as reader:
        export = _export_of_folder(reader, source, scheme, quantise, dtype)
        export.write(folder, max_file_bytes, files_in(Path(source)))


def planned_save(
    config: DeepseekV4Config, params: Mapping[str, Any], scheme: Scheme, quantise: Quantise, dtype: str | None
) -> dict[str, Spec]:
    """Every tensor that `save` would write; raises as it does."""
    return _export_of_tree(config, params, scheme, quantise, dtype).specs()


def planned_convert(source: str | Path, scheme: Scheme, quantise: Quantise, dtype: str | None) -> dict[str, Spec]:
    """Every tensor that `convert` would write; raises as it does. Only headers are read."""
    with Reader() as reader:
        return _export_of_folder(reader, source, scheme, quantise, dtype).specs()


def _export_of_tree(
    config: DeepseekV4Config, params: Mapping[str, Any], scheme: Scheme, quantise: Quantise, dtype: str | None
) -> _Export:
    leaves = flatten(dict(params))
    _refuse_other_tree(leaves, config)
    return _Export(config, TreeParts(leaves, float_dtype(dtype, quantise)), scheme, quantise)


def _export_of_folder(
    reader: Reader, source: str | Path, scheme: Scheme, quantise: Quantise, dtype: str | None
) -> _Export:
    asked, config = float_dtype(dtype, quantise), read_config(source)
    sources, drafting = find_sources(source, config)
    export = _Export(config, FolderParts(reader, sources, config, asked), scheme, quantise)
    if drafting:
        export.add_drafting(reader, drafting, read_json(source))
    return export


def float_dtype(dtype: str | None, quantise: Quantise) -> np.dtype | None:
    """The dtype by its name, None for none; CheckpointError for a name that is none, and together with `quantise`."""
    if dtype is None:
        return None
    if dtype not in FLOAT_NAMES:
        raise CheckpointError(f"there is no dtype {dtype!r} for weights: one of {', '.join(FLOAT_NAMES)}")
    if quantise != "none":
        raise CheckpointError(f"quantised as {quantise!r} the rest is always bfloat16: leave the dtype {dtype} out")
    return jnp.dtype(dtype)


class _Export:
    """What will be written, under which names and in which formats."""

    def __init__(self, config: DeepseekV4Config, parts: Parts, scheme: Scheme, quantise: Quantise):
        if scheme not in SCHEMES:
            raise CheckpointError(f"there is no naming scheme {scheme!r}: one of {', '.join(SCHEMES)}")
        self.parts, self.scheme = parts, scheme
        self.tensors = tensors_of_scheme(config, scheme)
        self.floats = None if quantise == "none" else "BF16"
        floats = self.floats or self._floats_of(next(iter(self.tensors.values())))
        self.config = stored_as(config, quantise).replace(torch_dtype=_float_name(floats))
        self.quantisation = quantisation_of(self.config)
        self._settings: dict[str, Any] = {}
        self._copies: dict[str, Entry] = {}
        self._reader = Reader()

    def add_drafting(self, reader: Reader, entries: dict[str, Entry], raw: dict[str, Any]) -> None:
        """Copy DSpark's tensors as they are, and what the source's config.json says of them."""
        self._reader, self._copies = reader, entries
        own = ["num_nextn_predict_layers"] + (["compress_ratios"] if self.scheme == "released" else [])
        self._settings = {key: raw[key] for key in raw if key.startswith("dspark_") or key in own}

    def write(self, folder: str | Path, limit: int, beside: Mapping[str, bytes]) -> None:
        """Write the whole folder, files `beside` included; config.json is last, so what is half written is no model."""
        folder = local_path(folder)
        present = {p.name for pattern in ("config.json", "*.safetensors*") for p in folder.glob(pattern)}
        present |= {name for name in beside if (folder / name).exists()}
        if present:
            raise FileExistsError(
                f"{folder} already holds {min(present)}: choose another folder, nothing is overwritten"
            )
        config_json = self._config_json()
        specs = self.specs()
        files = plan_files(specs, limit)
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, specs, files, self._pieces([name for part in files.values() for name in part], specs))
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")

    def _config_json(self) -> dict[str, Any]:
        if self.scheme == "released":
            return to_released_json(self.config) | self._settings
        if self.config.num_nextn_predict_layers:
            log.warning("transformers has no MTP module: its weights are left out")
        return to_transformers_json(self.config.replace(num_nextn_predict_layers=0)) | self._settings

    def specs(self) -> dict[str, Spec]:
        """Every tensor in the order in which it is written."""
        specs: dict[str, Spec] = {}
        uneven = []
        for name, stored in self.tensors.items():
            weight, scale = self.quantisation.specs(stored, self.floats or self._floats_of(stored))
            specs[name] = weight
            if scale is not None:
                specs[scale_names(name, self.scheme)[0]] = scale
                tile = self.quantisation.tile_of(stored)
                uneven += [name] if any(n > t and n % t for n, t in zip(stored.shape[-2:], tile, strict=True)) else []
        if uneven:
            log.warning(UNEVEN, len(uneven), listed(uneven, 2))
        return specs | {name: Spec(entry.dtype, entry.shape) for name, entry in self._copies.items()}

    def _floats_of(self, stored: Stored) -> str:
        """The safetensors dtype that holds what `parts` has for a tensor."""
        kinds = {self.parts.dtype(place).name for place in stored.places}
        if is_table(stored.leaves[0]):
            return "I64"
        if different := kinds - set(FLOAT_NAMES):
            raise CheckpointError(f"{stored.leaves[0]} is {listed(different)}: {', '.join(FLOAT_NAMES)} can be written")
        return FLOAT_NAMES[kinds.pop()] if len(kinds) == 1 else "F32"

    def _pieces(self, names: list[str], specs: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor in the order of `names`, matrix by matrix; scales wait until their weight has passed."""
        scales: dict[str, list[np.ndarray]] = {}
        for name in names:
            if name in self._copies:
                yield from ((name, piece) for piece in self._reader.read_bytes(self._copies[name]))
            elif name in scales:
                yield from ((name, piece) for piece in scales.pop(name))
            elif self.quantisation.format_of(self.tensors[name]) == "plain":
                yield from ((name, piece) for piece in self._plain(self.tensors[name], DTYPES[specs[name].dtype]))
            else:
                waiting = scales.setdefault(scale_names(name, self.scheme)[0], [])
                for values, of_values in self._quantised(name, self.tensors[name]):
                    waiting.append(of_values)
                    yield name, values

    def _plain(self, stored: Stored, dtype: np.dtype) -> Iterator[np.ndarray]:
        for place in stored.places:
            array = as_dtype(self.parts.get(place), dtype, place.leaf)
            yield array.swapaxes(-1, -2) if stored.transposed else array

    def _quantised(self, name: str, stored: Stored) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and scales of one stored matrix after the other."""
        kind, tile = self.quantisation.format_of(stored), self.quantisation.tile_of(stored)
        for _, group in itertools.groupby(stored.places, key=lambda place: place.matrix):
            places = list(group)
            known = self.parts.scales(places, tile)
            matrix = np.concatenate([self.parts.get(place).swapaxes(-1, -2) for place in places])
            values, scales = quantise_matrix(matrix, kind, tile, known)
            if (scales.view(np.uint8) == NAN_SCALE).any():
                raise CheckpointError(f"{name} holds NaN or infinity, which cannot be quantised")
            yield values, scales


def quantise_matrix(
    matrix: np.ndarray, kind: Format, tile: tuple[int, int], known: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in FP8 or FP4 and its scales, a strip of rows at a time; `known` as in `quantise_fp8_tiles`."""
    step = max(1, STRIP // (tile[0] * matrix.shape[1])) * tile[0]
    strips = []
    for first in range(0, len(matrix), step):
        strip = matrix[first : first + step]
        kept = None if known is None else known[first // tile[0] : -(-(first + len(strip)) // tile[0])]
        fp4 = kind == "fp4"
        strips.append(quantise_fp4(strip, tile[1], kept) if fp4 else quantise_fp8_tiles(strip, tile, kept))
    values, scales = zip(*strips, strict=True)
    return np.concatenate(values), np.concatenate(scales)


def _float_name(kind: str) -> str:
    return next(name for name, stored in FLOAT_NAMES.items() if stored == kind)


def _refuse_other_tree(leaves: Mapping[str, Any], config: DeepseekV4Config) -> None:
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
