"""Folders of safetensors files: what is in them, checked before anything is read, and byte ranges of their tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "F4": 4}
DTYPES = {  # those that a model may hold; the safetensors package has no numpy types for float8
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written as asked; the message names the file or the tensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor's file, safetensors dtype string, shape, and where its bytes begin in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Reader:
    """Reads byte ranges of tensors, and nothing else of their files; use it in a `with` block.

    Attributes:
        bytes_read: bytes asked of the file system so far.
    """

    def __init__(self) -> None:
        """No file is open yet."""
        self.bytes_read = 0
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        """Files are opened as they are needed."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, entry: Entry, rows: range, columns: range) -> np.ndarray:
        """Elements [rows, columns] of a tensor taken as a matrix: its last axis by all others together."""
        width, dtype = entry.shape[-1], DTYPES[entry.dtype]
        part = np.empty((len(rows), len(columns)), dtype)
        first = entry.start + (rows.start * width + columns.start) * dtype.itemsize
        if part.shape[1] == width:
            self._fill(entry.file, part, first)
        else:
            for number, row in enumerate(part):
                self._fill(entry.file, row, first + number * width * dtype.itemsize)
        return part

    def read_bytes(self, entry: Entry, most: int = 1 << 26) -> Iterable[np.ndarray]:
        """The tensor's bytes as they are, in pieces of at most `most`."""
        for first in range(0, entry.nbytes, most):
            piece = np.empty(min(most, entry.nbytes - first), np.uint8)
            self._fill(entry.file, piece, entry.start + first)
            yield piece

    def _fill(self, file: Path, array: np.ndarray, position: int) -> None:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        rest = array.reshape(-1).view(np.uint8).data
        self.bytes_read += len(rest)
        while len(rest):
            count = os.preadv(self._open[file], [rest], position)
            if not count:
                raise CheckpointError(f"{file} has become shorter while it was read")
            rest, position = rest[count:], position + count


def list_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor in the folder's safetensors files, by name, after checking that the files are whole.

    Raises:
        FileNotFoundError: when the folder holds no safetensors model, or an indexed file is missing.
        CheckpointError: for damaged files, other formats, and indices that disagree with the files.
    """
    if (folder / INDEX).exists():
        return _list_indexed(folder)
    if (folder / WHOLE).exists():
        return read_header(folder / WHOLE)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    hint = f" ({', '.join(pickles)} is a PyTorch pickle: save it as safetensors first)" if pickles else ""
    raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}{hint}")


def read_index(path: Path) -> dict[str, str]:
    """File names by tensor of an index file.

    Raises:
        CheckpointError: when it is no index, or names files outside its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index: a JSON object with a weight_map is needed ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has an empty weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path.name} places {name} in {file!r}: files beside the index are meant, without folders"
            )
    return weight_map


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of one file, whose length must be what its header says.

    Raises:
        CheckpointError: for a damaged file, and for other formats.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(f"{path} is a PyTorch pickle under another name: save it as safetensors first")
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer: the file itself was not downloaded")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, 1 << 30):
            raise CheckpointError(f"{path} is not a safetensors file, or it is cut short ({size} bytes)")
        header = _parse_header(path, file.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, row, 8 + length) for name, row in header.items()}
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        state = "cut short" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: {size} bytes, {end} are needed")
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            raise CheckpointError(f"{path}: its header lays tensors over each other, or leaves holes between them")
        position += entry.nbytes
    return entries


def _list_indexed(folder: Path) -> dict[str, Entry]:
    weight_map = read_index(folder / INDEX)
    found: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{INDEX} names {file}, which is not in {folder}: the download is incomplete")
        entries = read_header(folder / file)
        if twice := sorted(set(entries) & set(found)):
            raise CheckpointError(f"{file} holds tensors that another file holds too: {listed(twice)}")
        found |= entries
    misplaced = [name for name, file in weight_map.items() if name in found and found[name].file.name != file]
    for problem, names in (
        ("names tensors that its files do not hold", set(weight_map) - set(found)),
        ("does not name tensors that its files hold", set(found) - set(weight_map)),
        ("names the wrong file for", misplaced),
    ):
        if names:
            raise CheckpointError(f"{INDEX} {problem}: {listed(names)}")
    return found


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    return header


def _entry(path: Path, name: str, row: Any, data: int) -> Entry:
    try:
        dtype, shape, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        fits = (last - first) * 8 == math.prod(shape) * BITS[dtype] and min(first, *shape, 0) == 0
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's row of {name} is damaged or has an unknown dtype: {row}"
        ) from error
    if not fits:
        raise CheckpointError(f"{path}: {name} has {last - first} bytes, which {dtype} {list(shape)} does not fill")
    return Entry(path, dtype, shape, data + first)


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first names, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
