"""What a corpus was made of, to the byte: so that a resumed run can refuse other data."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4_jax.errors import UserError


class DataMismatchError(UserError):
    """The data of a run is not the data that the run began with."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: its name relative to the corpus, the SHA-256 of its bytes, and their number."""

    name: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, name: str, content: bytes | Path) -> SourceFile:
        """The entry of a file, by its bytes or by its path (read in pieces, so that size does not matter)."""
        if isinstance(content, bytes):
            return cls(name, hashlib.sha256(content).hexdigest(), len(content))
        with content.open("rb") as stream:
            return cls(name, hashlib.file_digest(stream, "sha256").hexdigest(), content.stat().st_size)


@dataclass(frozen=True)
class Manifest:
    """A corpus by name, versions and files. Two corpora with the same `hash` hold the same documents in the same order.

    Attributes:
        corpus: what the user asked for: `python`, `prose`, or the last part of the path.
        versions: package -> version, and `recipe`: a number that changes when the cleaning of the text changes.
        files: the files read, in order.
    """

    corpus: str
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[SourceFile, ...] = ()

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict:
        """Plain JSON data, the hash included."""
        return {**asdict(self), "hash": self.hash}

    @classmethod
    def from_dict(cls, data: dict) -> Manifest:
        """The reverse of `to_dict`; UserError when the recorded hash does not fit the content."""
        files = tuple(SourceFile(**file) for file in data["files"])
        manifest = cls(data["corpus"], dict(data["versions"]), files)
        if data.get("hash", manifest.hash) != manifest.hash:
            raise UserError(f"the manifest of corpus {manifest.corpus!r} was edited or damaged: its hash does not fit")
        return manifest

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


SETTLED = 2_000_000_000
"""Nanoseconds: a file changed later than this before it was hashed may change again and show the same times."""


def source_files(named: Mapping[str, Path], cache: Path | None = None) -> tuple[SourceFile, ...]:
    """The entries of files by name.

    With a folder `cache` a file is read once, and again when its size, or the time of any change, is another.

    Raises:
        UserError: when one cannot be read.
    """
    paths = {name: os.path.abspath(path) for name, path in named.items()}
    kept = cache and cache / "hashes" / (hashlib.sha256("\n".join(paths.values()).encode()).hexdigest()[:32] + ".json")
    known, found, now = _known(kept), {}, time.time_ns()
    for name, path in paths.items():
        try:
            stat = os.stat(path)
            marks = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            same = known.get(path, {}).get("marks") == marks
            sha256 = known[path]["sha256"] if same else SourceFile.of(name, Path(path)).sha256
        except OSError as error:
            raise UserError(f"{path} could not be read: {error}") from error
        found[path] = {"marks": marks, "sha256": sha256}
    settled = {path: entry for path, entry in found.items() if max(entry["marks"][1:]) < now - SETTLED}
    if kept and settled != known:
        with suppress(OSError):  # of a cache that is full or only to be read: it saves time and no more
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
            draft.write_text(json.dumps(settled), encoding="utf-8")
            draft.replace(kept)
    return tuple(SourceFile(name, found[p]["sha256"], found[p]["marks"][0]) for name, p in paths.items())


def _known(kept: Path | None) -> dict[str, Any]:
    if kept is not None:
        with suppress(OSError, ValueError):
            return dict(json.loads(kept.read_text(encoding="utf-8")))
    return {}


def require_same_data(started_with: Manifest, now: Manifest) -> None:
    """Returns when both manifests describe the same documents.

    Raises:
        DataMismatchError: with what differs: the corpus, versions, and files added, removed and changed.
    """
    if started_with.hash == now.hash:
        return
    raise DataMismatchError(
        f"this run began with other data (manifest {started_with.hash[:12]}, now {now.hash[:12]}): "
        f"{_difference(started_with, now)}. "
        "Restore the data, or start a new run in another folder."
    )


def _difference(old: Manifest, new: Manifest) -> str:
    parts = [f"corpus {old.corpus!r} became {new.corpus!r}"] if old.corpus != new.corpus else []
    for name in sorted(old.versions.keys() | new.versions.keys()):
        before, after = old.versions.get(name, "absent"), new.versions.get(name, "absent")
        parts += [f"{name} {before} became {after}"] if before != after else []
    before, after = ({file.name: file.sha256 for file in manifest.files} for manifest in (old, new))
    parts += _named("files are gone", before.keys() - after.keys())
    parts += _named("files are new", after.keys() - before.keys())
    parts += _named("files changed", (name for name in before.keys() & after.keys() if before[name] != after[name]))
    return "; ".join(parts) or "the order of the files changed"


def _named(what: str, names: Iterable[str], most: int = 3) -> list[str]:
    names = sorted(names)
    return [f"{len(names)} {what} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"] if names else []
