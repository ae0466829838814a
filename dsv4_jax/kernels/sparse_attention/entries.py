"""Attention over entries laid out in rows: one gradient rule, and a backend per platform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.platforms import by_platform, compiled_for, kernels_allowed
from dsv4_jax.kernels.sparse_attention import bands, gpu, gpu_range, tpu, tpu_range, xla
from dsv4_jax.kernels.sparse_attention.bands import RANGE, Band
from dsv4_jax.kernels.sparse_attention.xla import Branch

WINDOW_TILE = 128  # entries of a tile where only a window of them is attended


def range_attention(q: jax.Array, entries: jax.Array, lo: jax.Array, hi: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends every entry lo_t <= i < hi_t of `entries` [B, T, K]; lo, hi [B, S]."""
    return _attend(q, entries, jnp.stack([lo, hi], axis=-1), scale, RANGE, kernels_allowed())


def gather_attention(q: jax.Array, entries: jax.Array, indices: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `indices[t]` of [B, T, K].

    Args:
        q: queries.
        entries: shared by the heads.
        indices: int32 [B, S, k]; -1 is unused, no other number occurs twice in a query's.
        scale: factor of the scores.

    Returns:
        Output [B, S, H, K] and log-sum-exp [B, S, H].
    """
    return _attend(q, entries, indices, scale, None, kernels_allowed())


def window_attention(
    q: jax.Array,
    kv: jax.Array,
    segment_ids: jax.Array | None,
    window: int,
    scale: float,
    positions: jax.Array | None = None,
) -> Branch:
    """Each query of q [B, S, H, K] attends the last `window` tokens of its own document; see `xla.window_attention`.

    To the kernels a window is a range of entries.
    """
    plain = lambda q, kv: xla.window_attention(q, kv, segment_ids, window, scale, positions)  # noqa: E731
    backend = {"tpu": tpu_range, "cuda": gpu_range}.get(compiled_for())
    if backend is None or not kernels_allowed() or not backend.supports(q, kv):
        return plain(q, kv)

    def kernel(q: jax.Array, kv: jax.Array) -> Branch:
        bounds = window_bounds(q.shape[0], q.shape[1], segment_ids, window, positions)
        return _attend(q, kv, bounds, scale, window_band(window), True)

    # Recomputed when differentiated: otherwise each backend would keep zeros in place of what the other one keeps.
    return jax.checkpoint(lambda q, kv: by_platform(q, kv, xla=plain, tpu=kernel, gpu=kernel))(q, kv)


def window_band(window: int) -> Band:
    """A tile of queries sees at most the windows of its first and its last query, and what lies between them."""
    return Band(WINDOW_TILE, window - 1 + bands.QUERIES)


def window_bounds(
    batch: int, length: int, segment_ids: jax.Array | None, window: int, positions: jax.Array | None
) -> jax.Array:
    """The entries lo_t <= i < hi_t that each query sees, [B, S, 2]: lo, hi. The arguments are `window_attention`'s."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    earlier = 0 if positions is None else window
    if positions is None:
        positions = index
        if segment_ids is not None:
            begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
            positions = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    lo = index + earlier - jnp.minimum(positions, window - 1)
    return jnp.stack([lo, index + earlier + 1], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(q: jax.Array, entries: jax.Array, choice: jax.Array, scale: float, band: Band | None, kernels: bool):
    return _forward(q, entries, choice, scale, band, kernels)


def _forward(
    q: jax.Array, entries: jax.Array, choice: jax.Array, scale: float, band: Band | None, kernels: bool
) -> Branch:
    """`choice` [B, S, k] are the chosen entries of each query; with a band [B, S, 2], the range that it sees."""
    plain = partial(xla.forward, scale=scale, gathered=band is None)
    return by_platform(q, entries, choice, xla=plain, **_kernels("forward", q, entries, scale, band, kernels))


def _attend_fwd(q, entries, choice, scale, band, kernels):
    out, lse = _forward(q, entries, choice, scale, band, kernels)
    return (out, lse), (q, entries, choice, out, lse)


def _attend_bwd(scale, band, kernels, saved, cotangents):
    plain = partial(xla.backward, scale=scale, gathered=band is None)
    of_platforms = _kernels("backward", saved[0], saved[1], scale, band, kernels)
    dq, d_entries = by_platform(*saved, *cotangents, xla=plain, **of_platforms)
    return dq, d_entries, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _kernels(
    name: str, q: jax.Array, entries: jax.Array, scale: float, band: Band | None, allowed: bool
) -> dict[str, Callable[..., Any]]:
    """The kernels that take these operands, by platform; `name` is "forward" or "backward"."""
    backends = {"tpu": tpu, "gpu": gpu} if band is None else {"tpu": tpu_range, "gpu": gpu_range}
    options = {"scale": scale} if band is None else {"scale": scale, "band": band}
    taking = {platform: x for platform, x in backends.items() if allowed and x.supports(q, entries)}
    return {platform: partial(getattr(backend, name), **options) for platform, backend in taking.items()}
