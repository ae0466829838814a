"""Kernels of rows, given the pages of a cache: the entries of a few sequences are laid out, and then taken as rows.

For the chunks of prompts, whose many queries read an entry again and again. Laying it out costs a read and a write, and
as far as the longest sequence reaches; nothing is written behind that. Decoding reads entries where they lie, but for
the keys of the indexer on TPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.pages import Pages

MANY = 64  # queries of a sequence
NUMBERS = 1 << 27  # laid out at a time, 256 MiB in BF16; but at least those of one sequence
TILE = 4096  # entries of a sequence that are decoded together
WHOLE = 512  # kernels read whole tiles of so many entries at the most, if they may see the first one of them


def rows_of(queries: jax.Array, pages: Pages, least: int = MANY) -> Any:
    """Shape and dtype of what `over_rows` would lay out for queries [B, S, H, K]; None where S is below `least`."""
    batch, length, _, width = queries.shape
    return jax.ShapeDtypeStruct((batch, pages.capacity, width), queries.dtype) if length >= least else None


def over_rows(apply: Callable[..., Any], pages: Pages, count: jax.Array, queries: jax.Array, *arrays: jax.Array) -> Any:
    """`apply(rows, queries, *arrays)` for a few sequences at a time, with the rows [b, T, K] of their entries.

    Args:
        apply: gives arrays [b, ..] for arrays [b, ..].
        pages: of all sequences.
        count: how many entries of each sequence may be seen, [B]. Those behind are zeros, whatever their blocks hold,
            up to a multiple of `WHOLE`, and at least one is; what follows may be anything.
        queries: [B, S, H, K]; rows have their dtype.
        *arrays: [B, ..].
    """

    def one(args: tuple[Any, ...]) -> Any:
        tables, count, *arrays = jax.tree.map(lambda x: x[0], args)
        result = apply(_laid_out(pages, tables, count, queries.dtype, queries.shape[-1]), *arrays)
        return jax.tree.map(lambda x: x[None], result)

    batch = count.shape[0]
    group = chunk_length(batch, pages.capacity * queries.shape[-1], most=NUMBERS)
    sequences = jax.tree.map(lambda x: x[None], (pages.tables, count, queries, *arrays))
    return jax.tree.map(lambda x: x[0], join(jax.lax.map(one, split(sequences, group)), batch))


def _laid_out(pages: Pages, tables: jax.Array, count: jax.Array, dtype: Any, width: int) -> jax.Array:
    """The first entries of the sequences with `tables` [b, N], decoded: [b, T, K]; see `over_rows`."""
    columns = pages.columns_of(TILE)
    some = replace(pages, tables=tables, own_blocks=False)

    def add_tile(i: jax.Array, rows: jax.Array) -> jax.Array:
        index, entries = some.tile(i, columns, dtype)
        entries = jnp.where((index < count[:, None])[..., None], entries, 0)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, entries, index[0], axis=1)
        return with_layout_constraint(rows, Layout((0, 1, 2)))  # a kernel's; else XLA copies all of it behind the loop

    # Filling it would cost by the capacity, not by what is seen. Tiles that do not end where a kernel's do need it.
    ends_well = columns * pages.per_block % WHOLE == 0 or columns == tables.shape[1]
    blank = (jax.lax.empty if ends_well else jnp.zeros)((tables.shape[0], pages.capacity, width), dtype)
    return jax.lax.fori_loop(0, jnp.maximum(some.tiles_until(count, columns), 1), add_tile, blank)
