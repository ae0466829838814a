"""How the blocks of a pool keep their entries: part by part, or, for TPUs, as rows of words.

`Storage` says which numbers an entry consists of; here it is said where they lie. Both ways hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.rows import FEW_ROWS, LANES, Piece, pieces_of, rows_of, words_of
from dsv4_jax.quantization.storage import Storage, Stored


class Pool(Protocol):
    """Blocks of `per_block` entries in the format `storage`, in arrays [layers, blocks, ..]. Frozen and hashable."""

    @property
    def storage(self) -> Storage:
        """The format of an entry."""
        ...

    @property
    def per_block(self) -> int:
        """Entries of a block, E."""
        ...

    def zeros(self, layers: int, blocks: int) -> Stored:
        """An empty pool."""
        ...

    def read_blocks(self, store: Stored, layer: jax.Array, blocks: jax.Array) -> Stored:
        """All entries of `blocks` [..], as stored: parts [.., E, width]."""
        ...

    def read(self, store: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """Entries `slots` [..] of `blocks` [..], as stored: parts [.., width]."""
        ...

    def write(self, store: Stored, entries: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """The pool with `entries`, parts [B, T, width], at `slots` of `blocks` [B, T]; none beyond the last block.

        Those of a row that are written follow one another in its sequence.
        """
        ...


@dataclass(frozen=True)
class ByPart:
    """An array [layers, blocks, E, width] for each part of an entry."""

    storage: Storage
    per_block: int

    def zeros(self, layers: int, blocks: int) -> Stored:
        """See `Pool`."""
        return self.storage.zeros((layers, blocks, self.per_block))

    def read_blocks(self, store: Stored, layer: jax.Array, blocks: jax.Array) -> Stored:
        """See `Pool`."""
        return {name: x[layer, blocks] for name, x in store.items()}

    def read(self, store: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """See `Pool`."""
        return {name: x[layer, blocks, slots] for name, x in store.items()}

    def write(self, store: Stored, entries: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """See `Pool`."""
        return {name: x.at[layer, blocks, slots].set(entries[name], mode="drop") for name, x in store.items()}


@dataclass(frozen=True)
class InWords:
    """One array of 32-bit words, whole rows of 128 of them, which pieces of the entries fill (`kernels/rows.py`).

    A TPU keeps narrow and 8-bit arrays in layouts that differ from one operation to the next, and would copy whole
    pools between them in every layer. Rows of words have one layout, which is dense, and a row is what a DMA moves.

    A block is [rows, 128], or [rows * 128] where rows are few.
    """

    storage: Storage
    per_block: int

    @property
    def widths(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parts of one entry, [width] each, in order."""
        return jax.eval_shape(lambda: self.storage.zeros(()))

    @property
    def words(self) -> int:
        """Words of an entry."""
        return sum(_words(part) for part in self.widths.values())

    @property
    def pieces(self) -> list[Piece]:
        """How the words of an entry are cut."""
        return pieces_of(self.words, self.per_block)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return rows_of(self.words, self.per_block)

    def zeros(self, layers: int, blocks: int) -> Stored:
        """See `Pool`."""
        block = (self.rows, LANES) if self.rows >= FEW_ROWS else (self.rows * LANES,)
        return {"words": jnp.zeros((layers, blocks, *block), jnp.uint32)}

    def read_blocks(self, store: Stored, layer: jax.Array, blocks: jax.Array) -> Stored:
        """See `Pool`."""
        rows = store["words"][layer, blocks].reshape(*blocks.shape, self.rows, LANES)
        found = []
        for _, size, row in self.pieces:
            count = -(-self.per_block * size // LANES)
            piece = rows[..., row : row + count, :].reshape(*blocks.shape, -1, size)
            found.append(piece[..., : self.per_block, :])
        return self._parts(_cat(found))

    def read(self, store: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """See `Pool`."""
        found = []
        for _, size, first in self.pieces:
            share = LANES // size
            row = self._row(store["words"], layer, blocks, first + slots // share)
            mine = jnp.arange(share) == (slots % share)[..., None]
            pieces = row.reshape(*slots.shape, share, size)
            found.append(jnp.where(mine[..., None], pieces, 0).max(-2))
        return self._parts(_cat(found))

    def write(self, store: Stored, entries: Stored, layer: jax.Array, blocks: jax.Array, slots: jax.Array) -> Stored:
        """See `Pool`; one block after the other, in place."""
        x, (batch, count), size = store["words"], blocks.shape, self.per_block
        written = blocks < x.shape[1]
        # Written entries follow one another: entry t of a row is at place shift + t of the blocks that it writes into.
        shift = jnp.where(written, (slots - jnp.arange(count)) % size, 0).max(1, keepdims=True)
        columns = (count + size - 2) // size + 1
        entry = jnp.arange(columns * size) - shift
        at = jnp.clip(entry, 0, count - 1)
        here = (entry == at) & jnp.take_along_axis(written, at, 1)
        owner = jnp.where(here, jnp.take_along_axis(blocks, at, 1), 0).reshape(-1, size).max(1)
        words = _cat([_to_words(entries[name]) for name in self.widths])
        laid = jnp.take_along_axis(words, at[..., None], 1).reshape(batch * columns, size, -1)
        mine = jnp.broadcast_to(here.reshape(-1, size, 1), laid.shape)
        new, mine = (self._in_rows(part).reshape(-1, 1, 1, *x.shape[2:]) for part in (laid, mine))

        def put(i: jax.Array, x: jax.Array) -> jax.Array:
            place = layer, owner[i], *(jnp.zeros_like(owner[i]),) * (x.ndim - 2)
            held = jax.lax.dynamic_slice(x, place, new.shape[1:])
            return jax.lax.dynamic_update_slice(x, jnp.where(mine[i], new[i], held), place)

        return {"words": jax.lax.fori_loop(0, batch * columns, put, x)}

    def _in_rows(self, words: jax.Array) -> jax.Array:
        """The words of whole blocks' entries, [N, E, n] of any dtype -> [N, rows, 128]."""
        rows = []
        for start, size, _ in self.pieces:
            piece = words[..., start : start + size]
            piece = jnp.pad(piece, ((0, 0), (0, 0), (0, size - piece.shape[-1]))).reshape(len(words), -1)
            rows.append(jnp.pad(piece, ((0, 0), (0, -piece.shape[1] % LANES))).reshape(len(words), -1, LANES))
        found = jnp.concatenate(rows, axis=1)
        return jnp.pad(found, ((0, 0), (0, self.rows - found.shape[1]), (0, 0)))

    def _row(self, x: jax.Array, layer: jax.Array, blocks: jax.Array, rows: jax.Array) -> jax.Array:
        """Rows `rows` of `blocks`, [.., 128]."""
        if x.ndim == 4:
            return x[layer, blocks, rows]
        whole = x[layer, blocks].reshape(*blocks.shape, self.rows, LANES)
        return jnp.take_along_axis(whole, rows[..., None, None], axis=-2)[..., 0, :]

    def _parts(self, words: jax.Array) -> Stored:
        """Words [.., n] of entries -> their parts."""
        parts, start = {}, 0
        for name, part in self.widths.items():
            parts[name] = _from_words(words[..., start : start + _words(part)], part)
            start += _words(part)
        return parts


def pool_of(storage: Storage, per_block: int, in_words: bool) -> Pool:
    """The pool for blocks of `per_block` entries."""
    return (InWords if in_words else ByPart)(storage, per_block)


def _words(part: jax.ShapeDtypeStruct) -> int:
    return words_of(part.shape[-1] * part.dtype.itemsize)


def _to_words(x: jax.Array) -> jax.Array:
    """[.., n] of 8, 16 or 32 bits -> uint32 [.., ceil(n * bits / 32)]; the first words' low bits hold what comes first.

    Word w holds numbers w, w + words, w + 2 words, ..: going back is a few shifts and no shuffle of lanes.
    """
    each = 4 // x.dtype.itemsize
    if each == 1:
        return x.view(jnp.uint32)
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % each)))
    planes = jnp.split(x.astype(jnp.uint32), each, axis=-1)
    words = planes[0]
    for number, plane in enumerate(planes[1:], 1):
        words = words | plane << (number * 32 // each)
    return words


def _from_words(words: jax.Array, part: jax.ShapeDtypeStruct) -> jax.Array:
    """What `_to_words` was given."""
    each = 4 // part.dtype.itemsize
    if each == 1:
        return words.view(part.dtype)
    mask = jnp.uint32((1 << 32 // each) - 1)
    planes = [(words >> (number * 32 // each) & mask).astype(part.dtype) for number in range(each)]
    return _cat(planes)[..., : part.shape[-1]]


def _cat(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)
