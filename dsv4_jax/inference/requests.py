"""What a caller may ask for, checked before anything starts."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.inference.sampling import Settings
from dsv4_jax.tokenizer import Tokenizer

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class GenerateOptions:
    """How one prompt is continued.

    Attributes:
        max_new_tokens: at most so many.
        temperature: of the softmax; 0, the default, always takes the most likely token.
        top_k: choose among so many most likely tokens; 0 for all.
        top_p: choose from the smallest set of tokens that holds this much probability.
        min_p: leave out tokens less than this share as likely as the most likely one.
        repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely.
        stop_tokens: ids that end the text; they are not part of it.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on behind the tokenizer's end token.
        seed: of the choices: sample j of a prompt uses `seed + j`. None: another one every time.
        logprobs: None for none; n for those of the chosen and of the n most likely tokens, under the model itself.
        prompt_logprobs: also of the prompt's tokens (and as many most likely ones as `logprobs` says).
        n: how many continuations; they share the prompt's cache.

    Raises:
        UserError: for values of another type or outside their range, and for values that contradict each other.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        """Check each value, then what goes together."""
        least = 0 if self.prompt_logprobs else 1
        self._check("max_new_tokens", _is_whole, "a whole number")
        self._check("max_new_tokens", lambda v: v >= least, f"at least {least}")
        self._check("top_k", _is_whole, "a whole number")
        self._check("top_k", lambda v: 0 <= v < 2**31, "0 (all tokens) or more, and below 2^31")
        self._check("n", _is_whole, "a whole number")
        self._check("n", lambda v: v >= 1, "at least 1")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._check(name, _is_number, "a number")
        self._check("temperature", lambda v: 0 <= v < float("inf"), "0 or more, and finite")
        self._check("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")
        self._check("min_p", lambda v: 0 <= v <= 1, "from 0 to 1")
        self._check("repetition_penalty", lambda v: 0 < v < float("inf"), "above 0 (1 changes nothing), and finite")
        maybe = lambda v, most: v is None or (_is_whole(v) and 0 <= v <= most)  # noqa: E731
        self._check("logprobs", lambda v: maybe(v, MOST_LOGPROBS), f"None, or a whole number from 0 to {MOST_LOGPROBS}")
        self._check("seed", lambda v: maybe(v, 2**32 - 1), "None, or a whole number from 0 to 2^32 - 1")
        self._check("stop", lambda v: _is_list(v, lambda s: isinstance(s, str) and s), "a list of strings, none empty")
        self._check("stop_tokens", lambda v: _is_list(v, _is_whole), "a list of token ids")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"{self.n} continuations at temperature 0 would all be the same: give a temperature")

    def _check(self, name: str, right: Callable[[Any], bool], wanted: str) -> None:
        if not right(value := getattr(self, name)):
            raise UserError(f"{name} is {value!r}: it must be {wanted}")

    def settings(self, sample: int, vocab_size: int) -> tuple[float, ...]:
        """The row of `Settings` of continuation `sample`."""
        seed = (secrets.randbits(32) if self.seed is None else self.seed + sample) % 2**32
        filters = self.top_k, self.top_p, self.min_p
        return self.temperature, *filters, self.repetition_penalty, vocab_size, seed


def check_prompt(
    config: DeepseekV4Config, prompt: Any, options: GenerateOptions, tokenizer: Tokenizer | None, where: str
) -> np.ndarray:
    """The prompt as int32 [P]; `where` names it in errors.

    Raises:
        UserError: for an empty prompt, ids outside the vocabulary, more tokens than the model has positions, stop
            strings without a tokenizer, and a tokenizer that does not say which token ends a text.
    """
    prompt = token_ids(config, prompt, where)
    if prompt.ndim != 1:
        raise UserError(f"{where} is no row of token ids but has the shape {prompt.shape}: prompts are a list of rows")
    if not len(prompt):
        raise UserError(f"{where} has no tokens: begin it with the token that begins a document, at least")
    token_ids(config, list(options.stop_tokens), f"stop_tokens of {where}")
    wanted = len(prompt) + options.max_new_tokens
    if wanted > config.max_position_embeddings:
        raise UserError(
            f"{where} has {len(prompt)} tokens; with max_new_tokens {options.max_new_tokens} that makes {wanted}, more "
            f"than the model's {config.max_position_embeddings} positions"
        )
    if options.stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer; without one give stop_tokens")
    stop_ids(options, tokenizer)
    return prompt


def token_ids(config: DeepseekV4Config, tokens: Any, where: str) -> np.ndarray:
    """Tokens of any shape on the host as int32; `where` names them in errors.

    Raises:
        UserError: for what is not made of whole numbers, and ids outside the vocabulary.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise UserError(f"{where} is no array of token ids: its rows have different lengths") from error
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{where} is not made of token ids but of {ids.dtype}: encode the text first")
    stray = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(stray):
        raise UserError(f"{where} holds token {stray[0]}: ids of this model go from 0 to {config.vocab_size - 1}")
    return ids.astype(np.int32)


def stop_ids(options: GenerateOptions, tokenizer: Tokenizer | None) -> set[int]:
    """All ids that end a text: a stop string that is a special token counts as its id, and the end token does."""
    ids = {int(token) for token in options.stop_tokens}
    if tokenizer is not None:
        ids |= {tokenizer.specials[text] for text in options.stop if text in tokenizer.specials}
        ids |= set() if options.ignore_eos else {tokenizer.eos_id}
    return ids


def stack_settings(rows: Sequence[tuple[float, ...]]) -> Settings:
    """`Settings` of rows from `GenerateOptions.settings`."""
    types = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.uint32)
    columns = zip(*rows, strict=True)
    return Settings(*(jnp.asarray(column, kind) for column, kind in zip(columns, types, strict=True)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: Any, right: Callable[[Any], Any]) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(map(right, value))


GREEDY = GenerateOptions()
