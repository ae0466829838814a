"""Sampling without a cache: the whole row is computed for every new token, in one compiled loop.

Slow for long texts and simple; it runs the same forward as training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError


@dataclass(frozen=True)
class SampleOptions:
    """How to choose tokens.

    Attributes:
        max_new_tokens: at most so many.
        temperature: of the softmax; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this much probability.
        eos_id: token that ends the text, or None.
        vocab_size: of the tokenizer, where the model's is padded to more: ids from here on are never chosen.

    Raises:
        UserError: for values outside their range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    eos_id: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} must be at least 0 and top_p {self.top_p} in (0, 1]")


def sample(
    config: DeepseekV4Config, params: Any, prompt: np.ndarray, key: jax.Array, options: SampleOptions = SampleOptions()
) -> np.ndarray:
    """The tokens that follow `prompt` (int32 [P], at least one), up to and without the end token.

    Raises:
        UserError: for an empty prompt, ids outside the vocabulary, or more tokens than the model's positions.
    """
    prompt = np.asarray(prompt, np.int32)
    _check(config, prompt, options)
    row = np.zeros((1, len(prompt) + options.max_new_tokens), np.int32)
    row[0, : len(prompt)] = prompt
    tokens, length = _extend(config, options, params, jnp.asarray(row), len(prompt), key)
    return np.asarray(tokens)[0, len(prompt) : int(length)]


def choose(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """One token id from logits [V] (float32)."""
    if temperature == 0:
        return logits.argmax().astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits)[::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        least = jnp.where(before < top_p, ordered, jnp.inf).min()
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _extend(config: DeepseekV4Config, options: SampleOptions, params: Any, tokens: jax.Array, start: int, key: Any):
    """Fill `tokens` [1, S] from place `start` on; returns them and the length reached, the end token not counted."""
    limit = tokens.shape[1]

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, length, ended = carry
        return (length < limit) & ~ended

    def one(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens, length, _ = carry
        written = (jnp.arange(limit) < length).astype(jnp.int32)[None]
        hidden = model.forward(config, params, tokens, segment_ids=written, logits=False).hidden
        logits = model.output_logits(params, hidden[0, length - 1])[: options.vocab_size]
        token = choose(logits, jax.random.fold_in(key, length), options.temperature, options.top_p)
        ended = token == (-1 if options.eos_id is None else options.eos_id)
        return tokens.at[0, length].set(token), jnp.where(ended, length, length + 1), ended

    tokens, length, _ = jax.lax.while_loop(unfinished, one, (tokens, jnp.asarray(start, jnp.int32), jnp.array(False)))
    return tokens, length


def _check(config: DeepseekV4Config, prompt: np.ndarray, options: SampleOptions) -> None:
    if prompt.ndim != 1 or not len(prompt):
        raise UserError("the prompt has no tokens: begin it with the token that begins a document, at least")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise UserError(f"the prompt holds token {prompt.max()}; the vocabulary ends at {config.vocab_size - 1}")
    wanted = len(prompt) + options.max_new_tokens
    if wanted > config.max_position_embeddings:
        raise UserError(f"{wanted} tokens with the prompt are more than the model's {config.max_position_embeddings}")
