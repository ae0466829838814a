"""Folders of safetensors files: what is in them (checked before anything is read), reading and writing in a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dsv4_jax.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "F4": 4}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written as asked; the message names the file or the tensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor's file, safetensors dtype string and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def list_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor in the folder's safetensors files, by name, after checking that the files are whole.

    Raises:
        FileNotFoundError: when the folder holds no safetensors model, or an indexed file is missing.
        CheckpointError: for damaged files, other formats, and indices that disagree with the files.
    """
    if (folder / INDEX).exists():
        return _list_indexed(folder)
    if (folder / WHOLE).exists():
        return _read_header(folder / WHOLE)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    hint = f" ({', '.join(pickles)} is a PyTorch pickle: save it as safetensors first)" if pickles else ""
    raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}{hint}")


def read_tensors(entries: dict[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor after the other, file by file, in the order of `entries`; only the current one is held."""
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        with safe_open(file, "numpy") as reader:
            for name, entry in entries.items():
                if entry.file == file:
                    yield name, reader.get_tensor(name)


def write_tensors(folder: Path, sizes: dict[str, int], tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> None:
    """Write `tensors` in files of at most `limit` bytes (a larger tensor gets its own), one file in memory at a time.

    Args:
        folder: an existing folder.
        sizes: bytes of every tensor, in the order in which `tensors` come.
        tensors: names and arrays.
        limit: bytes per file.
    """
    shards = _split(sizes, limit)
    files = [WHOLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard = dict(next(stream) for _ in names)
        temporary = folder / f".{file}.partial"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.replace(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _list_indexed(folder: Path) -> dict[str, Entry]:
    weight_map = _read_index(folder / INDEX)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CheckpointError(
                f"{INDEX} places {name} in {file!r}: files beside the index are meant, without folders"
            )
    found: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{INDEX} names {file}, which is not in {folder}: the download is incomplete")
        entries = _read_header(folder / file)
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


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index: a JSON object with a weight_map is needed ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has an empty weight_map")
    return weight_map


def _read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of one file; its length must be what its header says."""
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
    end = 8 + length
    entries: dict[str, Entry] = {}
    for name, row in header.items():
        entries[name], last = _entry(path, name, row)
        end = max(end, 8 + length + last)
    if end != size:
        state = "cut short" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: {size} bytes, {end} are needed")
    return entries


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    return header


def _entry(path: Path, name: str, row: Any) -> tuple[Entry, int]:
    try:
        dtype, shape, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        fits = (last - first) * 8 == math.prod(shape) * BITS[dtype] and first >= 0
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's row of {name} is damaged or has an unknown dtype: {row}"
        ) from error
    if not fits:
        raise CheckpointError(f"{path}: {name} has {last - first} bytes, which {dtype} {list(shape)} does not fill")
    return Entry(path, dtype, shape), last


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first names, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
