"""The compiled loop of generation: several steps per call, each one token a row, or several with drafts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.inference.batch import Emitted, Rows, Shape, empty, enter, log_probs_of
from dsv4_jax.inference.sampling import draw, weigh
from dsv4_jax.inference.speculative import speculative_step


def plain_step(config: DeepseekV4Config, shape: Shape, params: model.Params, rows: Rows) -> tuple[Rows, Emitted]:
    """One more token for every row that has not ended."""
    active = rows.left > 0
    counts = active.astype(jnp.int32)
    out = model.forward(config, params, rows.token[:, None], cache=rows.cache, counts=counts, partition=shape.partition)
    assert out.logits is not None and out.cache is not None
    logits = out.logits[:, 0]
    token = draw(weigh(logits, rows.settings, rows.seen), rows.settings, out.cache.lengths)
    found = log_probs_of(out.logits, token, shape)
    return enter(rows._replace(cache=out.cache), token[:, None], active, jnp.full(len(token), -1), found)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    config: DeepseekV4Config, shape: Shape, params: model.Params, rows: Rows, steps: jax.Array, alive: jax.Array
) -> tuple[Rows, Emitted]:
    """Up to `steps` steps, fewer when all rows end; rows that are not `alive` [B] end at once. The rows are donated.

    Returns:
        The rows, and what each step emitted, [shape.steps, B, ..]; steps that were not done emitted nothing.
    """
    step = speculative_step if shape.drafts else plain_step
    rows = rows._replace(left=jnp.where(alive, rows.left, 0))
    buffer = empty(len(rows.left), shape)

    def one(carry: tuple[jax.Array, Rows, Emitted]) -> tuple[jax.Array, Rows, Emitted]:
        i, rows, buffer = carry
        rows, emitted = step(config, shape, params, rows)
        return i + 1, rows, jax.tree.map(lambda all_, new: all_.at[i].set(new), buffer, emitted)

    unfinished = lambda carry: (carry[0] < steps) & (carry[1].left > 0).any()  # noqa: E731
    _, rows, buffer = jax.lax.while_loop(unfinished, one, (jnp.int32(0), rows, buffer))
    return shape.settled((rows, buffer))
