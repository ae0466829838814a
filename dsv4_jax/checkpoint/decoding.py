"""Parts of stored matrices as numbers: read the bytes that hold them, then undo FP8 and FP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_jax.checkpoint.files import CheckpointError, Entry, Reader
from dsv4_jax.checkpoint.matching import Format, Source
from dsv4_jax.checkpoint.names import Part, Place
from dsv4_jax.quantization.formats import SCALE, dequantise_fp8_tiles, scales_as_float, unpack_fp4

STRIP = 1 << 18  # numbers that are undone at a time on the host: their float32 copies stay small


@dataclass(frozen=True)
class Coding:
    """How raw bytes become numbers; static, so that it can be compiled in.

    Attributes:
        format: "plain", "fp8" or "fp4".
        tile: rows and columns that share a scale.
        start: where in its tile the first element lies.
        columns: how many columns are wanted; packed ones come in whole bytes.
        transposed: whether the result is `[columns, rows]`.
        skip: 1 when the first byte's low half is not wanted.
    """

    format: Format
    tile: tuple[int, int]
    start: tuple[int, int]
    columns: int
    transposed: bool
    skip: int = 0

    def decode(self, raw: Any, scales: Any, dtype: Any) -> Any:
        """Raw elements and float32 scales (or None) as numbers in `dtype`; numpy or JAX arrays, whichever come."""
        x = raw
        if self.format == "fp4":
            x = unpack_fp4(raw)[..., self.skip : self.skip + self.columns]
        if scales is not None:
            x = dequantise_fp8_tiles(x, scales, self.tile, dtype, self.start)
        x = x.astype(dtype)
        return x.swapaxes(-1, -2) if self.transposed else x


def read_raw(reader: Reader, source: Source, place: Place, part: Part) -> tuple[np.ndarray, np.ndarray | None, Coding]:
    """The stored bytes of `part` of a place, their scales as float32, and how to decode them."""
    rows, columns = place.stored_part(part)
    per = (source.tile if source.format != "plain" else (1, 1)) if source.scale is not None else (1, 1)
    start = rows.start % per[0], columns.start % per[1]
    coding = Coding(source.format, per, start, len(columns), place.transposed, columns.start % 2)
    raw = read_values(reader, source, place, part)
    return raw, _read_scales(reader, source, place.matrix, rows, columns), coding


def read_values(reader: Reader, source: Source, place: Place, part: Part) -> np.ndarray:
    """The stored elements of `part` of a place, [out, in]; of FP4 all bytes that hold some of it."""
    rows, columns = place.stored_part(part)
    packed = range(columns.start // 2, -(-columns.stop // 2)) if source.format == "fp4" else columns
    return reader.read(source.entry, _in_stack(source.entry, place.matrix, rows), packed)


def read_part(reader: Reader, source: Source, place: Place, part: Part, dtype: Any) -> np.ndarray:
    """`part` of a place as numbers in `dtype`, shaped as the leaf has it."""
    raw, scales, coding = read_raw(reader, source, place, part)
    if source.format != "plain":
        raw = _decode_in_strips(raw, scales, coding, dtype)
        raw = raw.swapaxes(-1, -2) if coding.transposed else raw
    else:
        raw = coding.decode(raw, None, dtype)
    return raw.reshape([len(cut) for cut in part])


def check_values(reader: Reader, source: Source, place: Place, part: Part, experts: int) -> None:
    """Refuse scales that are no numbers, and hash tables with experts that the model has not.

    Raises:
        CheckpointError: that names the tensor.
    """
    rows, columns = place.stored_part(part)
    scales = _read_scales(reader, source, place.matrix, rows, columns)
    if scales is not None:
        if bad := int(np.count_nonzero(~np.isfinite(scales))):
            raise CheckpointError(f"{bad} scales of {source.name} are NaN or infinite: the file is damaged")
    if place.leaf.endswith("tid2eid"):
        table = reader.read(source.entry, rows, columns)
        if table.size and (table.min() < 0 or table.max() >= experts):
            raise CheckpointError(f"{source.name} names experts outside 0..{experts - 1}")


def read_codes(reader: Reader, source: Source, matrix: int, rows: range, columns: range) -> np.ndarray | None:
    """The stored scales of the tiles that hold some of these rows and columns; None without any."""
    if source.scale is None:
        return None
    part = [range(cut.start // per, -(-cut.stop // per)) for cut, per in zip((rows, columns), source.tile, strict=True)]
    return reader.read(source.scale, _in_stack(source.scale, matrix, part[0]), part[1])


def _read_scales(reader: Reader, source: Source, matrix: int, rows: range, columns: range) -> np.ndarray | None:
    codes = read_codes(reader, source, matrix, rows, columns)
    return codes if codes is None else scales_as_float(codes.view(SCALE) if codes.dtype == np.uint8 else codes)


def _in_stack(entry: Entry, matrix: int, rows: range) -> range:
    """Rows of one matrix as rows of the whole stack."""
    first = matrix * entry.shape[-2] if len(entry.shape) > 1 else 0
    return range(first + rows.start, first + rows.stop)


def _decode_in_strips(raw: np.ndarray, scales: Any, coding: Coding, dtype: Any) -> np.ndarray:
    """`coding.decode` of a few rows at a time, not transposed."""
    out = np.empty((len(raw), coding.columns), dtype)
    step = max(1, STRIP // max(1, coding.columns))
    tile_rows, (row, column) = coding.tile[0], coding.start
    for first in range(0, len(raw), step):
        strip = slice(first, min(first + step, len(raw)))
        top, bottom = row + strip.start, row + strip.stop
        part = scales[top // tile_rows : -(-bottom // tile_rows)]
        here = Coding(coding.format, coding.tile, (top % tile_rows, column), coding.columns, False, coding.skip)
        out[strip] = here.decode(raw[strip], part, dtype)
    return out
