"""Sorting (token, expert) pairs into rows of tiles with one expert per tile, and back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import materialise


class Groups(NamedTuple):
    """Where each (token, slot) pair lies among R rows; every expert's rows start at a tile, padding rows are empty.

    row_of [N, k]: the row of each pair; R for a pair without an expert.
    pair_of [R]: the pair (token * k + slot) of each row, N * k for padding.
    expert_of_tile [R / tile]: the tile's expert; tiles behind `tiles_used` hold no rows.
    tiles_used []: how many tiles hold rows.
    """

    row_of: jax.Array
    pair_of: jax.Array
    expert_of_tile: jax.Array
    tiles_used: jax.Array

    @property
    def tile(self) -> int:
        """Rows per tile."""
        return self.pair_of.shape[0] // self.expert_of_tile.shape[0]


def make_groups(expert_ids: jax.Array, experts: int, tile: int) -> Groups:
    """Sort the pairs of `expert_ids` [N, k] by expert, in order of token within an expert.

    An id of `experts` means none: such a pair gets no row, its `row_of` is R.
    """
    pairs = expert_ids.size
    tiles = pairs // tile + min(experts, pairs)
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    tile_counts = -(-counts // tile)
    tile_ends = jnp.cumsum(tile_counts)
    # The i-th pair of an expert lies i rows behind the expert's first tile.
    shift = (tile_ends - tile_counts) * tile - (jnp.cumsum(counts) - counts)
    by_expert = flat[order]
    row_of_sorted = jnp.arange(pairs, dtype=jnp.int32) + shift.at[by_expert].get(mode="clip")
    row_of_sorted = jnp.where(by_expert < experts, row_of_sorted, tiles * tile)
    row_of = jnp.zeros(pairs, jnp.int32).at[order].set(row_of_sorted, unique_indices=True)
    nobody = jnp.full(tiles * tile, pairs, jnp.int32)
    pair_of = nobody.at[row_of].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    expert_of_tile = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right").astype(jnp.int32)
    return Groups(row_of.reshape(expert_ids.shape), pair_of, jnp.minimum(expert_of_tile, experts - 1), tile_ends[-1])


@jax.custom_vjp
def spread(x: jax.Array, groups: Groups) -> jax.Array:
    """Copy each token to its rows: x [N, D] -> [R, D]; padding rows are zero. Its gradient is a gather too."""
    token = groups.pair_of // groups.row_of.shape[1]
    return materialise(x).at[token].get(mode="fill", fill_value=0)


def _spread_fwd(x: jax.Array, groups: Groups):
    return spread(x, groups), groups


def _spread_bwd(groups: Groups, d_rows: jax.Array):
    return collect(d_rows, groups), None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(rows: jax.Array, groups: Groups) -> jax.Array:
    """Sum each token's rows: [R, D] -> [N, D], accumulated in float32. Its gradient is a gather too."""
    found = materialise(rows).at[groups.row_of].get(mode="fill", fill_value=0)
    return found.astype(jnp.float32).sum(1).astype(rows.dtype)


def _collect_fwd(rows: jax.Array, groups: Groups):
    return collect(rows, groups), groups


def _collect_bwd(groups: Groups, d_tokens: jax.Array):
    return spread(d_tokens, groups), None


collect.defvjp(_collect_fwd, _collect_bwd)
