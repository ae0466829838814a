"""The `tokenizer.json` format: read its tables, write a byte vocabulary in it, hand it to the `tokenizers` library."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer


def parse_tokenizer_json(text: str) -> dict[str, Any]:
    """The object in the text; ValueError when it is no `tokenizer.json`."""
    try:
        data = json.loads(text)
        data["model"]["vocab"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError('not a tokenizer.json: it must be a JSON object with "model": {"vocab": ...}') from error
    return data


def token_pieces(vocab: Any, specials: dict[str, int], byte_level: bool) -> list[bytes]:
    """Bytes of every id. Ids that no token has (gaps in a padded vocabulary) stand for nothing."""
    tokens = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
    table = {index: _piece(token, byte_level) for token, index in tokens}
    table.update({index: token.encode() for token, index in specials.items()})
    return [table.get(i, b"") for i in range(max(table) + 1)]


def _piece(token: str, byte_level: bool) -> bytes:
    if byte_level:
        values = _alphabet_values()
        return b"".join(bytes([values[c]]) if c in values else c.encode() for c in token)
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte.group(1)) if byte else token.replace("▁", " ").encode()


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """Byte -> the printable character that byte-level BPE files write for it (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256))


@functools.cache
def _alphabet_values() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_alphabet())}


def byte_vocabulary_json(special_tokens: Sequence[str]) -> dict[str, Any]:
    """A byte-level BPE without merges: ids 0..255 are the bytes, the special tokens follow."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model = {"type": "BPE", **unset, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}
    added = [_added_token(256 + i, token) for i, token in enumerate(special_tokens)]
    rest = {"truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return {"version": "1.0", **rest, "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}


def _added_token(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}


def engine_from_json(text: str) -> HFTokenizer:
    """The library's tokenizer of the text; ImportError that says what to install."""
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError as error:
        raise ImportError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from error
    return HFTokenizer.from_str(text)
