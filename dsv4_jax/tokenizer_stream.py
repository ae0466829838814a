"""Text from token ids that come one at a time: never half a character, and in total exactly `Tokenizer.decode`."""

from __future__ import annotations

import codecs
from typing import Protocol

from dsv4_jax.tokenizer import BPETokenizer, Special, Tokenizer


class StreamDecoder:
    """Turns the ids of a generation into text as they come.

    Bytes that do not make a whole character yet are kept back; those that never will become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        """`skip_special` leaves the special tokens out of what `feed` gives (never of `feed_pieces`)."""
        self._special_of = {index: Special(token) for token, index in tokenizer.specials.items()}
        self._skip_special = skip_special
        by_library = isinstance(tokenizer, BPETokenizer) and not tokenizer.byte_level
        self._text: _Text = _LibraryText(tokenizer) if by_library else _ByteText(tokenizer)

    def feed(self, token: int) -> str:
        """The text that is complete with this id; often "" inside a character of several tokens."""
        pieces = self.feed_pieces(token)
        return "".join(piece for piece in pieces if not (self._skip_special and isinstance(piece, Special)))

    def feed_pieces(self, token: int) -> list[str]:
        """`feed` as the pieces of a prompt: text, and a `Special` where the id is a special token."""
        special = self._special_of.get(int(token))
        text = self._text.feed(int(token)) if special is None else self._text.flush()
        return [piece for piece in (text, special) if piece]

    def flush(self) -> str:
        """What was kept back, at the end of the ids; the decoder can be used again afterwards."""
        return self._text.flush()


class _Text(Protocol):
    def feed(self, token: int) -> str: ...

    def flush(self) -> str: ...


class _ByteText:
    """Where every id stands for bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _LibraryText:
    """Where the text of an id depends on its neighbours (SentencePiece style): what decoding the run so far adds.

    Each id decodes the run again: fine for a foreign vocabulary, too slow for the released one, which has bytes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        return self._new(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        text = self._new(self._tokenizer.decode(self._ids))
        self._ids, self._given = [], 0
        return text

    def _new(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new
