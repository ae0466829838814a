"""Speculative decoding: the MTP module proposes tokens, one forward of the main model checks them all.

What comes out is distributed exactly as without drafts (Leviathan et al. 2023): a draft d of the proposal q is kept
with probability min(1, p(d) / q(d)), and the first one that is not is drawn anew from max(p - q, 0). At temperature 0 p
and q hold one token each: drafts are kept while they are the most likely tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.inference.batch import Emitted, Rows, Shape, enter, log_probs_of, take
from dsv4_jax.inference.sampling import ACCEPT, DRAFT, INSTEAD, Settings, draw, random_keys, weigh
from dsv4_jax.layers.kv_cache import commit


def speculative_step(config: DeepseekV4Config, shape: Shape, params: model.Params, rows: Rows) -> tuple[Rows, Emitted]:
    """One to `shape.drafts + 1` more tokens for every row that has not ended."""
    active, before = (rows.left > 0).astype(jnp.int32), rows.cache.lengths
    drafts, proposal = propose(config, shape, params, rows)
    tokens = jnp.concatenate([rows.token[:, None], drafts], axis=1)
    keep = {"keep_all": True, "partition": shape.partition}
    out = model.forward(config, params, tokens, cache=rows.cache, counts=active * tokens.shape[1], **keep)
    assert out.logits is not None and out.cache is not None
    target = weigh_all(out.logits, rows.settings, seen_along(rows.seen, drafts))
    accepted, instead = verify(target, proposal, drafts, rows.settings, before + 1)
    chosen = jnp.where(
        jnp.arange(shape.drafts + 1) == accepted[:, None], instead[:, None], jnp.pad(drafts, ((0, 0), (0, 1)))
    )
    counts = active * (accepted + 1)
    # The module runs on the main model's streams, now that the tokens behind them are known.
    hidden, cache = model.forward_mtp(config, params, out.streams, chosen, out.cache, before, counts, **keep)
    rows = rows._replace(cache=commit(config, cache, counts), drafting=take(hidden, accepted))
    accepted = jnp.where(active > 0, accepted, -1)
    return enter(rows, chosen, counts, accepted, log_probs_of(out.logits, chosen, shape))


def propose(config: DeepseekV4Config, shape: Shape, params: model.Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """The next tokens by the MTP module: [B, k], and the weighed logits they were drawn from [B, k, V].

    Only the first follows from the main model's streams. Further ones take the module's own output in their place, in
    all streams alike; what that writes into the cache is forgotten.
    """
    active, cache, hidden, seen = (rows.left > 0).astype(jnp.int32), rows.cache, rows.drafting, rows.seen
    tokens, weighed = [], []
    for number in range(shape.drafts):
        if number:
            streams = jnp.broadcast_to(hidden[:, None, None], (len(hidden), 1, config.hc_mult, hidden.shape[-1]))
            last, place = tokens[-1], rows.cache.lengths + number - 1
            hidden, cache = model.forward_mtp(
                config, params, streams, last[:, None], cache, place, active, partition=shape.partition
            )
            hidden, seen = hidden[:, 0], seen | jax.nn.one_hot(last, seen.shape[1], dtype=bool)
        weighed.append(weigh(model.output_logits(params, hidden), rows.settings, seen))
        tokens.append(draw(weighed[-1], rows.settings, rows.cache.lengths + number + 1, DRAFT))
    return jnp.stack(tokens, 1), jnp.stack(weighed, 1)


def verify(
    target: jax.Array, proposal: jax.Array, drafts: jax.Array, settings: Settings, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many drafts stay, and the token behind them.

    Args:
        target: weighed logits of the main model at the drafts and behind the last one [B, k + 1, V].
        proposal: those that the drafts were drawn from [B, k, V].
        drafts: [B, k].
        settings: of each row.
        places: where in its sequence the first draft stands [B].

    Returns:
        The number kept [B], 0 to k, and the token that follows them [B].
    """
    p, q = jax.nn.softmax(target), jax.nn.softmax(proposal)
    count = drafts.shape[1]
    at_draft = lambda x: jnp.take_along_axis(x[:, :count], drafts[..., None], 2)[..., 0]  # noqa: E731
    keys = lambda number: random_keys(settings.seed, places + number, ACCEPT)  # noqa: E731
    chance = jnp.stack([jax.vmap(jax.random.uniform)(keys(number)) for number in range(count)], 1)
    kept = chance * at_draft(q) < at_draft(p)
    accepted = jnp.cumprod(kept, axis=1).sum(1).astype(jnp.int32)
    here, proposed = take(p, accepted), take(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), accepted)
    rest = jnp.maximum(here - proposed, 0.0)
    rest = jnp.where(rest.any(-1, keepdims=True), rest, here)  # equal up to rounding
    return accepted, draw(jnp.log(rest), settings, places + accepted, INSTEAD)


def weigh_all(logits: jax.Array, settings: Settings, seen: jax.Array) -> jax.Array:
    """`weigh` for several places of each row: logits and seen [B, W, V]."""
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return weigh(flat(logits), settings.repeated(logits.shape[1]), flat(seen)).reshape(logits.shape)


def seen_along(seen: jax.Array, drafts: jax.Array) -> jax.Array:
    """Tokens that occurred before each place: seen [B, V] and drafts [B, k] -> [B, k + 1, V]."""
    new = jnp.cumsum(jax.nn.one_hot(drafts, seen.shape[1], dtype=jnp.int32), axis=1) > 0
    return seen[:, None] | jnp.pad(new, ((0, 0), (1, 0), (0, 0)))
