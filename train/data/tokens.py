"""Text to token files, once: flat memory-mapped ids, document offsets, the split, and the manifest they belong to."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.chat import encode_conversation
from dsv4_jax.errors import UserError
from dsv4_jax.paths import local_path
from dsv4_jax.tokenizer import Tokenizer, load_tokenizer, train_bpe
from sharding.distributed import from_first
from train.data.corpus import Corpus, Format, resolve
from train.data.manifest import Manifest

BPE_SAMPLE_CHARACTERS = 16_000_000
"""A BPE is learned from this much of the training documents, spread evenly: more changes few of 8192 merges."""

_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class TokenStore:
    """A tokenised corpus. Each document is BOS, its text, EOS, or a conversation in the release's prompt format.

    Attributes:
        tokens: all documents one after another, uint16 or uint32 [tokens], memory-mapped when read from disk.
        offsets: where each document begins, and the end of the last, int64 [documents + 1].
        heldout: which documents are kept for evaluation, bool [documents].
        document_bytes: UTF-8 bytes of each document's text, int64 [documents].
        manifest: what the text was.
        tokenizer: what turned it into ids.
        answers: of conversations, which tokens the assistant wrote, bool [tokens]: they alone are learned.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    heldout: np.ndarray
    document_bytes: np.ndarray
    manifest: Manifest
    tokenizer: Tokenizer
    answers: np.ndarray | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The hashes that a checkpoint records: the same identity means the same ids in the same order."""
        return {"manifest": self.manifest.hash, "tokenizer": self.tokenizer.digest}

    @functools.cached_property
    def train_documents(self) -> np.ndarray:
        """Indices of the documents to train on, int64."""
        return np.flatnonzero(~self.heldout)

    @functools.cached_property
    def heldout_documents(self) -> np.ndarray:
        """Indices of the documents kept for evaluation, int64."""
        return np.flatnonzero(self.heldout)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document with BOS and EOS, int64 [documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, BOS and EOS included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def answers_of(self, index: int) -> np.ndarray | None:
        """Which tokens of one document the assistant wrote."""
        return None if self.answers is None else self.answers[self.offsets[index] : self.offsets[index + 1]]

    def heldout_bytes(self, documents: int | None = None) -> bytes:
        """The very text of the (first `documents`) held-out documents, for comparison with a compressor."""
        return b"".join(self._text_bytes(i) for i in self.heldout_documents[:documents])

    def heldout_size(self, documents: int | None = None) -> int:
        """The length of `heldout_bytes`, which nothing is decoded for."""
        return int(self.document_bytes[self.heldout_documents[:documents]].sum())

    def _text_bytes(self, index: int) -> bytes:
        return self.tokenizer.decode_bytes(self.document(index)[1:-1].tolist())

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer, heldout: Iterable[bool], manifest: Manifest):
        """A store in memory, for small texts and for tests."""
        texts = list(texts)
        ids = [_framed(tokenizer, encoded) for encoded in tokenizer.encode_batch(texts)]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        sizes = np.array([len(text.encode()) for text in texts], np.int64)
        return cls(np.concatenate(ids), offsets, np.array(list(heldout), bool), sizes, manifest, tokenizer)

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Maps the files that `tokenise` wrote; UserError when they are incomplete."""
        folder = Path(folder)
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy") for name in ("offsets", "heldout", "document_bytes")}
        manifest, tokenizer = Manifest.load(folder / "manifest.json"), load_tokenizer(folder)
        tokens = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
        if (folder / "answers.npy").is_file():
            arrays["answers"] = np.load(folder / "answers.npy", mmap_mode="r")
        found = {"tokens": len(tokens), "manifest": manifest.hash, "tokenizer": tokenizer.digest}
        if any(about[key] != value for key, value in found.items()) or arrays["offsets"][-1] != len(tokens):
            raise UserError(f"the token files in {folder} are damaged: delete that folder and they are made again")
        return cls(tokens=tokens, manifest=manifest, tokenizer=tokenizer, **arrays)


def default_cache() -> Path:
    """Where token files go: `$DSV4_CACHE`, else `dsv4` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DSV4_CACHE") or Path(home) / "dsv4")


def prepare(
    data: str = "python",
    tokenizer: str = "bpe",
    *,
    vocab_size: int = 8192,
    cache: str | Path | None = None,
    format: Format = "text",
) -> TokenStore:
    """The tokenised corpus of a `--data` and a `--tokenizer` flag; made once, then taken from the cache.

    In a job of several processes all call it. Process 0 looks at the corpus; the others open what it made, and look for
    themselves only where their cache does not hold it.

    Args:
        data: as `corpus.resolve` takes it.
        tokenizer: `bpe` (learned from the training documents of this corpus), or as `load_tokenizer` takes it.
        vocab_size: entries of the BPE.
        cache: folder of token files, `default_cache()` if not given.
        format: "chat" for conversations.

    Raises:
        UserError: for data that cannot be used, and where a process finds other data than process 0.
    """
    folder = local_path(cache or default_cache())
    make = lambda: _prepared(data, tokenizer, vocab_size, folder, format)  # noqa: E731
    name = from_first(make)
    if not (folder / "tokens" / name).is_dir() and (own := make()) != name:
        raise UserError(f"--data {data}: the files here are other ones than those of process 0 ({own}, there {name})")
    return TokenStore.open(folder / "tokens" / name)


def _prepared(data: str, tokenizer: str, vocab_size: int, cache: Path, format: Format) -> str:
    """Makes the token files if they are not there; the name of their folder in the cache's `tokens`."""
    corpus = resolve(data, format, cache)
    vocabulary = _learned(corpus, vocab_size, cache) if tokenizer == "bpe" else load_tokenizer(tokenizer)
    name = f"{corpus.manifest.corpus}-{corpus.manifest.hash[:16]}-{vocabulary.digest[:16]}"
    name += "-chat" if format == "chat" else ""
    return _made_once(cache / "tokens" / name, lambda folder: tokenise(corpus, vocabulary, folder)).name


def tokenise(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the token files of a corpus into `folder`, showing progress on the error stream."""
    lengths, sizes, answers = [], [], []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    heldout = corpus.heldout
    with (folder / "tokens.bin").open("wb") as stream, _progress("tokenising", len(heldout)) as advance:
        for documents in _batches(corpus.documents()):
            ids, written = _encoded(corpus, tokenizer, documents)
            np.concatenate(ids).astype(dtype).tofile(stream)
            answers += written
            lengths += map(len, ids)
            sizes += [len(text.encode()) for _, text in documents]
            advance(len(documents))
    if answers:
        np.save(folder / "answers.npy", np.concatenate(answers))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "heldout.npy", heldout)
    np.save(folder / "document_bytes.npy", np.array(sizes, np.int64))
    corpus.manifest.save(folder / "manifest.json")
    tokenizer.save(folder)
    about = {"dtype": np.dtype(dtype).name, "tokens": sum(lengths), "documents": len(lengths)}
    about |= {"manifest": corpus.manifest.hash, "tokenizer": tokenizer.digest}
    (folder / "store.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _encoded(
    corpus: Corpus, tokenizer: Tokenizer, documents: list[tuple[str, str]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The ids of each document; of conversations also which of them are the assistant's."""
    if corpus.format == "text":
        return [_framed(tokenizer, encoded) for encoded in tokenizer.encode_batch([text for _, text in documents])], []
    encoded = [_conversation(tokenizer, name, json.loads(text)) for name, text in documents]
    return [np.array(ids, np.uint32) for ids, _ in encoded], [np.array(written, bool) for _, written in encoded]


def _conversation(tokenizer: Tokenizer, name: str, document: dict[str, Any]) -> tuple[list[int], list[bool]]:
    messages, tools = document["messages"], document.get("tools")
    thinks = any(isinstance(message, dict) and message.get("reasoning_content") for message in messages)
    try:
        return encode_conversation(tokenizer, messages, "thinking" if thinks else "chat", tools=tools)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _learned(corpus: Corpus, vocab_size: int, cache: Path) -> Tokenizer:
    folder = cache / "bpe" / f"{corpus.manifest.corpus}-{corpus.manifest.hash[:16]}-{vocab_size}"

    def learn(target: Path) -> None:
        with _progress(f"learning a BPE of {vocab_size} entries", 1) as advance:
            train_bpe(_sample(corpus), vocab_size).save(target)
            advance(1)

    return load_tokenizer(_made_once(folder, learn))


def _sample(corpus: Corpus) -> Iterator[str]:
    """Every n-th training document, n such that they hold about `BPE_SAMPLE_CHARACTERS`."""
    step = max(1, round(sum(length for _, length in corpus.entries) / BPE_SAMPLE_CHARACTERS))
    training = (text for (_, text), held in zip(corpus.documents(), corpus.heldout, strict=True) if not held)
    return itertools.islice(training, None, None, step)


def _framed(tokenizer: Tokenizer, ids: list[int]) -> np.ndarray:
    return np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.uint32)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there: beside its place first and then renamed, so never half there."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder.is_dir() and any(folder.iterdir())):  # else another process was first: its files are the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; elsewhere one line at the end."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    yield lambda count: None
    print(f"{what}: done in {time.monotonic() - start:.1f} s", file=sys.stderr)
