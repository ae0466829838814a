"""A batch of sequences being continued: reading the prompts, choosing the first token, entering what was chosen.

Rows are slots. One that has ended (`left` is 0) is still computed, with no real tokens: shapes never change, and a step
is compiled once per number of rows, capacity and `Shape`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.inference.sampling import LogProbs, Settings, draw, log_probabilities, weigh
from dsv4_jax.kernels.chunks import join, split
from dsv4_jax.layers.kv_cache import Cache, init_cache
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization.storage import FormatName

PIECE = 64  # prompt positions whose logits exist at once when their log-probabilities are asked for


class Shape(NamedTuple):
    """What is compiled for, beside the sizes of the arrays.

    drafts: tokens that the MTP module proposes per step; 0 decodes plainly.
    top: most likely tokens to report, at least one, or None for no log-probabilities.
    steps: most steps per call.
    partition: how everything lies on devices.
    """

    drafts: int = 0
    top: int | None = None
    steps: int = 16
    partition: Partition = ALONE

    def settled(self, tree: Any) -> Any:
        """Caches as the partition has them, each row's part with the row; all else whole on every device."""
        by_row = lambda x: self.partition.constrain(x, (None, "batch"))  # noqa: E731
        whole = lambda x: self.partition.constrain(x, ())  # noqa: E731

        def one(x: Any) -> Any:
            if not isinstance(x, Cache):
                return whole(x)
            held = {"states": jax.tree.map(by_row, x.states), "pools": jax.tree.map(by_row, x.pools)}
            return replace(x, lengths=whole(x.lengths), tables=whole(x.tables), **held)

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Cache))


class Last(NamedTuple):
    """The model's output at each prompt's last token so far: hidden states [B, D] and streams [B, n, D]."""

    hidden: jax.Array
    streams: jax.Array


class Prompted(NamedTuple):
    """B prompts on their way through the model: their caches, the tokens that occurred [B, V] bool, the last output."""

    cache: Cache
    seen: jax.Array
    last: Last


class Rows(NamedTuple):
    """B sequences being continued.

    cache: what they hold; the last chosen token is not in it yet.
    seen: [B, V] bool, tokens that occurred.
    token: the last chosen one [B].
    left: how many may still come [B]; 0 once a row has ended.
    settings: how each row chooses.
    stops: ids that end each row [B, K], -1 unused.
    drafting: what the MTP module says behind the last token, [B, D]; [B, 0] in plain decoding.
    """

    cache: Cache
    seen: jax.Array
    token: jax.Array
    left: jax.Array
    settings: Settings
    stops: jax.Array
    drafting: jax.Array


class Emitted(NamedTuple):
    """What one step chose: tokens [B, W], of which `counts` [B] are real, the token that ends a row included.

    accepted: how many of the drafts were right [B], -1 where none were made.
    """

    tokens: jax.Array
    counts: jax.Array
    accepted: jax.Array
    log_probs: LogProbs | None


def start(config: DeepseekV4Config, cache: Cache, dtype: jnp.dtype) -> Prompted:
    """Prompts of which nothing was read yet; `dtype` is that of the model's activations."""
    rows, size = cache.batch, config.hidden_size
    streams = jnp.zeros((rows, config.hc_mult, size), dtype)
    return Prompted(cache, jnp.zeros((rows, config.vocab_size), bool), Last(jnp.zeros((rows, size), dtype), streams))


def unread(
    config: DeepseekV4Config, shape: Shape, rows: int, capacity: int, cache_format: FormatName, dtype: jnp.dtype
) -> Prompted:
    """`start` with an empty cache, made where it lies."""

    def make() -> Prompted:
        return shape.settled(start(config, init_cache(config, rows, capacity, cache_format), dtype))

    return make() if shape.partition is ALONE else jax.jit(make)()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read_chunk(
    config: DeepseekV4Config,
    shape: Shape,
    params: model.Params,
    prompted: Prompted,
    tokens: jax.Array,
    counts: jax.Array,
    known: jax.Array,
) -> tuple[Prompted, LogProbs | None]:
    """Put C more tokens of each prompt through the model.

    Args:
        config: the model's.
        shape: `drafts` also runs the MTP module; `top` asks for the log-probabilities of the tokens that follow.
        params: the model's.
        prompted: the prompts so far; donated.
        tokens: [B, C + 1], the chunk and the token behind it.
        counts: how many of the C are real [B].
        known: how many of the C have a known token behind them [B].

    Returns:
        The prompts, and log-probabilities of `tokens[:, 1:]`.
    """
    chunk, following = tokens[:, :-1], tokens[:, 1:]
    before = prompted.cache.lengths
    partition = shape.partition
    out = model.forward(config, params, chunk, cache=prompted.cache, counts=counts, logits=False, partition=partition)
    cache = out.cache
    assert cache is not None
    if shape.drafts:
        _, cache = model.forward_mtp(config, params, out.streams, following, cache, before, known, partition=partition)
    ids = jnp.where(jnp.arange(chunk.shape[1]) < counts[:, None], chunk, config.vocab_size)
    seen = jax.vmap(lambda seen, ids: seen.at[ids].set(True, mode="drop"))(prompted.seen, ids)
    fresh = counts > 0
    here = lambda new, old: jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), take(new, counts - 1), old)  # noqa: E731
    last = jax.tree.map(here, Last(out.hidden, out.streams), prompted.last)
    found = None if shape.top is None else _following(params, out.hidden, following, shape.top)
    return shape.settled((Prompted(cache, seen, last), found))


def _following(params: model.Params, hidden: jax.Array, following: jax.Array, top: int) -> LogProbs:
    """Log-probabilities of the tokens [B, C] that follow, a few positions at a time: logits [B, C, V] never exist."""
    one = lambda piece: log_probabilities(model.output_logits(params, piece[0]), piece[1], top)  # noqa: E731
    return join(jax.lax.map(one, split((hidden, following), PIECE)), hidden.shape[1])


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def first_token(
    config: DeepseekV4Config,
    shape: Shape,
    params: model.Params,
    cache: Cache,
    seen: jax.Array,
    last: Last,
    settings: Settings,
    left: jax.Array,
    stops: jax.Array,
) -> tuple[Rows, Emitted]:
    """Choose the token behind each prompt; `left` is 0 for rows that are only padding. Cache and `seen` are donated."""
    logits = model.output_logits(params, last.hidden)
    token = draw(weigh(logits, settings, seen), settings, cache.lengths)
    drafting = jnp.zeros((len(token), 0), last.hidden.dtype)
    if shape.drafts:
        one, streams, place = (left > 0).astype(jnp.int32), last.streams[:, None], cache.lengths - 1
        drafting, cache = model.forward_mtp(
            config, params, streams, token[:, None], cache, place, one, partition=shape.partition
        )
        drafting = drafting[:, 0]
    rows = Rows(cache, seen, token, left, settings, stops, drafting)
    found = log_probs_of(logits[:, None], token, shape)
    return shape.settled(enter(rows, token[:, None], left > 0, jnp.full(len(token), -1), found))


def empty(rows: int, shape: Shape) -> Emitted:
    """Room for what `shape.steps` steps emit, [steps, B, ..]."""
    places = (shape.steps, rows, shape.drafts + 1)
    counts, best = jnp.zeros(places[:2], jnp.int32), (*places, shape.top or 1)
    log_probs = LogProbs(jnp.zeros(places), jnp.zeros(best, jnp.int32), jnp.zeros(best))
    return Emitted(jnp.zeros(places, jnp.int32), counts, counts - 1, None if shape.top is None else log_probs)


def enter(
    rows: Rows, tokens: jax.Array, counts: jax.Array, accepted: jax.Array, log_probs: LogProbs | None
) -> tuple[Rows, Emitted]:
    """Enter the chosen tokens [B, W], of which `counts` are real, and end rows at a stop token or at their limit."""
    counts = counts.astype(jnp.int32)
    ids = jnp.where(jnp.arange(tokens.shape[1]) < counts[:, None], tokens, rows.seen.shape[1])
    seen = jax.vmap(lambda seen, ids: seen.at[ids].set(True, mode="drop"))(rows.seen, ids)
    token = jnp.where(counts > 0, take(tokens, counts - 1), rows.token)
    stopping = (ids[..., None] == rows.stops[:, None]).any(-1)
    until_stop = jnp.where(stopping.any(-1), stopping.argmax(-1) + 1, tokens.shape[1] + 1)
    shown = jnp.minimum(jnp.minimum(counts, rows.left), until_stop).astype(jnp.int32)
    left = jnp.where(until_stop <= shown, 0, rows.left - shown)
    return rows._replace(seen=seen, token=token, left=left), Emitted(tokens, shown, accepted, log_probs)


def log_probs_of(logits: jax.Array, tokens: jax.Array, shape: Shape) -> LogProbs | None:
    """Of tokens [B] or [B, W] from logits [B, W, V], where they are asked for."""
    return None if shape.top is None else log_probabilities(logits, tokens.reshape(logits.shape[:2]), shape.top)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, N, ..], index [B] -> [B, ..]; negative indices take the first."""
    return jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(x, index)
