"""Compressed entries spread over the blocks of a shared pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.pools import Pool
from dsv4_jax.quantization.storage import Storage, Stored


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["store", "layer", "tables"],
    meta_fields=["pool", "own_blocks"],
)
@dataclass(frozen=True)
class Pages:
    """The entries of one layer, spread over blocks: entry i of sequence b has slot i % E of block `tables[b, i // E]`.

    Attributes:
        store: stored entries of all layers of a stack, arrays [layers, blocks, ..].
        layer: which layer, int32 [].
        tables: block numbers [B, N].
        pool: how blocks keep their entries.
        own_blocks: sequence b has the blocks b * N .. (b + 1) * N, in order, and no other sequence does.
    """

    store: Stored
    layer: jax.Array
    tables: jax.Array
    pool: Pool
    own_blocks: bool = False

    @property
    def storage(self) -> Storage:
        """The format of an entry."""
        return self.pool.storage

    @property
    def per_block(self) -> int:
        """Entries per block, E."""
        return self.pool.per_block

    @property
    def capacity(self) -> int:
        """Entries that a sequence has room for."""
        return self.tables.shape[1] * self.per_block

    def columns_of(self, entries: int) -> int:
        """Table columns of a tile of at most `entries` entries (at least one block)."""
        return max(1, min(entries // self.per_block, self.tables.shape[1]))

    def tiles_until(self, hi: jax.Array, columns: int) -> jax.Array:
        """Tiles of `columns` columns that hold the first max(hi) entries."""
        return -(-hi.max() // (columns * self.per_block))

    def tile(self, number: jax.Array, columns: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The entries of one tile: their numbers [n] and [B, n, K].

        The last tile begins earlier than its number says when it would reach beyond the table.
        """
        start = jnp.minimum(number * columns, self.tables.shape[1] - columns)
        blocks = jax.lax.dynamic_slice_in_dim(self.tables, start, columns, axis=1)
        entries = self.storage.decode(self.pool.read_blocks(self.store, self.layer, blocks), dtype)
        index = start * self.per_block + jnp.arange(columns * self.per_block, dtype=jnp.int32)
        return index, entries.reshape(entries.shape[0], -1, entries.shape[-1])

    def read_entries(self, index: jax.Array, dtype: Any) -> jax.Array:
        """Entries `index` [B, ..] of each sequence: [B, .., K]; negative indices read entry 0."""
        index = jnp.maximum(index, 0)
        flat = index.reshape(index.shape[0], -1)
        blocks = jnp.take_along_axis(self.tables, flat // self.per_block, 1).reshape(index.shape)
        found = self.pool.read(self.store, self.layer, blocks, index % self.per_block)
        return self.storage.decode(found, dtype)

    def places(self, index: jax.Array) -> jax.Array:
        """Where the entries `index` [B, ..] of each sequence are among all of a `ByPart`; -1 for negative indices."""
        known = jnp.maximum(index, 0).reshape(index.shape[0], -1)
        block = jnp.take_along_axis(self.tables, known // self.per_block, 1)
        blocks = next(iter(self.store.values())).shape[1]
        place = (self.layer * blocks + block) * self.per_block + known % self.per_block
        return jnp.where(index < 0, -1, place.reshape(index.shape))

    def write(self, index: jax.Array, entries: jax.Array) -> Pages:
        """Entries [B, T, K] at places `index` [B, T] of each sequence.

        Negative indices are not written, nor is what the table has no room for: the last block may be shared.
        """
        total, columns = next(iter(self.store.values())).shape[1], self.tables.shape[1]
        column = index // self.per_block
        known = (column >= 0) & (column < columns)
        blocks = jnp.where(known, jnp.take_along_axis(self.tables, jnp.clip(column, 0, columns - 1), 1), total)
        encoded = self.storage.encode(entries)
        return replace(self, store=self.pool.write(self.store, encoded, self.layer, blocks, index % self.per_block))
