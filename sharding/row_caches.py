"""Attention over rows that lie on several devices, as every device runs it; a row's cache blocks lie with the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.kv_cache import LayerCache
from dsv4_jax.layers.layout import Layout
from dsv4_jax.quantization.policy import NONE, Policy
from sharding.gathering import layer_specs, whole_layer
from sharding.mesh import TENSOR
from sharding.own_heads import head_specs
from sharding.rules import Strategy, used_axes

Attended = tuple[jax.Array, dict[str, Any], LayerCache | None]


def stays_with_rows(past: LayerCache | None) -> bool:
    """Whether no row reads a block of another one."""
    return past is None or all(pages.own_blocks for pages in (past.pages, past.index_pages) if pages is not None)


def attention(
    mesh: Mesh,
    strategy: Strategy,
    rows: PartitionSpec,
    layer: Attention,
    x: jax.Array,
    layout: Layout,
    options: AttentionOptions,
    past: LayerCache | None,
    own_heads: bool = False,
    rounded: Policy = NONE,
) -> Attended:
    """`layer(x, layout, options, past)` with every device working on the rows it holds.

    Args:
        mesh: all of its axes are used by hand; the layer's weights are gathered where they are spread.
        strategy: says where they are.
        rows: how the first dimension of x [B, S, D], of the layout and of the cache's states lies, and so the blocks.
        layer: one attention layer of any kind.
        x: [B, S, D].
        layout: of the rows.
        options: as on one device.
        past: a cache that `stays_with_rows`, or None.
        own_heads: every device has its own heads of the layer (`own_heads.splits_heads`).
        rounded: how the layer's weights have been rounded.

    Returns:
        [B, S, D], the layer's record and the cache with these tokens, all laid out by rows as x.
    """
    graph, state = nnx.split(layer)
    axes, storage = used_axes(rows), past and past.storage
    spread = head_specs(state) if own_heads else layer_specs(state, strategy, mesh)

    def own_rows(weights: Any, x: jax.Array, layout: Layout, held: LayerCache | None) -> Attended:
        first = jax.lax.axis_index(axes) * x.shape[0] if axes else 0
        here = held and _mapped(held, partial(_renumbered, first=-first))._replace(storage=storage)
        weights = weights if own_heads else whole_layer(state, weights, spread, x.dtype, rounded)
        out, record, after = nnx.merge(graph, weights)(x, layout, options, here)
        out = jax.lax.psum(out, TENSOR) if own_heads else out
        return out, record, after and _mapped(after, partial(_renumbered, first=first))._replace(storage=None)

    held = past and past._replace(storage=None)  # static: no leaf of the tree
    lies = held and _lies(held, rows)
    mapped = jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(spread, rows, rows, lies),
        out_specs=(rows, rows, lies),
        check_vma=False,
    )
    out, record, after = mapped(nnx.to_pure_dict(state), x, layout, held)
    return out, record, after and after._replace(storage=storage)


def _lies(held: LayerCache, rows: PartitionSpec) -> LayerCache:
    """The partition of every part: states and tables with their rows, blocks with the rows that own them."""
    blocks = PartitionSpec(None, *rows)
    parts = jax.tree.map(lambda _: rows, held._replace(pages=None, index_pages=None))

    def pool(pages: Pages) -> Pages:
        return replace(pages, store=dict.fromkeys(pages.store, blocks), layer=PartitionSpec(), tables=rows)

    return parts._replace(
        pages=held.pages and pool(held.pages), index_pages=held.index_pages and pool(held.index_pages)
    )


def _renumbered(pages: Pages, first: jax.Array | int) -> Pages:
    """Tables whose block numbers count from row `first` on."""
    return replace(pages, tables=pages.tables + first * pages.tables.shape[1])


def _mapped(held: LayerCache, change: Callable[[Pages], Pages]) -> LayerCache:
    return held._replace(
        pages=held.pages and change(held.pages), index_pages=held.index_pages and change(held.index_pages)
    )
