"""Documents by one flag: `python`, `prose`, a file, folder or glob of the user's own, or a Hugging Face dataset."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dsv4_jax.errors import UserError
from train.data import local_files, python_source
from train.data.manifest import Manifest

log = logging.getLogger(__name__)

Format = Literal["text", "chat"]
HELDOUT_FRACTION = 0.01
HELDOUT_AT_LEAST = 4


@dataclass(frozen=True)
class Corpus:
    """Named documents, readable any number of times, and the manifest that identifies them.

    Attributes:
        manifest: what the documents come from.
        read: gives the documents as (name, text), always in the same order; duplicates included.
        format: "chat" where each text is a conversation as JSON.
    """

    manifest: Manifest
    read: Callable[[], Iterable[tuple[str, str]]]
    format: Format = "text"

    def documents(self, empty: list[str] | None = None) -> Iterator[tuple[str, str]]:
        """The documents as (name, text), without duplicates and those that are empty, whose names `empty` gets."""
        seen: set[bytes] = set()
        for name, text in self.read():
            digest = content_hash(text)
            if not text.strip():
                if empty is not None:
                    empty.append(name)
            elif digest not in seen:
                seen.add(digest)
                yield name, text

    @functools.cached_property
    def entries(self) -> list[tuple[bytes, int]]:
        """Content hash and number of characters of each of `documents()`. Says how many were left out as empty."""
        empty: list[str] = []
        entries = [(content_hash(text), len(text)) for _, text in self.documents(empty)]
        if empty:
            named = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            log.warning("%s: %d documents without text are left out (%s)", self.manifest.corpus, len(empty), named)
        return entries

    @functools.cached_property
    def heldout(self) -> np.ndarray:
        """Which of `documents()` are held out, bool [documents]: decided by each document's content.

        Raises:
            UserError: when there are fewer than two documents.
        """
        if len(self.entries) < 2:
            found = f"corpus {self.manifest.corpus!r} has {len(self.entries)} documents"
            raise UserError(f"{found}: at least 2 are needed, to train on one and hold out the other")
        return choose_heldout(*zip(*self.entries, strict=True))


def content_hash(text: str) -> bytes:
    """SHA-256 of the UTF-8 text: what tells documents apart and decides the split."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def choose_heldout(hashes: Sequence[bytes], sizes: Sequence[int]) -> np.ndarray:
    """Held-out documents, bool [documents]: those with the lowest hashes until they hold 1% of the text.

    They are at least 4, and never more than half of the documents.
    """
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    before = np.cumsum([0] + [sizes[i] for i in order[:-1]])
    enough = int(np.searchsorted(before, HELDOUT_FRACTION * sum(sizes)))
    count = min(max(enough, HELDOUT_AT_LEAST), len(hashes) // 2)
    chosen = np.zeros(len(hashes), bool)
    chosen[order[:count]] = True
    return chosen


def resolve(data: str, format: Format = "text", cache: Path | None = None) -> Corpus:
    """The corpus that a `--data` flag names.

    `python`: the standard library and the installed requirements. `prose`: the documentation inside botocore. Otherwise
    a path: .txt/.md/.py (a document a file), .jsonl with .gz or .zst (field `text`), .parquet (column `text`), a folder
    or glob of such files, a folder written by Hugging Face `Dataset.save_to_disk`, or `hf:` and a name on its hub. With
    the format "chat" tables alone, with conversations in the field `messages`. What was hashed of the files is kept in
    the folder `cache`, so that it need not be read again.

    Raises:
        FileNotFoundError, UserError: when nothing is there or its kind is not known.
        MissingPackageError: names the extra.
    """
    if format == "chat" and data in ("python", "prose"):
        raise UserError(f"data.format chat needs conversations, and {data!r} is text: name a .jsonl file")
    if data.startswith("hf:"):
        from train.data.hub_source import hub_corpus

        take = local_files.conversation_of if format == "chat" else local_files.text_of
        return Corpus(*hub_corpus(data, take, cache), format)
    if format == "chat":
        return Corpus(*local_files.chat_corpus(data, cache), format)
    if data == "python":
        return Corpus(*python_source.python_corpus())
    if data == "prose":
        from train.data.prose_source import prose_corpus

        return Corpus(*prose_corpus())
    return Corpus(*local_files.local_corpus(data, cache))
