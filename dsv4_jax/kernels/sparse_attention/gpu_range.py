"""Attention over a range of entries per query on NVIDIA GPUs with warpgroup products: a window, or all visible entries.

As in `gpu.py` 64 heads of a query are the rows of a product, and here the entries of a tile follow one another: a query
visits ceil(n / 64) tiles of its n entries wherever they begin, which for a window of 128 is two. The gradient of a tile
of entries is a sum over the queries that see it, in their order, by as many programs as fill the GPU.

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention import bands, gpu
from dsv4_jax.kernels.sparse_attention.bands import Band
from dsv4_jax.kernels.sparse_attention.gpu import ROWS
from dsv4_jax.kernels.sparse_attention.xla import Branch

if TYPE_CHECKING:
    from dsv4_jax.kernels.sparse_attention.gpu_choice import Run

supports = gpu.supports


def forward(
    q: jax.Array, entries: jax.Array, bounds: jax.Array, scale: float, band: Band, interpret: Any = False
) -> Branch:
    """Query t of q [B, S, H, K] attends the entries lo_t <= i < hi_t of [B, T, K]; bounds [B, S, 2] are lo, hi.

    Args:
        q: queries in BF16; 16 heads or more, K a multiple of 128 and at most 512.
        entries: BF16, shared by the heads.
        bounds: int32; lo == hi where a query sees nothing.
        scale: factor of the scores.
        band: how far the ranges reach.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        Output [B, S, H, K] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query sees nothing.
    """
    count, width = entries.shape[1:]
    most = count if band.span is None else min(count, band.span)
    rows = entries.reshape(-1, width)
    return _attend_stored(q, (rows,), _in_rows(bounds, count), most, *_one_block(rows), scale, interpret)


def supports_pages(q: jax.Array, pages: Pages) -> bool:
    """As `gpu.supports_pages`; entries of all sequences must have numbers of 32 bits."""
    return pages.tables.size * pages.per_block < 2**31 and gpu.supports_pages(q, pages)


def forward_pages(q: jax.Array, pages: Pages, hi: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """Query t of q [B, S, H, K] attends the entries i < hi_t of its sequence in a cache, as they are stored; hi [B, S].

    Entries have consecutive numbers, sequence after sequence, and are looked up in the blocks' table.
    """
    bounds = _in_rows(jnp.stack([jnp.zeros_like(hi), hi], -1), pages.capacity)
    total = next(iter(pages.store.values())).shape[1]
    blocks = ((pages.layer * total + pages.tables) * pages.per_block).reshape(-1)
    return _attend_stored(q, gpu.stored_in(pages), bounds, pages.capacity, blocks, pages.per_block, scale, interpret)


def backward(
    q: jax.Array,
    entries: jax.Array,
    bounds: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    scale: float,
    band: Band,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and entries, in their dtypes, from what `forward` was given and returned."""
    if gpu.is_blackwell():
        from dsv4_jax.kernels.sparse_attention.gpu_blackwell_backward import d_queries
        from dsv4_jax.kernels.sparse_attention.gpu_blackwell_entries import d_entries
    else:
        from dsv4_jax.kernels.sparse_attention.gpu_backward import d_queries
        from dsv4_jax.kernels.sparse_attention.gpu_range_backward import d_entries

    del band  # The bounds themselves say which tiles are visited.
    given, (count, width) = q.shape[2], entries.shape[1:]
    q, out, lse, d_out, d_lse = gpu.in_products(q, out, lse, d_out, d_lse)
    heads = q.shape[2]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    flat = q.reshape(-1, heads, width), d_out.astype(q.dtype).reshape(-1, heads, width)
    of_queries = *flat, lse.reshape(-1, heads), delta.reshape(-1, heads)
    rows = entries.reshape(-1, width)
    run = _runs(_in_rows(bounds, count), 1, *_one_block(rows))
    d_q = d_queries(*of_queries, rows, run, scale, interpret)
    d_rows = d_entries(*of_queries, rows, run, queries_seeing(bounds, count), scale, interpret)
    return d_q.reshape(q.shape)[:, :, :given], d_rows[:, :count].astype(entries.dtype)


def _attend_stored(
    q: jax.Array,
    stored: tuple[jax.Array, ...],
    bounds: jax.Array,
    most: int,
    blocks: jax.Array,
    per_block: int,
    scale: float,
    interpret: Any,
) -> Branch:
    """Each query attends the entries within its bounds [B, S, 2], `most` at the most; see `gpu_choice.Run` for blocks.

    Parts have two tiles or more at the longest range: less is not worth merging.
    """
    parts = gpu.parts_of(gpu.programs_of(q), most // (2 * ROWS))
    return gpu.attend_parts(q, stored, _runs(bounds, parts, blocks, per_block), parts, scale, interpret)


def _runs(bounds: jax.Array, parts: int, blocks: jax.Array, per_block: int) -> Run:
    """The ranges [B, S, 2] in parts of whole tiles, as equal as these allow; the last ones may be empty."""
    from dsv4_jax.kernels.sparse_attention.gpu_choice import Run

    lo, hi = (x.reshape(-1, 1) for x in (bounds[..., 0], bounds[..., 1]))
    tiles = -(-jnp.maximum(hi - lo, 0) // ROWS)
    each = -(-tiles // parts) * ROWS
    first = lo + each * jnp.arange(parts, dtype=jnp.int32)
    return Run(first.reshape(-1), jnp.minimum(first + each, hi).reshape(-1), blocks, per_block)


def _in_rows(bounds: jax.Array, count: int) -> jax.Array:
    """Bounds [B, S, 2] within `count` entries of a row each, as numbers in all rows put together."""
    first = jnp.arange(bounds.shape[0], dtype=jnp.int32)[:, None, None] * count
    return jnp.clip(bounds, 0, count).astype(jnp.int32) + first


def _one_block(rows: jax.Array) -> tuple[jax.Array, int]:
    return jnp.zeros(1, jnp.int32), max(len(rows), 1)


def queries_seeing(bounds: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The first query that sees into each tile of a row's `count` entries, and how many up to the last, [B, tiles]."""
    length = bounds.shape[1]
    bounds = jnp.clip(jnp.pad(bounds, ((0, 0), (0, -length % bands.QUERIES), (0, 0))), 0, count)
    first, tiles = bands.tiles_seen_by(bounds, ROWS, -(-count // ROWS))
    first = first * bands.QUERIES
    return first, jnp.minimum(tiles * bands.QUERIES, length - first)
