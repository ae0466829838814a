"""Writing a folder of safetensors files in a stream: one piece of one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dsv4_jax.checkpoint.files import BITS, INDEX, WHOLE, CheckpointError
from dsv4_jax.checkpoint.storage import Spec

Pieces = Iterator[tuple[str, np.ndarray]]


def plan_files(specs: dict[str, Spec], limit: int) -> dict[str, list[str]]:
    """Names of tensors by file, in the order in which they are written.

    Files hold at most `limit` bytes (a larger tensor has its own). Inside a file wide numbers come first, so that every
    tensor begins where its numbers are aligned; a scale stays behind its weight.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    files = [WHOLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    ordered = (sorted(names, key=lambda name: -BITS[specs[name].dtype]) for names in shards)
    return dict(zip(files, ordered, strict=True))


def write_files(folder: Path, specs: dict[str, Spec], files: dict[str, list[str]], pieces: Pieces) -> None:
    """Write every file of `files` and, where there are several, the index.

    Args:
        folder: an existing folder.
        specs: dtype and shape of every tensor.
        files: what `plan_files` says.
        pieces: (name, array) in that order; a tensor may come in several consecutive pieces.
    """
    pending = next(pieces, None)
    for file, names in files.items():
        temporary = folder / f".{file}.partial"
        try:
            with temporary.open("wb") as out:
                out.write(_header(specs, names))
                for name in names:
                    written = 0
                    while pending is not None and pending[0] == name:
                        written += out.write(np.ascontiguousarray(pending[1]).reshape(-1).view(np.uint8).data)
                        pending = next(pieces, None)
                    if written != specs[name].nbytes:
                        raise CheckpointError(f"{name}: {written} bytes came for {specs[name]}")
            temporary.replace(folder / file)
        finally:
            temporary.unlink(missing_ok=True)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(specs: dict[str, Spec], names: Iterable[str]) -> bytes:
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name in names:
        spec = specs[name]
        rows[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [first, first + spec.nbytes]}
        first += spec.nbytes
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
