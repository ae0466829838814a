"""Attention over the first entries of a cache on a TPU, read as they are stored: what an HCA layer decodes with.

A block has one entry there, and where sequences own their blocks these lie one behind the other. So tiles of entries
are blocks of a Pallas pipeline, fetched whole while the tile before is undone and attended. All queries of a sequence
share a tile. The grid is as long as the longest sequence; steps behind a sequence's end fetch and compute nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.rows import SUBLANES
from dsv4_jax.kernels.sparse_attention import tpu_pages, tpu_words
from dsv4_jax.kernels.sparse_attention.tpu_words import LANES, PIECES
from dsv4_jax.kernels.sparse_attention.xla import Branch

TILE = 256  # entries
VMEM_BYTES = 32 << 20  # for eight float32 queries of 128 heads; one in BF16 takes 3 MiB

_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


def supports_pages(q: jax.Array, pages: Pages) -> bool:
    """Whether the kernel takes these operands: as of `tpu_pages`, in own blocks of one entry, whole tiles of them."""
    pool = pages.pool
    if not tpu_pages.supports_pages(q, pages) or pool.per_block > 1 or not pages.own_blocks:
        return False
    return pages.capacity % SUBLANES == 0 and pages.store["words"].shape[1] % pages.capacity == 0


def forward_pages(q: jax.Array, pages: Pages, hi: jax.Array, scale: float, interpret: Any = False) -> Branch:
    """Query t of q [B, S, H, 512] attends the entries i < hi_t of its sequence; hi [B, S].

    Args:
        q: queries, of a dtype that `supports_pages` takes, in which the products are taken.
        pages: entries, shared by the heads.
        hi: int32.
        scale: factor of the scores.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        Output [B, S, H, 512] in q's dtype and log-sum-exp [B, S, H] float32, -inf where a query sees nothing.
    """
    batch, length, heads, width = q.shape
    rows = length * heads
    words, capacity = pages.store["words"], pages.capacity
    owner = pages.layer * (words.shape[1] // capacity) + pages.tables[:, 0] // capacity
    words = words.reshape(-1, capacity, PIECES * LANES)  # of one sequence in one layer each
    tiles = pl.cdiv(hi.max(1), TILE).astype(jnp.int32)
    of_sequence = lambda *block: pl.BlockSpec((1, *block), lambda b, t, *_: (b, 0, 0))  # noqa: E731
    at = lambda t, tiles: jnp.minimum(t, jnp.maximum(tiles - 1, 0))  # noqa: E731
    tile = pl.BlockSpec((1, TILE, PIECES * LANES), lambda b, t, owner, tiles, _: (owner[b], at(t, tiles[b]), 0))
    out, lse = pl.pallas_call(
        functools.partial(_attend, storage=pages.storage, scale=scale, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, jnp.maximum(tiles.max(), 1)),
            in_specs=[of_sequence(rows, width), tile],
            out_specs=[of_sequence(rows, width), of_sequence(1, rows)],
            scratch_shapes=tpu_pages.softmax_of(rows, width, q.dtype),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, width), q.dtype),
            jax.ShapeDtypeStruct((batch, 1, rows), jnp.float32),
        ],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="range_attention_pages",
    )(owner.astype(jnp.int32), tiles, hi.astype(jnp.int32), q.reshape(batch, rows, width), words)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _attend(_, tiles_ref, hi_ref, q_ref, words_ref, out_ref, lse_ref, *softmax, storage, scale, heads):
    """One tile of one sequence's entries."""
    b, t = pl.program_id(0), pl.program_id(1)
    pl.when(t == 0)(lambda: tpu_pages.begin(q_ref, storage, softmax))

    @pl.when(t < tiles_ref[b])
    def _():
        words, row = words_ref[0], jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], 1), 0)
        hi = most = hi_ref[b, 0]
        for s in range(1, hi_ref.shape[1]):
            hi = jnp.where(row >= s * heads, hi_ref[b, s], hi)
            most = jnp.maximum(most, hi_ref[b, s])
        column, line = (
            t * TILE + jax.lax.broadcasted_iota(jnp.int32, shape, i) for i, shape in enumerate(((TILE, 1), (1, TILE)))
        )
        part = jnp.where(column < most, 0, -1)
        keys = tpu_words.keys(words[:, :LANES], words[:, LANES:], part, storage, q_ref.dtype)
        tpu_pages.add(keys, line < hi, scale, softmax)

    pl.when(t == pl.num_programs(1) - 1)(lambda: tpu_pages.finish(storage, softmax, out_ref, lse_ref))
