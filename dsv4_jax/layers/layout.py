"""Where documents and compressed entries lie in a batch of rows: computed once per forward, used by every layer.

Every document of a packed row is compressed on its own: positions, windows and compression blocks
restart at its first token, and its incomplete tail gives no entry. The entries of a row are numbered in the order of
their last tokens, so what a query may see is always a contiguous range of entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import CSA, AttentionKind, DeepseekV4Config
from dsv4_jax.layers.rotary import Rotation, frequencies, rotation


class Blocks(NamedTuple):
    """The compressed entries of one kind of attention and its ratio m. T = S // m bounds their number.

    tokens [B, T, m]: each entry's tokens, or None when entry i simply holds tokens m*i .. m*i+m-1 of its row.
    starts_document [B, T]: the entry has no previous block.
    rope [B, T, R/2]: the rotation at each entry's first token.
    lo, hi [B, S]: query t sees entries lo <= i < hi.
    places [B, T]: with a cache, the number of each new entry in its sequence, -1 while it is incomplete. Then `tokens`
        are rows of (tail, new tokens), and with overlap the first of the T entries is an old one, -1 as well.

    Where the tokens at hand are a part of their rows, T counts the entries whose last tokens they hold, `tokens` are
    rows of (tokens before, own tokens), with overlap one block stands in front that is only a previous one, and `lo`
    and `hi` number the entries of the whole row:

    order [B, T']: where entry i of the row lies among the gathered entries of all parts; None when that is i.
    """

    tokens: jax.Array | None
    starts_document: jax.Array
    rope: Rotation
    lo: jax.Array
    hi: jax.Array
    places: jax.Array | None = None
    order: jax.Array | None = None

    def gather(self, x: jax.Array, ratio: int) -> jax.Array:
        """[B, S, C] -> [B, T, m, C]."""
        batch, length, channels = x.shape
        count = length // ratio
        if self.tokens is None:
            return x[:, : count * ratio].reshape(batch, count, ratio, channels)
        return jax.vmap(lambda row, tokens: row[tokens])(x, self.tokens)


class Neighbours:
    """Where the rest of the rows is, for a layer that sees a part of their tokens. This one: there is no rest."""

    def before(self, rows: Any, count: int) -> Any:
        """Arrays [B, S, ..] of one row per token, behind the `count` rows of the tokens before them."""
        del count
        return rows

    def gather(self, entries: jax.Array, blocks: Blocks) -> jax.Array:
        """The entries [B, T', K] of the whole rows, from those [B, T, K] of this part."""
        del blocks
        return entries


NOBODY = Neighbours()


class Past(NamedTuple):
    """What came before the tokens of a forward: lengths [B] seen so far, counts [B] of the new ones that are real.

    sealed: [B] tokens, whole blocks, whose entries exist already and are not made anew; None for none.
    """

    lengths: jax.Array
    counts: jax.Array
    sealed: jax.Array | None = None


class Layout(NamedTuple):
    """All of a batch that does not depend on values: documents, rotations, blocks by `LayerSpec.compression`."""

    segment_ids: jax.Array | None  # [B, S]; None when every row is one document
    positions: jax.Array  # [B, S], restarting at each document
    rope: dict[str, Rotation]  # "main" (sliding layers) and "compress" (CSA and HCA layers)
    blocks: dict[tuple[AttentionKind, int], Blocks]
    past: Past | None = None


def make_layout(config: DeepseekV4Config, batch: int, length: int, segment_ids: jax.Array | None) -> Layout:
    """The layout of [B, S] tokens; a document is a maximal run of equal `segment_ids`."""
    positions = document_positions(batch, length, segment_ids)
    main = frequencies(config.rope_theta, config.qk_rope_head_dim, None)
    compress = frequencies(config.compress_rope_theta, config.qk_rope_head_dim, config.rope_scaling)
    make = _plain_blocks if segment_ids is None else _packed_blocks
    return Layout(
        segment_ids,
        positions,
        {"main": rotation(positions, main), "compress": rotation(positions, compress)},
        {key: make(positions, key[1], compress) for key in _compressions(config) if key[1] <= length},
    )


def make_cached_layout(config: DeepseekV4Config, length: int, past: Past) -> Layout:
    """The layout of `length` more tokens of each sequence, of which the first `past.counts` are real."""
    positions = past.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
    main = frequencies(config.rope_theta, config.qk_rope_head_dim, None)
    compress = frequencies(config.compress_rope_theta, config.qk_rope_head_dim, config.rope_scaling)
    return Layout(
        None,
        positions,
        {"main": rotation(positions, main), "compress": rotation(positions, compress)},
        {key: _growing_blocks(positions, key[1], key[0] == CSA, past, compress) for key in _compressions(config)},
        past,
    )


def _compressions(config: DeepseekV4Config) -> list[tuple[AttentionKind, int]]:
    """Each that a layer has, in one order in every process: they then compile the same program."""
    return sorted({spec.compression for spec in config.layers + config.mtp_layers if spec.ratio})


def _growing_blocks(positions: jax.Array, ratio: int, overlap: bool, past: Past, freqs: np.ndarray) -> Blocks:
    """The entries that new tokens can complete, made of the tail's tokens and the new ones."""
    before = int(overlap)
    count = (positions.shape[1] + ratio - 1) // ratio + before
    entry = past.lengths[:, None] // ratio - before + jnp.arange(count, dtype=jnp.int32)  # [B, T]
    tokens = entry[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)
    rows = tail_row(tokens.reshape(len(entry), -1), ratio, overlap, past.lengths).reshape(tokens.shape)
    complete = (entry + 1) * ratio <= (past.lengths + past.counts)[:, None]
    known = past.lengths if past.sealed is None else jnp.maximum(past.lengths, past.sealed)
    places = jnp.where(complete & (entry >= known[:, None] // ratio), entry, -1)
    # Padding behind the real tokens sees no entry that they did not complete.
    hi = jnp.minimum(positions + 1, (past.lengths + past.counts)[:, None]) // ratio
    return Blocks(rows, entry == 0, rotation(entry * ratio, freqs), jnp.zeros_like(hi), hi, places)


def tail_row(token: jax.Array, ratio: int, overlap: bool, lengths: jax.Array) -> jax.Array:
    """Where a sequence's tokens [B, n] lie in (tail, new tokens), `lengths` [B] being the first new one.

    A tail has a row for each token of the incomplete block, and with overlap of the block before it, seen or not.
    """
    before, lengths = int(overlap), lengths[:, None]
    first = (lengths // ratio - before) * ratio
    return jnp.where(token < lengths, token - first, (1 + before) * ratio + token - lengths)


def document_positions(batch: int, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """[B, S] distance of each token from its document's first token."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    starts = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _plain_blocks(positions: jax.Array, ratio: int, freqs: np.ndarray) -> Blocks:
    batch, length = positions.shape
    first = jnp.broadcast_to(jnp.arange(length // ratio, dtype=jnp.int32) * ratio, (batch, length // ratio))
    return Blocks(None, first == 0, rotation(first, freqs), jnp.zeros_like(positions), (positions + 1) // ratio)


def _packed_blocks(positions: jax.Array, ratio: int, freqs: np.ndarray) -> Blocks:
    # Entries that no block fills take the row's first tokens; they are never visible.
    last, hi = block_ends(positions, ratio, positions.shape[1] // ratio, unused=ratio - 1)
    first = jnp.take_along_axis(positions, last, axis=1) - (ratio - 1)
    tokens = last[..., None] - (ratio - 1) + jnp.arange(ratio, dtype=jnp.int32)
    return Blocks(tokens, first == 0, rotation(first, freqs), hi - (positions + 1) // ratio, hi)


def block_ends(positions: jax.Array, ratio: int, count: int, unused: int) -> tuple[jax.Array, jax.Array]:
    """Where blocks end among tokens at `positions` [B, S] of their documents.

    Returns:
        The last token of each of `count` blocks in order [B, count], `unused` behind the last one, and how many blocks
        have ended at each token [B, S].
    """
    batch, length = positions.shape
    ends = (positions + 1) % ratio == 0
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    slot = jnp.where(ends, ended - 1, count)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    last = jnp.full((batch, count), unused, jnp.int32)
    return jax.vmap(lambda row, s, t: row.at[s].set(t, mode="drop"))(last, slot, index), ended
