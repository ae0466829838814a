"""English technical prose, the same on every machine: the service documentation in a pinned botocore (Apache-2.0)."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv4_jax.errors import MissingPackageError, how_to_install
from train.data.manifest import Manifest, SourceFile

RECIPE = "1"
_SHORTEST = 40
_END_OF_PARAGRAPH = re.compile(r"</(?:p|li|note|important|dt|dd|ul)>")
_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile(r"[ \t]+")


def prose_corpus() -> tuple[Manifest, Callable[[], list[tuple[str, str]]]]:
    """Manifest and reader of the corpus `prose`: one document for each version of each service.

    Raises:
        MissingPackageError: without botocore; says which extra brings it.
    """
    spec = importlib.util.find_spec("botocore")
    if spec is None or not spec.submodule_search_locations:
        missing = "--data prose reads the documentation inside botocore, which is not installed"
        raise MissingPackageError(f"{missing}: {how_to_install('prose')}")
    root = Path(spec.submodule_search_locations[0]) / "data"
    paths = sorted(root.rglob("service-2.json*"), key=Path.as_posix)
    files = tuple(SourceFile.of(path.relative_to(root).as_posix(), path) for path in paths)
    versions = {"botocore": importlib.metadata.version("botocore"), "recipe": RECIPE}
    return Manifest("prose", versions, files), functools.cache(lambda: list(_documents(root, paths)))


def _documents(root: Path, paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Paragraphs that no earlier document has, joined by empty lines."""
    seen: set[str] = set()
    for path in paths:
        raw = path.read_bytes()
        service = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        fresh = []
        for text in map(plain_text, documentation(service)):
            if len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                fresh.append(text)
        yield path.parent.relative_to(root).as_posix(), "\n\n".join(fresh)


def documentation(node: Any) -> Iterator[str]:
    """Every documentation string of a service description, in the order of the file."""
    if isinstance(node, list):
        for value in node:
            yield from documentation(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, str):
                yield from [value] if key in ("documentation", "description") else []
            else:
                yield from documentation(value)


def plain_text(markup: str) -> str:
    """HTML to text: a line for each paragraph or list entry, tags and repeated blanks gone."""
    return _SPACE.sub(" ", html.unescape(_TAG.sub("", _END_OF_PARAGRAPH.sub("\n", markup)))).strip()
