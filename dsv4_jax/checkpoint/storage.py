"""In which format every tensor of a release is stored, from the configuration alone.

`quantization_config` decides about the dense matrices, `expert_dtype` about the routed experts: FP4 releases say
"fp4"; the base models leave it out and store experts as FP8 like the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsv4_jax.checkpoint.files import BITS, CheckpointError
from dsv4_jax.checkpoint.names import Scheme, Stored, scale_names, tensors_of_scheme
from dsv4_jax.config import ConfigError, DeepseekV4Config
from dsv4_jax.presets import preset
from dsv4_jax.quantization.formats import FP4_BLOCK, TILE
from dsv4_jax.shapes import Shape, is_table, keeps_float32

Format = Literal["plain", "fp8", "fp4"]
Quantise = Literal["none", "release", "v4", "fp8"]
"""What a checkpoint is written as: plain, or quantised as its own config says (by default as "v4"), as the FP4 releases
are, or as the base models, whose experts are FP8 too."""
FLOAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DENSE_FP8 = tuple(f"attn/{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer/wq_b"))
DENSE_FP8 += tuple(f"ffn/shared_experts/{name}" for name in ("w1", "w2", "w3"))
MTP_FP8 = ("e_proj", "h_proj")


@dataclass(frozen=True)
class Spec:
    """A stored tensor's safetensors dtype string and shape."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def __str__(self) -> str:
        """As messages show it: `BF16 [4096, 1024]`."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Quantisation:
    """How a configuration stores matrices.

    Attributes:
        dense: the format of attention and shared experts.
        experts: the format of routed experts.
        tile: rows and columns that share a scale in FP8.
    """

    dense: Format = "plain"
    experts: Format = "plain"
    tile: tuple[int, int] = TILE

    def format_of(self, stored: Stored) -> Format:
        """The format of one tensor."""
        leaf = stored.leaves[0]
        if "/experts/" in leaf:
            return self.experts
        parts = leaf.split("/")
        dense = leaf.endswith(DENSE_FP8) or (parts[0] == "mtp" and parts[-1] in MTP_FP8)
        return self.dense if dense else "plain"

    def tile_of(self, stored: Stored) -> tuple[int, int]:
        """Rows and columns of one tensor that share a scale."""
        return (1, FP4_BLOCK) if self.format_of(stored) == "fp4" else self.tile

    def specs(self, stored: Stored, floats: str = "BF16") -> tuple[Spec, Spec | None]:
        """The tensor, and its scales when it is quantised; what is neither FP8 nor FP4 is stored as `floats`."""
        leaf, kind, shape = stored.leaves[0], self.format_of(stored), stored.shape
        if kind == "plain":
            return Spec("I64" if is_table(leaf) else "F32" if keeps_float32(leaf) else floats, shape), None
        *lead, rows, columns = shape
        per = self.tile_of(stored)
        scale = Spec("F8_E8M0", (*lead, -(-rows // per[0]), -(-columns // per[1])))
        return (Spec("I8", (*lead, rows, -(-columns // 2))) if kind == "fp4" else Spec("F8_E4M3", shape)), scale


def quantisation_of(config: DeepseekV4Config) -> Quantisation:
    """What `quantization_config` and `expert_dtype` say.

    Raises:
        ConfigError: for another quantisation method than the release's.
    """
    settings = dict(config.quantization_config or {})
    experts = config.expert_dtype or settings.get("expert_dtype")  # transformers moves it inside
    if experts not in (None, "fp4", "fp8"):
        raise ConfigError(f"expert_dtype is {experts!r}: 'fp4', 'fp8' or nothing (which means fp8) is needed")
    if not settings:
        return Quantisation(experts=experts or "plain")
    for key, needed in (("quant_method", "fp8"), ("fmt", "e4m3"), ("scale_fmt", "ue8m0")):
        if settings.get(key, needed) not in (needed, None):
            raise ConfigError(f"quantization_config.{key} is {settings[key]!r}: {needed!r} is needed")
    tile = tuple(settings.get("weight_block_size") or TILE)
    if len(tile) != 2 or not all(isinstance(size, int) and size > 0 for size in tile):
        raise ConfigError(f"quantization_config.weight_block_size is {tile}: two positive integers are needed")
    return Quantisation("fp8", "fp4" if experts == "fp4" else "fp8", tile)


def stored_as(config: DeepseekV4Config, quantise: Quantise) -> DeepseekV4Config:
    """`config` with the quantisation settings of a checkpoint that is written so.

    Raises:
        CheckpointError: for an unknown `quantise`.
    """
    if quantise not in get_args(Quantise):
        raise CheckpointError(f"there is no quantisation {quantise!r}: one of {', '.join(get_args(Quantise))}")
    if quantise == "none":
        return config.replace(quantization_config=None, expert_dtype=None)
    released = preset("v4-flash")
    if not config.quantization_config:
        config = config.replace(quantization_config=released.quantization_config, expert_dtype=released.expert_dtype)
    if quantise == "release":
        return config
    settings = {key: value for key, value in (config.quantization_config or {}).items() if key != "expert_dtype"}
    return config.replace(quantization_config=settings, expert_dtype="fp4" if quantise == "v4" else None)


def inventory(config: DeepseekV4Config, scheme: Scheme | Literal["mix"] = "released") -> dict[str, Spec]:
    """Every tensor of a checkpoint of `config`, in order, a scale behind its weight."""
    return dict(_inventory(config, scheme))


def count_dtypes(specs: dict[str, Spec]) -> Counter[str]:
    """How many tensors have each dtype."""
    return Counter(spec.dtype for spec in specs.values())


def total_bytes(specs: dict[str, Spec]) -> int:
    """`metadata.total_size` of an index."""
    return sum(spec.nbytes for spec in specs.values())


def _inventory(config: DeepseekV4Config, scheme: Any) -> Iterator[tuple[str, Spec]]:
    quantisation, floats = quantisation_of(config), FLOAT_NAMES[config.torch_dtype]
    for name, stored in tensors_of_scheme(config, scheme).items():
        weight, scale = quantisation.specs(stored, floats)
        yield name, weight
        if scale is not None:
            yield scale_names(name, scheme)[0], scale
