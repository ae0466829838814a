"""Text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.tokenizer_stream import StreamDecoder


class ShownText:
    """Decodes a continuation id by id and holds back what may become a stop string.

    Attributes:
        stopped: a stop string came; nothing behind it is ever given.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """Special tokens are left out of the text."""
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def feed(self, token: int) -> str:
        """The text that this id makes certain."""
        return self._pass(self._decoder.feed(token))

    def finish(self) -> str:
        """What was held back, where nothing stopped the text."""
        text = self._pass(self._decoder.flush()) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _pass(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(ends)
        safe = min(ends) if ends else len(self._held) - _beginning(self._held, self._stop)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in stop)), 0)
