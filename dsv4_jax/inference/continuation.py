"""What a caller gets: events while a continuation grows, and the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsv4_jax.inference.requests import GenerateOptions, stop_ids
from dsv4_jax.inference.stop_strings import ShownText
from dsv4_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogProb:
    """A token's log-probability under the model itself, and the most likely tokens in its place with theirs."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """News of one continuation.

    Attributes:
        prompt, sample: whose, counted from 0.
        tokens: one more id, or none.
        text: what may be shown now; it lags behind the ids inside characters and possible stop strings.
        log_probs: of `tokens`, where asked for.
        prompt_log_probs: in a first event without tokens, where asked for: of the prompt from its second token on.
        finish_reason: in the last event: "stop" (a stop token or string came) or "length".
        accepted: with the first token of a speculative step, how many drafts were right.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    log_probs: tuple[TokenLogProb, ...] = ()
    prompt_log_probs: tuple[TokenLogProb, ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    accepted: int | None = None


@dataclass(frozen=True)
class Completion:
    """A whole continuation: the sum of its events.

    Attributes:
        tokens: its ids, without the stop token. A stop string is cut out of `text` only.
        text: without stop string and special tokens; "" without a tokenizer.
        finish_reason: "stop" or "length".
        log_probs: of `tokens`, where asked for.
        prompt_log_probs: of the prompt from its second token on, where asked for.
        accepted: how many drafts each speculative step kept.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[TokenLogProb, ...] = ()
    prompt_log_probs: tuple[TokenLogProb, ...] | None = None
    accepted: tuple[int, ...] = ()

    @property
    def accepted_length(self) -> float | None:
        """Tokens per speculative step, the main model's own one included; None where nothing was drafted."""
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else None

    @classmethod
    def of(cls, events: Sequence[Event]) -> Completion:
        """The sum of a continuation's events."""
        reason = events[-1].finish_reason
        assert reason is not None, "the continuation has not ended"
        return cls(
            tuple(token for event in events for token in event.tokens),
            "".join(event.text for event in events),
            reason,
            tuple(found for event in events for found in event.log_probs),
            events[0].prompt_log_probs,
            tuple(event.accepted for event in events if event.accepted is not None),
        )


class Continuation:
    """Turns the ids of one row into events, and knows when it has ended.

    Attributes:
        left: how many tokens may still come.
        ended: nothing more will come.
    """

    def __init__(self, prompt: int, sample: int, options: GenerateOptions, tokenizer: Tokenizer | None):
        """Continuation `sample` of prompt number `prompt`."""
        self.prompt, self.sample, self.options = prompt, sample, options
        self.left, self.ended = options.max_new_tokens, False
        self.stops = stop_ids(options, tokenizer)
        self._text = ShownText(tokenizer, options.stop) if tokenizer is not None else None

    def open(self, prompt_log_probs: tuple[TokenLogProb, ...] | None) -> Iterator[Event]:
        """The event in front of the first token, where there is anything to say."""
        self.ended = self.left <= 0
        if prompt_log_probs is not None:
            reason = "length" if self.ended else None
            yield Event(self.prompt, self.sample, prompt_log_probs=prompt_log_probs, finish_reason=reason)

    def take(
        self, tokens: Iterable[int], log_probs: Iterable[TokenLogProb | None], accepted: int | None
    ) -> Iterator[Event]:
        """The events of the tokens of one step."""
        for token, found in zip(tokens, log_probs, strict=True):
            if self.ended:
                return
            yield self._one(token, found, accepted)
            accepted = None

    def _one(self, token: int, found: TokenLogProb | None, accepted: int | None) -> Event:
        self.left -= 1
        stopping = token in self.stops
        text = "" if stopping or self._text is None else self._text.feed(token)
        self.ended = stopping or self.left <= 0 or (self._text is not None and self._text.stopped)
        if self.ended and self._text is not None:
            text += self._text.finish()
            stopping |= self._text.stopped
        reason = ("stop" if stopping else "length") if self.ended else None
        tokens, log_probs = ((), ()) if token in self.stops else ((token,), (found,) if found else ())
        return Event(self.prompt, self.sample, tokens, text, log_probs, None, reason, accepted)
