"""Text to token ids and back, with one small interface for three kinds of vocabulary.

`ByteTokenizer` (256 bytes, needs nothing), `train_bpe` (a byte-level BPE made on the spot) and any `tokenizer.json`,
the released DeepSeek-V4 one included. All of them know the special tokens by the released strings, so that the prompt
format works with each. Text is data: a user who types `<think>` gets the characters, not the token. Only a `Special`
in a list of prompt pieces, or a whole string encoded with `allow_special=True`, becomes the token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer_json import (
    byte_vocabulary_json,
    engine_from_json,
    learn_bpe_json,
    parse_tokenizer_json,
    released_tokenizer_path,
    token_pieces,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END),
    *("<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>"),
    *(f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")),
)
"""The released strings of pretraining, chat and quick tasks, in the order in which a small vocabulary lists them."""

_BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")
_PAD_NAMES = (PAD, "<pad>", "<|pad|>", "[PAD]")


class Special(str):
    """A special token by its string, vouched for by whoever wrote it; a plain `str` is only text.

    A prompt is a list of both (its pieces), and joining them gives the prompt as one string.
    """

    __slots__ = ()


class Tokenizer:
    """What every vocabulary offers. Build one with `load_tokenizer`, `train_bpe` or `ByteTokenizer`.

    Attributes:
        specials: special-token string -> id.
        vocab_size: number of ids, i.e. the largest id + 1.
        pieces: the bytes that each id stands for (a special token: its string).
    """

    def __init__(self, pieces: Sequence[bytes], specials: dict[str, int], roles: dict[str, str] | None = None):
        """Stores the tables; `roles` may name the bos, eos and pad strings where they are not the usual ones."""
        self.pieces, self.specials, self.vocab_size = list(pieces), dict(specials), len(pieces)
        self._special_of = {index: Special(token) for token, index in specials.items()}
        self._roles = roles or {}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added. Special-token strings stay plain text unless `allow_special`."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` for many texts at once (in parallel where the vocabulary's library can)."""
        raise NotImplementedError

    def encode_prompt(self, pieces: Iterable[str]) -> list[int]:
        """Token ids of a prompt's pieces: a `Special` becomes its token, plain text stays text whatever it says.

        Neighbouring texts are encoded as one, so the ids are those of the joined string with `allow_special`, unless
        some text looks like a special token.

        Raises:
            UserError: when the vocabulary lacks a special token of the prompt.
        """
        runs = [(kind, list(run)) for kind, run in itertools.groupby(pieces, lambda piece: isinstance(piece, Special))]
        missing = sorted({piece for special, run in runs if special for piece in run} - self.specials.keys())
        if missing:
            raise UserError(
                f"this vocabulary has no special token {', '.join(missing)}: such a prompt needs the released "
                "vocabulary ('deepseek'), one trained here, or 'bytes'"
            )
        texts = iter(self.encode_batch(["".join(run) for special, run in runs if not special]))
        encoded = ([self.specials[piece] for piece in run] if special else next(texts) for special, run in runs)
        return list(itertools.chain.from_iterable(encoded))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that the ids stand for; special tokens give their string. UserError for ids that are none."""
        ids = list(ids)
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            stray = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise UserError(f"token {stray} is not of this vocabulary: ids go from 0 to {self.vocab_size - 1}")
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves the special tokens out."""
        return "".join(p for p in self.decode_prompt(ids) if not (skip_special and isinstance(p, Special)))

    def decode_prompt(self, ids: Iterable[int]) -> list[str]:
        """The pieces that the ids stand for: texts, and a `Special` for each special token."""
        runs = [(special, list(run)) for special, run in itertools.groupby(ids, self._special_of.get)]
        pieces = ([special] * len(run) if special is not None else [self._decode_text(run)] for special, run in runs)
        return list(itertools.chain.from_iterable(pieces))

    def _decode_text(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [vocab_size]; 0 for special tokens."""
        sizes = np.array([len(piece) for piece in self.pieces], np.int32)
        sizes[list(self.specials.values())] = 0
        return sizes

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a document."""
        return self._role("bos", _BOS_NAMES)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self._role("eos", _EOS_NAMES)

    @property
    def pad_id(self) -> int:
        """Id that fills unused places; the end token where the vocabulary has no padding of its own."""
        return self.specials[PAD] if PAD in self.specials else self._role("pad", (*_PAD_NAMES, *_EOS_NAMES))

    def special_id(self, token: str) -> int:
        """Id of a special token by its string; KeyError that lists what there is."""
        if token not in self.specials:
            known = ", ".join(list(self.specials)[:12])
            raise KeyError(f"this vocabulary has no special token {token!r}; it has {known or 'none'}, ...")
        return self.specials[token]

    def to_json(self) -> str:
        """The vocabulary as the text of a `tokenizer.json`, readable by the `tokenizers` library."""
        raise NotImplementedError

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary: two tokenizers with the same digest give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """`tokenizer.json`, and `tokenizer_config.json`, which names bos, eos and pad (UserError without them)."""
        name = {index: token for token, index in self.specials.items()}
        roles = {"bos_token": name[self.bos_id], "eos_token": name[self.eos_id], "pad_token": name[self.pad_id]}
        roles_json = json.dumps(roles, ensure_ascii=False, indent=1)
        return {"tokenizer.json": self.to_json(), "tokenizer_config.json": roles_json}

    def save(self, folder: str | Path) -> Path:
        """Writes `files` into the folder; where `tokenizer.json` lies."""
        texts, folder = self.files(), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder / "tokenizer.json"

    def _role(self, role: str, names: Sequence[str]) -> int:
        for name in (self._roles.get(role), *names):
            if name in self.specials:
                return self.specials[name]
        raise UserError(
            f"cannot tell which token is {role}: none of {', '.join(names)} is a special token of this vocabulary. "
            f'Put a tokenizer_config.json with "{role}_token": "..." beside the tokenizer.json.'
        )


class ByteTokenizer(Tokenizer):
    """256 bytes and the special tokens after them. No dependency, no training, one id a byte."""

    def __init__(self, special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """`special_tokens` get the ids 256, 257, ... in the order given."""
        specials = {token: 256 + i for i, token in enumerate(special_tokens)}
        super().__init__([bytes([i]) for i in range(256)] + [token.encode() for token in special_tokens], specials)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """One id for each UTF-8 byte, or for each special token where they are allowed."""
        return [self._with_specials(text) if allow_special else list(text.encode()) for text in texts]

    def to_json(self) -> str:
        """A byte-level BPE without merges: the same ids from any library that reads `tokenizer.json`."""
        return json.dumps(byte_vocabulary_json(list(self.specials)), ensure_ascii=False)

    def _with_specials(self, text: str) -> list[int]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [i for p in parts for i in ([self.specials[p]] if p in self.specials else p.encode())]


class BPETokenizer(Tokenizer):
    """Any vocabulary written as a `tokenizer.json`; every added token of the file counts as special."""

    def __init__(self, tokenizer_json: str, roles: dict[str, str] | None = None):
        """Reads the text of a `tokenizer.json`; UserError when it is none."""
        self._json = tokenizer_json
        data = parse_tokenizer_json(tokenizer_json)
        specials = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        self.byte_level = '"ByteLevel"' in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        super().__init__(token_pieces(data["model"]["vocab"], specials, self.byte_level), specials, roles)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Token ids by the `tokenizers` library, over all CPU cores; nothing is added."""
        engine = self._full if allow_special else self._plain
        encoded = [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        if allow_special:
            return encoded
        clean = self._special_of.keys().isdisjoint
        return [ids if clean(ids) else self._cut(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _cut(self, text: str, ids: list[int]) -> list[int]:
        """`text` again, where the vocabulary itself spells special tokens: each such string in two halves."""
        at = min((text.find(token) for token in self.specials if token in text and len(token) > 1), default=-1)
        if at < 0:
            return ids
        head, tail = self.encode_batch([text[: at + 1], text[at + 1 :]])
        return head + tail

    def _decode_text(self, ids: list[int]) -> str:
        """Exact for byte-level vocabularies; others (SentencePiece style) are decoded by the library."""
        return super()._decode_text(ids) if self.byte_level else self._full.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """The text that this tokenizer was made of."""
        return self._json

    @functools.cached_property
    def _full(self) -> HFTokenizer:
        return engine_from_json(self._json, truncation=None, padding=None)

    @functools.cached_property
    def _plain(self) -> HFTokenizer:
        """The same vocabulary blind to added tokens, so that typed special strings are cut like any other text."""
        return engine_from_json(self._json, added_tokens=[], post_processor=None, truncation=None, padding=None)


def train_bpe(
    texts: Iterable[str], vocab_size: int = 8192, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> BPETokenizer:
    """Learns a byte-level BPE from `texts`: bytes and merges first, the special tokens as the last ids.

    Deterministic: the same texts give the same digest.

    Raises:
        UserError: when `vocab_size` cannot hold the bytes and the special tokens.
    """
    if vocab_size <= 256 + len(special_tokens):
        raise UserError(f"vocab_size {vocab_size} must exceed 256 bytes + {len(special_tokens)} special tokens")
    return BPETokenizer(learn_bpe_json(texts, vocab_size, special_tokens))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer by name or place: `bytes`, `deepseek` (the released vocabulary), a `tokenizer.json` or its folder.

    Raises:
        FileNotFoundError: when there is no such file.
        MissingPackageError: `deepseek` without its package.
        UserError: when the file is no `tokenizer.json`.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    path = released_tokenizer_path() if str(path) == "deepseek" else Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {file}: give 'bytes', 'deepseek', a tokenizer.json or a folder that holds one"
        )
    return _from_json(file.read_text(encoding="utf-8"), _configured_roles(file.parent / "tokenizer_config.json"))


def _from_json(text: str, roles: dict[str, str]) -> Tokenizer:
    data = parse_tokenizer_json(text)
    special_tokens = [token["content"] for token in data.get("added_tokens") or []]
    if data == byte_vocabulary_json(special_tokens):
        return ByteTokenizer(special_tokens)
    return BPETokenizer(text, roles)


def _configured_roles(file: Path) -> dict[str, str]:
    """The bos, eos and pad strings of a `tokenizer_config.json`, where each is a string or an object with `content`."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values = {role: config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    return {role: v["content"] if isinstance(v, dict) else v for role, v in values.items() if v}
