"""A softmax over entries that come tile by tile on a TPU: of each row its maximum, total and weighted sum so far.

Each tile goes on from the one before: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
NEVER = -1e30  # a score that no query sees; its weight is exactly zero


def memory(rows: int, width: int) -> list[Any]:
    """What a softmax in progress keeps of each row: maximum and total [rows, 128], and sum [rows, width]."""
    return [pltpu.VMEM((rows, columns), jnp.float32) for columns in (LANES, LANES, width)]


def begin(softmax) -> None:
    """Nothing seen yet."""
    top_ref, total_ref, sum_ref = softmax
    top_ref[...] = jnp.full_like(top_ref, NEVER)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)


def add(scores, keys, softmax) -> None:
    """Scores [rows, n] of keys [n, width], `NEVER` where a row does not see a key."""
    top_ref, total_ref, sum_ref = softmax
    before = top_ref[:, :1]
    top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights = jnp.where(scores > NEVER, jnp.exp(scores - top), 0.0)
    kept = jnp.exp(before - top)
    total = kept * total_ref[:, :1] + weights.sum(axis=1, keepdims=True)
    sum_ref[...] = kept * sum_ref[...] + jnp.dot(weights.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def result(softmax) -> tuple[jax.Array, jax.Array]:
    """Outputs [rows, width] and log-sum-exp [rows, 1], -inf where a row saw nothing."""
    top_ref, total_ref, sum_ref = softmax
    total = total_ref[:, :1]
    some = jnp.maximum(total, 1e-30)
    return sum_ref[...] / some, jnp.where(total > 0, top_ref[:, :1] + jnp.log(some), -jnp.inf)
