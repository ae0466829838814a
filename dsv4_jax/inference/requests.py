"""What a caller may ask for, checked before anything starts."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

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
        UserError: for values outside their range, and for values that contradict each other.
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
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= least, f"at least {least}")
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more, and finite")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < float("inf"), "above 0 (1 changes nothing)")
        _check("logprobs", self.logprobs, 0 <= (self.logprobs or 0) <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}")
        _check("n", self.n, self.n >= 1, "at least 1")
        _check("seed", self.seed, 0 <= (self.seed or 0) < 2**32, "from 0 to 2^32 - 1")
        _check("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a list of strings, none empty")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"{self.n} continuations at temperature 0 would all be the same: give a temperature")

    def settings(self, sample: int, vocab_size: int) -> tuple[float, ...]:
        """The row of `Settings` of continuation `sample`."""
        seed = (secrets.randbits(32) if self.seed is None else self.seed + sample) % 2**32
        filters = self.top_k, self.top_p, self.min_p
        return self.temperature, *filters, self.repetition_penalty, vocab_size, seed


def check_prompt(
    config: DeepseekV4Config, prompt: np.ndarray, options: GenerateOptions, tokenizer: Tokenizer | None, where: str
) -> np.ndarray:
    """The prompt as int32 [P]; `where` names it in errors.

    Raises:
        UserError: for an empty prompt, ids outside the vocabulary, more tokens than the model has positions, and stop
            strings without a tokenizer.
    """
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or not len(prompt):
        raise UserError(f"{where} has no tokens: begin it with the token that begins a document, at least")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise UserError(f"{where} is not made of token ids but of {prompt.dtype}: encode the text first")
    for name, ids in ((where, prompt), (f"stop_tokens of {where}", np.asarray(options.stop_tokens, np.int64))):
        stray = ids[(ids < 0) | (ids >= config.vocab_size)]
        if len(stray):
            raise UserError(f"{name} holds token {stray[0]}: ids of this model go from 0 to {config.vocab_size - 1}")
    wanted = len(prompt) + options.max_new_tokens
    if wanted > config.max_position_embeddings:
        raise UserError(
            f"{where} has {len(prompt)} tokens; with max_new_tokens {options.max_new_tokens} that makes {wanted}, more "
            f"than the model's {config.max_position_embeddings} positions"
        )
    if options.stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer; without one give stop_tokens")
    return prompt.astype(np.int32)


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


def _check(name: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise UserError(f"{name} is {value!r}: it must be {wanted}")


GREEDY = GenerateOptions()
