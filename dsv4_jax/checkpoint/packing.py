"""Loading matrices as they are stored: FP8 and FP4 bytes with their scales, nothing undone.

Files hold matrices [out, in] and the tree holds [in, out], so bytes are transposed on the way and never changed. Where
a matrix begins inside a tile of the stored one (groups and halves that are stored together), the tiles become smaller:
their lines must lie on those of the stored tiles.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.decoding import read_codes, read_values
from dsv4_jax.checkpoint.files import Reader
from dsv4_jax.checkpoint.matching import Source
from dsv4_jax.checkpoint.names import Part, Place, Stored, tensors_of_scheme
from dsv4_jax.checkpoint.shards import STAGING, Devices, distinct_parts, join, within
from dsv4_jax.checkpoint.storage import quantisation_of
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.quantization.packed import Packed, PackedFormat
from dsv4_jax.shapes import Shape, is_table, keeps_float32, tree_shapes

Found = list[tuple[Source, Place]]
Sharding = jax.sharding.Sharding | None


@dataclass(frozen=True)
class Packing:
    """How a leaf [.., in, out] lies packed.

    Attributes:
        format: "fp8" or "fp4".
        tile: rows and columns of the leaf that share a scale.
        scale: dtype of the scales.
    """

    format: PackedFormat
    tile: tuple[int, int]
    scale: np.dtype

    @property
    def per_byte(self) -> int:
        """Numbers in a byte."""
        return 2 if self.format == "fp4" else 1

    def shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Of values and scales."""
        *lead, rows, columns = shape
        scales = -(-rows // self.tile[0]), -(-columns // self.tile[1])
        return (*lead, rows // self.per_byte, columns), (*lead, *scales)

    def lies(self, shape: Shape, sharding: Sharding) -> bool:
        """Whether no device's part of a leaf cuts a byte or a tile."""
        if sharding is None:
            return True
        try:
            part, *packed = (sharding.shard_shape(whole) for whole in (shape, *self.shapes(shape)))
        except ValueError:  # an axis of scales does not divide over the devices
            return False
        cuts = zip(part[-2:], shape[-2:], self.tile, strict=True)
        return tuple(packed) == self.shapes(part) and all(own == size or own % per == 0 for own, size, per in cuts)


def packing_of(found: Found, shape: Shape, sharding: Sharding) -> Packing | None:
    """How the leaf that `found` fills can stay packed on these devices; None when it cannot."""
    (first, _), places = found[0], [place for _, place in found]
    alike = len({(source.format, source.tile, _scale_dtype(source)) for source, _ in found}) == 1
    if first.format == "plain" or not alike or (first.format == "fp4" and shape[-2] % 2):
        return None
    packing = Packing(first.format, _tile(first.tile, places), _scale_dtype(first))
    return packing if packing.lies(shape, sharding) else None


def load_packed(
    reader: Reader, found: Found, packing: Packing, shape: Shape, dtype: np.dtype, sharding: Sharding
) -> Packed:
    """The leaf, packed; on the host as numpy arrays without a sharding."""
    shards = [
        _load_part(reader, found, packing, part, devices) for part, devices in distinct_parts(shape, sharding).items()
    ]
    values, scales = (
        pieces[0][0] if sharding is None else join(whole, sharding, list(pieces))
        for whole, pieces in zip(packing.shapes(shape), zip(*shards, strict=True), strict=True)
    )
    return Packed(values, scales, packing.format, packing.tile, np.dtype(dtype).name)


def _load_part(reader: Reader, found: Found, packing: Packing, part: Part, devices: Devices) -> list[list[Any]]:
    """Values and scales of one part of the leaf, each on each of the devices."""
    shapes = packing.shapes(tuple(map(len, part)))
    dtypes = np.dtype(np.uint8), packing.scale
    grow = bool(devices) and math.prod(shapes[0]) > STAGING
    blocks = [
        [jnp.zeros(s, t, device=d) for d in devices] if grow else [np.empty(s, t)]
        for s, t in zip(shapes, dtypes, strict=True)
    ]
    for source, place, inner in within(found, part):
        at = tuple(i - cut.start for i, cut in zip(place.index, part, strict=False))
        for number, piece in enumerate(_read(reader, source, place, inner, packing)):
            if grow:
                blocks[number] = [_put(block, piece, np.array(at, np.int32)) for block in blocks[number]]
            else:
                blocks[number][0][at] = piece
        if grow:
            jax.block_until_ready(blocks)  # otherwise matrices that wait for their device pile up on the host
    if grow or not devices:
        return blocks
    return [[jax.device_put(block, device) for device in devices] for (block,) in blocks]


def _read(reader: Reader, source: Source, place: Place, part: Part, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of `part` of a place, shaped as the leaf has them."""
    rows, columns = place.stored_part(part)  # of the stored matrix: rows are outputs
    lead = [len(cut) for cut in part[:-2]]
    values = read_values(reader, source, place, part).view(np.uint8).swapaxes(-1, -2)
    codes = read_codes(reader, source, place.matrix, rows, columns)
    assert codes is not None
    lines = np.arange(rows.start, rows.stop, packing.tile[1]) // source.tile[0] - rows.start // source.tile[0]
    scales = codes[lines].view(packing.scale).swapaxes(-1, -2)
    return values.reshape(*lead, *values.shape), scales.reshape(*lead, *scales.shape)


@partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    """`buffer` with the piece, which fills all other axes, at an index of the leading ones."""
    start = [*at, *(0,) * (buffer.ndim - len(at))]
    return jax.lax.dynamic_update_slice(buffer, piece.reshape((1,) * len(at) + buffer.shape[len(at) :]), start)


def abstract_leaves(
    config: DeepseekV4Config, dtype: Any, shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, Any]:
    """Every leaf by path as shapes and dtypes, packed as `load_packed` would where `config` stores FP8 or FP4.

    Args:
        config: the architecture, with its quantisation settings.
        dtype: of the other floats, but for those that stay float32.
        shardings: by path; nothing is said of devices without.
    """
    quantisation, leaves = quantisation_of(config), {}
    found: dict[str, list[tuple[Stored, Place]]] = defaultdict(list)
    for stored in tensors_of_scheme(config, "released").values():
        for place in stored.places:
            found[place.leaf].append((stored, place))
    for leaf, shape in tree_shapes(config).items():
        stored, sharding = found[leaf][0][0], None if shardings is None else shardings[leaf]
        format, places = quantisation.format_of(stored), [place for _, place in found[leaf]]
        array = partial(jax.ShapeDtypeStruct, sharding=sharding)
        leaves[leaf] = array(shape, jnp.int32 if is_table(leaf) else jnp.float32 if keeps_float32(leaf) else dtype)
        if format != "plain":
            packing = Packing(format, _tile(quantisation.tile_of(stored), places), np.dtype(np.uint8))
            if packing.lies(shape, sharding) and not (format == "fp4" and shape[-2] % 2):
                values, scales = (array(part, np.uint8) for part in packing.shapes(shape))
                leaves[leaf] = Packed(values, scales, format, packing.tile, np.dtype(dtype).name)
    return leaves


def _tile(stored: tuple[int, int], places: list[Place]) -> tuple[int, int]:
    """Rows and columns of the leaf that share a scale, from a tile [out, in] and where the places begin."""
    outputs, inputs = stored
    return inputs, math.gcd(outputs, *(place.row % outputs for place in places))


def _scale_dtype(source: Source) -> np.dtype:
    """Powers of two are bytes; other scales are numbers."""
    return np.dtype(np.float32 if source.scale is not None and source.scale.dtype == "F32" else np.uint8)
