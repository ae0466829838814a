"""Choosing tokens from logits, for a batch whose rows may all ask for something else.

Every setting is an array over the rows, so one compiled function serves any mixture of requests. What a row draws
depends on its own logits, seed and place alone, never on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

PLAIN, DRAFT, ACCEPT, INSTEAD = range(4)  # what a random number is for; each purpose has its own


class Settings(NamedTuple):
    """How each of B rows chooses; arrays [B].

    temperature: of the softmax, float32; 0 takes the most likely token.
    top_k: only so many most likely tokens, int32; 0 for all. Tokens as likely as the last of them stay too.
    top_p: of these the smallest set that holds this much probability, float32; 1 for all.
    min_p: of these the ones at least this share as likely as the most likely one, float32; 0 for all.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen before, float32; 1 for none.
    vocab_size: ids from here on are never chosen, int32 (models are padded beyond their tokenizers).
    seed: uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    vocab_size: jax.Array
    seed: jax.Array

    def repeated(self, times: int) -> Settings:
        """Each row `times` times."""
        return Settings(*(jnp.repeat(x, times, axis=0) for x in self))


class LogProbs(NamedTuple):
    """Log-probabilities under the model itself, temperature 1 and nothing left out.

    chosen: of the chosen tokens [..].
    top_ids, top: the most likely tokens and theirs, most likely first [.., n].
    """

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array


def weigh(logits: jax.Array, settings: Settings, seen: jax.Array) -> jax.Array:
    """What tokens are drawn from: logits [B, V] -> logits of the distribution asked for, float32, -inf where zero.

    The penalty comes first, then temperature, top-k, top-p and min-p, each on what the one before left; temperature 0
    leaves one token (the first of equals).

    Args:
        logits: [B, V] float32.
        settings: of each row.
        seen: [B, V] bool, the tokens of the sequence so far; the penalty's.
    """
    penalty = settings.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    ids = jnp.arange(logits.shape[-1])
    logits = jnp.where(seen, penalised, logits)
    logits = jnp.where(ids < settings.vocab_size[:, None], logits, -jnp.inf)
    best = jnp.where(ids == logits.argmax(-1, keepdims=True), 0.0, -jnp.inf)
    greedy = settings.temperature == 0
    # Relative to the largest: tiny temperatures then overflow to -inf only.
    logits = (logits - logits.max(-1, keepdims=True)) / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    choosy = ~greedy & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0))
    # Sorting a vocabulary costs more than all else here, so it is done only where some row asks for it.
    logits = jax.lax.cond(choosy.any(), _keep_likely, lambda logits, settings: logits, logits, settings)
    return jnp.where(greedy[:, None], best, logits)


def _keep_likely(logits: jax.Array, settings: Settings) -> jax.Array:
    """-inf for all that top-k, top-p and min-p leave out."""
    ordered, rank = jnp.sort(logits, descending=True), jnp.arange(logits.shape[-1])
    in_k = rank < jnp.where(settings.top_k > 0, settings.top_k, len(rank))[:, None]
    p = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf))
    before = jnp.pad(jnp.cumsum(p, -1)[:, :-1], ((0, 0), (1, 0)))
    top_p = settings.top_p[:, None]
    kept = in_k & ((before < top_p) | (top_p >= 1)) & (p >= settings.min_p[:, None] * p[:, :1])
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(weighed: jax.Array, settings: Settings, places: jax.Array, purpose: int = PLAIN) -> jax.Array:
    """One token per row, int32 [B].

    Args:
        weighed: logits [B, V] of `weigh`.
        settings: of each row.
        places: where in its sequence the token will stand [B]; with the seed, all that the choice depends on.
        purpose: of the random number, so that none is used twice.
    """

    def chance(weighed: jax.Array) -> jax.Array:
        keys = random_keys(settings.seed, places, purpose)
        return jax.vmap(jax.random.categorical)(keys, weighed).astype(jnp.int32)

    best = lambda weighed: weighed.argmax(-1).astype(jnp.int32)  # noqa: E731
    return jax.lax.cond((settings.temperature > 0).any(), chance, best, weighed)


def random_keys(seeds: jax.Array, places: jax.Array, purpose: int) -> jax.Array:
    """A random key per row, from its seed and place [B]."""
    make = lambda seed, place: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), place), purpose)  # noqa: E731
    return jax.vmap(make)(seeds, places)


def log_probabilities(logits: jax.Array, tokens: jax.Array, top: int) -> LogProbs:
    """Of the chosen `tokens` [..] and of the `top` most likely ones, from the model's logits [.., V]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    best, ids = jax.lax.top_k(log_p, top)
    return LogProbs(chosen, ids.astype(jnp.int32), best)
