"""Attention over the pages of a cache: tiles of blocks up to the longest sequence, or only the chosen entries.

The work grows with the tokens seen, not with the capacity. Kernels read entries where they lie; for many queries they
take rows that are laid out for them (`laid_out.py`). Forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.laid_out import over_rows, rows_of
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import by_platform
from dsv4_jax.kernels.sparse_attention import gpu, gpu_range, tpu, tpu_pages, tpu_pages_range, tpu_range
from dsv4_jax.kernels.sparse_attention.bands import RANGE
from dsv4_jax.kernels.sparse_attention.xla import Branch, attend_keys

Kernel = Callable[..., Branch]
TILE = 1024  # entries that are decoded and attended together


def range_attention(q: jax.Array, pages: Pages, hi: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends the entries i < hi_t of its sequence; hi [B, S]."""
    kernels = _of_rows(_range_over_rows, q, pages, scale, tpu=tpu_range, gpu=gpu_range)
    kernels |= _of_pages(q, pages, scale, tpu=tpu_pages_range, gpu=gpu_range)
    return by_platform(q, pages, hi, xla=partial(_range_attention, scale=scale), **kernels)


def _range_attention(q: jax.Array, pages: Pages, hi: jax.Array, scale: float) -> Branch:
    batch, length, heads, _ = q.shape
    columns = pages.columns_of(TILE)

    def one(args: tuple[jax.Array, jax.Array]) -> Branch:
        q, hi = args

        def add_tile(i: jax.Array, seen: Branch) -> Branch:
            index, keys = pages.tile(i, columns, q.dtype)
            visible = (index >= i * columns * pages.per_block) & (index < hi[..., None])
            keys = _clean(keys, index < hi.max(1, keepdims=True))
            return _join(seen, attend_keys(q, keys, visible, scale))

        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
        out, lse = jax.lax.fori_loop(0, pages.tiles_until(hi, columns), add_tile, nothing)
        return out.astype(q.dtype), lse

    chunk = chunk_length(length, batch * columns * pages.per_block * heads)
    return join(jax.lax.map(one, split((q, hi), chunk)), length)


def gather_attention(q: jax.Array, pages: Pages, indices: jax.Array, scale: float) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `indices[t]` of its sequence; [B, S, k], -1 is unused."""
    kernels = _of_rows(_gather_over_rows, q, pages, scale, tpu=tpu, gpu=gpu)
    kernels |= _of_pages(q, pages, scale, tpu=tpu_pages, gpu=gpu)
    return by_platform(q, pages, indices, xla=partial(_gather_attention, scale=scale), **kernels)


def _gather_attention(q: jax.Array, pages: Pages, indices: jax.Array, scale: float) -> Branch:
    batch, length, heads, width = q.shape

    def one(args: tuple[jax.Array, jax.Array]) -> Branch:
        q, choice = args
        return attend_keys(q, _clean(pages.read_entries(choice, q.dtype), choice >= 0), choice >= 0, scale)

    chunk = chunk_length(length, batch * indices.shape[-1] * max(heads, width))
    return join(jax.lax.map(one, (split(q, chunk), split(indices, chunk, fill=-1))), length)


def _of_pages(q: jax.Array, pages: Pages, scale: float, **backends: Any) -> dict[str, Kernel]:
    """The kernels that read these pages, by platform."""
    taking = {platform: x for platform, x in backends.items() if x.supports_pages(q, pages)}
    return {platform: partial(backend.forward_pages, scale=scale) for platform, backend in taking.items()}


def _of_rows(
    apply: Callable[..., Branch], q: jax.Array, pages: Pages, scale: float, **backends: Any
) -> dict[str, Kernel]:
    """The kernels that take rows, with `apply(backend, scale, q, pages, ..)`, by platform; for many queries only."""
    rows = rows_of(q, pages)
    taking = {platform: x for platform, x in backends.items() if rows is not None and x.supports(q, rows)}
    return {platform: partial(apply, backend, scale) for platform, backend in taking.items()}


def _range_over_rows(backend: Any, scale: float, q: jax.Array, pages: Pages, hi: jax.Array) -> Branch:
    def attend(entries: jax.Array, q: jax.Array, hi: jax.Array) -> Branch:
        return backend.forward(q, entries, jnp.stack([jnp.zeros_like(hi), hi], -1), scale, RANGE)

    return over_rows(attend, pages, hi.max(1), q, hi)


def _gather_over_rows(backend: Any, scale: float, q: jax.Array, pages: Pages, indices: jax.Array) -> Branch:
    def attend(entries: jax.Array, q: jax.Array, indices: jax.Array) -> Branch:
        return backend.forward(q, entries, indices, scale)

    return over_rows(attend, pages, indices.max((1, 2)) + 1, q, indices)


def _clean(keys: jax.Array, seen: jax.Array) -> jax.Array:
    """Keys [.., K], zero where nobody sees them: a block may still hold its former owner's NaN, and 0 * NaN is NaN."""
    return jnp.where(seen[..., None], keys, 0)


def _join(a: Branch, b: Branch) -> Branch:
    """Two branches as one, in float32. One that saw nothing leaves the other's bits as they are."""
    total = jnp.logaddexp(a[1], b[1])
    finite = jnp.where(jnp.isfinite(total), total, 0.0)
    parts = (jnp.exp(lse - finite)[..., None] * out.astype(jnp.float32) for out, lse in (a, b))
    return sum(parts, start=jnp.zeros((), jnp.float32)), total
