"""Attention over chosen entries on NVIDIA GPUs with warpgroup products (Hopper), through Pallas' Mosaic GPU backend.

All heads of a query share its entries, so 64 heads are the rows of a product, and an entry that was fetched once is
used as key and as value. A program has 64 heads of one query; where queries are few, of one part of its entries, and
the parts are then merged in a fixed order. One warpgroup copies entries into one of two tiles in shared memory while
two others compute on the other tile. Blackwell has other products, and kernels of its own: `gpu_blackwell*.py`.

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import split
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import is_blackwell, is_hopper
from dsv4_jax.kernels.pools import ByPart
from dsv4_jax.kernels.sparse_attention.xla import Branch
from dsv4_jax.quantization.storage import Fp8WithRope, Plain

if TYPE_CHECKING:
    from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen, Run

ROWS = 64  # of a product: heads, or entries of a tile
ROTARY = 64  # dims in BF16 beside FP8
PROCESSORS = 132  # of an H100 or H200, a B200 has 148; a program fills one
BACKWARD_QUERIES = 64  # of a sequence, whose entries' gradients, [k, K] float32 each, exist at once
FEWEST = 16  # heads; those that are missing in a product are zeros
WIDEST = 512  # columns: of 64 rows, half of them fill the registers of a warpgroup


def supports(q: jax.Array, entries: jax.Array) -> bool:
    """Whether the kernels take these operands and the program is compiled for a GPU that has their instructions."""
    return entries.dtype == jnp.bfloat16 and _supports_queries(q)


def _supports_queries(q: jax.Array) -> bool:
    *_, heads, width = q.shape
    shaped = heads >= FEWEST and width % (2 * ROWS) == 0 and width <= WIDEST
    return shaped and q.dtype == jnp.bfloat16 and (is_hopper() or is_blackwell())


def forward(q: jax.Array, entries: jax.Array, indices: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `indices[t]` of [B, T, K]; indices [B, S, k], -1 is unused.

    Args:
        q: queries in BF16; 16 heads or more, K a multiple of 128 and at most 512.
        entries: shared by the heads.
        indices: int32.
        scale: factor of the scores.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        Output [B, S, H, K] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query chose nothing.
    """
    batch, count, width = entries.shape
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * count
    rows = jnp.where(indices >= 0, indices + first, -1)
    return _attend_stored(q, (entries.reshape(batch * count, width),), rows, scale, interpret)


def backward(
    q: jax.Array,
    entries: jax.Array,
    indices: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and entries, in their dtypes, from what `forward` was given and returned."""
    from dsv4_jax.kernels.sparse_attention.gpu_backward import sum_by_row
    from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen

    if is_blackwell():
        from dsv4_jax.kernels.sparse_attention.gpu_blackwell_backward import d_queries
        from dsv4_jax.kernels.sparse_attention.gpu_blackwell_entries import d_rows
    else:
        from dsv4_jax.kernels.sparse_attention.gpu_backward import d_queries, d_rows

    heads, (batch, count, width) = q.shape[2], entries.shape
    q, out, lse, d_out, d_lse = in_products(q, out, lse, d_out, d_lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * count
    rows, index = entries.reshape(-1, width), jnp.where(indices >= 0, indices + first, -1)

    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    d_out, choice = d_out.astype(q.dtype), Chosen(*in_tiles(flat(index), 1))
    d_q = d_queries(flat(q), flat(d_out), flat(lse), flat(delta), rows, choice, scale, interpret)

    def one(d_entries: jax.Array, args: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        q, d_out, lse, delta, index = map(flat, args)
        choice = Chosen(*in_tiles(index, 1))
        gradients = d_rows(q, d_out, lse, delta, rows, choice, scale, interpret).reshape(-1, width)
        return sum_by_row(gradients, choice.index.reshape(-1), d_entries, interpret), None

    chunk = min(BACKWARD_QUERIES, q.shape[1])
    parts = *split((q, d_out, lse, delta), chunk), split(index, chunk, fill=-1)
    d_entries, _ = jax.lax.scan(one, jnp.zeros(rows.shape, jnp.float32), parts)
    return d_q.reshape(q.shape)[:, :, :heads], d_entries.reshape(entries.shape).astype(entries.dtype)


def supports_pages(q: jax.Array, pages: Pages) -> bool:
    """As `supports`, for entries in a cache: stored in BF16, or in FP8 beside 64 rotary dims in BF16."""
    if not isinstance(pages.pool, ByPart):
        return False
    storage, total = pages.storage, math.prod(next(iter(pages.store.values())).shape[:3])
    plain = isinstance(storage, Plain) and storage.dtype == "bfloat16"
    fp8 = isinstance(storage, Fp8WithRope) and storage.rope == ROTARY
    return (plain or fp8) and total < 2**31 and _supports_queries(q)


def forward_pages(q: jax.Array, pages: Pages, indices: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """As `forward`, of a cache's entries read as they are stored and decoded in registers."""
    return _attend_stored(q, stored_in(pages), pages.places(indices), scale, interpret)


def stored_in(pages: Pages) -> tuple[jax.Array, ...]:
    """The arrays of a cache as rows; see `gpu_fetch.fetch`."""
    names = ("values",) if isinstance(pages.storage, Plain) else ("values", "scales", "rope")
    return tuple(pages.store[name].reshape(-1, pages.store[name].shape[-1]) for name in names)


def _attend_stored(
    q: jax.Array, stored: tuple[jax.Array, ...], index: jax.Array, scale: float, interpret: Any
) -> Branch:
    """Query t of q [B, S, H, K] attends the entries `index[t]` of all that are stored, negative is unused."""
    from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen

    parts = parts_of(programs_of(q), -(-index.shape[-1] // ROWS))
    choice = Chosen(*in_tiles(index.reshape(-1, index.shape[-1]), parts))
    return attend_parts(q, stored, choice, parts, scale, interpret)


def attend_parts(
    q: jax.Array, stored: tuple[jax.Array, ...], choice: Chosen | Run, parts: int, scale: float, interpret: Any
) -> Branch:
    """Each query of q [B, S, H, K] attends the entries of its `parts` units; output and log-sum-exp as of `forward`."""
    if is_blackwell():
        from dsv4_jax.kernels.sparse_attention.gpu_blackwell import attend
    else:
        from dsv4_jax.kernels.sparse_attention.gpu_forward import attend

    given = q.shape[2]
    (q,) = in_products(q)
    heads, width = q.shape[2:]
    dtype = q.dtype if parts == 1 else jnp.float32
    out, lse = attend(q.reshape(-1, heads, width), stored, choice, scale, dtype, interpret)
    if parts > 1:
        out, lse = merge_parts(out.reshape(-1, parts, heads, width), lse.reshape(-1, parts, heads))
    return out.astype(q.dtype).reshape(q.shape)[:, :, :given], lse.reshape(q.shape[:-1])[:, :, :given]


def programs_of(q: jax.Array) -> int:
    """How many programs a kernel has for queries [B, S, H, K] that are not split into parts."""
    *_, heads, width = q.shape
    if is_blackwell():
        return 2 * (q.size // (heads * width)) * -(-heads // (2 * ROWS))
    return q.size // (heads * width) * -(-heads // ROWS)


def in_products(*by_head: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, S, H, ..] with zeros for the heads that are missing in a product of 64; they change no other head."""
    more = -by_head[0].shape[2] % ROWS
    return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, more), *((0, 0),) * (x.ndim - 3))) for x in by_head)


def parts_of(programs: int, tiles: int) -> int:
    """Into how many parts the entries of a query are split, so that the programs fill a GPU once."""
    return max(1, min(PROCESSORS // max(programs, 1), tiles))


def in_tiles(index: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Index [N, k] -> [N * parts, tiles, 64], and how many of the tiles lie before the end of what is used."""
    count = -(-index.shape[1] // (parts * ROWS))
    index = jnp.pad(index, ((0, 0), (0, count * parts * ROWS - index.shape[1])), constant_values=-1)
    index = index.reshape(-1, count, ROWS)
    used = (index >= 0).any(-1) * jnp.arange(1, count + 1, dtype=jnp.int32)
    return index, used.max(-1)


def merge_parts(out: jax.Array, lse: jax.Array) -> Branch:
    """Parts [N, parts, H, K] and [N, parts, H] of one softmax as one, added in the order of parts."""
    top = jnp.maximum(lse.max(1), -1e30)
    weights = jnp.exp(lse - top[:, None])
    total, mixed = jnp.zeros_like(top), jnp.zeros_like(out[:, 0])
    for part in range(out.shape[1]):
        total = total + weights[:, part]
        mixed = mixed + weights[:, part, :, None] * out[:, part]
    return mixed / jnp.maximum(total, 1e-30)[..., None], jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
