"""Attention over compressed entries laid out in rows: one gradient rule, and a backend per platform."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.platforms import by_platform
from dsv4_jax.kernels.sparse_attention import tpu, xla
from dsv4_jax.kernels.sparse_attention.xla import Branch


def range_attention(q: jax.Array, entries: jax.Array, lo: jax.Array, hi: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends every entry lo_t <= i < hi_t of `entries` [B, T, K]; lo, hi [B, S]."""
    return _attend(q, entries, jnp.stack([lo, hi], axis=-1), scale, False)


def gather_attention(q: jax.Array, entries: jax.Array, indices: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `indices[t]` of [B, T, K]; indices [B, S, k], -1 is unused."""
    return _attend(q, entries, indices, scale, True)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: jax.Array, entries: jax.Array, choice: jax.Array, scale: float, gathered: bool) -> Branch:
    return _forward(q, entries, choice, scale, gathered)


def _forward(q: jax.Array, entries: jax.Array, choice: jax.Array, scale: float, gathered: bool) -> Branch:
    """`choice` [B, S, k] are the chosen entries of each query, or [B, S, 2] the range that it sees."""
    static = {"scale": scale, "gathered": gathered}
    kernel = partial(tpu.forward, scale=scale) if gathered and tpu.supports(q, entries) else None
    return by_platform(q, entries, choice, xla=partial(xla.forward, **static), tpu=kernel)


def _attend_fwd(q, entries, choice, scale, gathered):
    out, lse = _forward(q, entries, choice, scale, gathered)
    return (out, lse), (q, entries, choice, out, lse)


def _attend_bwd(scale, gathered, saved, cotangents):
    q, entries = saved[:2]
    static = {"scale": scale, "gathered": gathered}
    kernel = partial(tpu.backward, scale=scale) if gathered and tpu.supports(q, entries) else None
    dq, d_entries = by_platform(*saved, *cotangents, xla=partial(xla.backward, **static), tpu=kernel)
    return dq, d_entries, None


_attend.defvjp(_attend_fwd, _attend_bwd)
