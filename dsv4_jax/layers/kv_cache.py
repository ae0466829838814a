"""The compressed key-value cache as data: a fixed state per sequence and pages of a shared block pool (report 3.6.1).

A block holds what `block_tokens` tokens leave behind in every layer: CSA entries, indexer keys, HCA entries. A
sequence is a row of block numbers, so sequences can share blocks. Everything here is a pytree; nothing is changed in
place except by XLA, where the caller donates the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.config import CSA, SLIDING, DeepseekV4Config, LayerSpec
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import compiled_for
from dsv4_jax.kernels.pools import Pool, pool_of
from dsv4_jax.layers.layout import Past, tail_row
from dsv4_jax.quantization.storage import CacheFormat, Storage, Stored, cache_format


class Tail(NamedTuple):
    """What a compressor still needs of earlier tokens: projected values and gate scores, [B, rows, C] float32.

    Row r belongs to token r of the incomplete block; with overlap the block before it comes first.
    """

    values: jax.Array
    scores: jax.Array

    def followed_by(self, values: jax.Array, scores: jax.Array) -> Tail:
        """These rows and then new ones."""
        return Tail(jnp.concatenate([self.values, values], 1), jnp.concatenate([self.scores, scores], 1))


class LayerCache(NamedTuple):
    """What one attention layer remembers; None where its kind has no such part.

    window: the last W window entries in order of position, stored, [B, W, ..]. Behind attention the S new ones follow,
        and the new tokens' rows follow the tails': `trim` then keeps what later tokens need.
    tail, index_tail: of the compressor and of the indexer's compressor.
    pages, index_pages: compressed entries and indexer keys.
    storage: the format of the window.
    """

    window: Stored
    tail: Tail | None
    index_tail: Tail | None
    pages: Pages | None
    index_pages: Pages | None
    storage: Storage


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "tables", "states", "pools", "sealed"],
    meta_fields=["format", "block_tokens", "own_blocks"],
)
@dataclass(frozen=True)
class Cache:
    """A batch of sequences.

    Attributes:
        lengths: tokens seen, int32 [B].
        tables: block numbers [B, N].
        states: per-sequence state by stack: windows and tails, arrays [layers, B, ..].
        pools: shared blocks by stack, arrays [layers, blocks, ..].
        format: how entries are stored.
        block_tokens: tokens per block, the least common multiple of the compression ratios.
        sealed: tokens [B], whole blocks, whose entries the pool holds already: forwards over them read those and write
            none, which brings back a state that was not kept. None: nothing is sealed.
        own_blocks: row b owns the blocks b * N .. (b + 1) * N and no others, so that rows and blocks can lie together
            on a device.

    Stacks are named as parameters are: "0/1" is position 1 of segment 0's unit; "mtp" is the MTP block.
    """

    lengths: jax.Array
    tables: jax.Array
    states: dict[str, dict[str, Any]]
    pools: dict[str, dict[str, Stored]]
    format: CacheFormat
    block_tokens: int
    sealed: jax.Array | None = None
    own_blocks: bool = False

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return self.tables.shape[1] * self.block_tokens

    def holds(self, counts: jax.Array) -> jax.Array:
        """Whether each sequence has room for `counts` [B] more tokens: bool [B]."""
        return self.lengths + counts <= self.capacity

    def layer(self, spec: LayerSpec, state: Any, pools: Any, number: jax.Array) -> LayerCache:
        """Layer `number` of its stack as attention sees it, from the layer's state and the stack's pools."""
        pages = {
            name: Pages(store, number, self.tables, _pool(self.format, name, spec, self.block_tokens), self.own_blocks)
            for name, store in pools.items()
        }
        return LayerCache(
            state["window"],
            state.get("tail"),
            state.get("index_tail"),
            pages.get("entries"),
            pages.get("index_keys"),
            self.format.entry,
        )


def trim(config: DeepseekV4Config, spec: LayerSpec, state: dict[str, Any], past: Past) -> dict[str, Any]:
    """A layer's state with rows for S new tokens, cut down to what remains when `past.counts` of them are real."""
    overlap, after = spec.attention == CSA, past.lengths + past.counts
    window = past.counts[:, None] + jnp.arange(config.sliding_window)
    kept = {"window": jax.tree.map(partial(_take_rows, index=window), state["window"])}
    if tails := {name: tail for name, tail in state.items() if name != "window"}:
        tokens = (after // spec.ratio - overlap)[:, None] * spec.ratio + jnp.arange((1 + overlap) * spec.ratio)
        # Rows of tokens that are still to come repeat the last one, so that a state never depends on padding.
        rows = tail_row(jnp.minimum(tokens, after[:, None] - 1), spec.ratio, overlap, past.lengths)
        kept |= jax.tree.map(partial(_take_rows, index=rows), tails)
    return kept


def commit(config: DeepseekV4Config, cache: Cache, counts: jax.Array) -> Cache:
    """The cache of a forward with `keep_all`, when only the first `counts` [B] of its tokens turn out to be real."""
    past = Past(cache.lengths, counts)
    states = {
        name: jax.vmap(lambda state, spec=spec: trim(config, spec, state, past))(cache.states[name])
        for name, spec in stacks(config).items()
    }
    return replace(cache, lengths=cache.lengths + counts, states=states)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, R, ..], index [B, n] -> [B, n, ..]; rows beyond the last repeat it."""
    return jax.vmap(lambda rows, at: rows[jnp.clip(at, 0, x.shape[1] - 1)])(x, index)


def init_cache(
    config: DeepseekV4Config,
    batch: int,
    capacity: int,
    format: str = "float32",
    blocks: int | None = None,
    in_words: bool | None = None,
) -> Cache:
    """An empty cache.

    Args:
        config: the architecture.
        batch: sequences.
        capacity: tokens that each sequence has room for, rounded up to whole blocks.
        format: "float32", "bfloat16", or "deployed" (FP8, BF16 rotary dims, FP4 indexer keys).
        blocks: size of the shared pool. By default each sequence owns the blocks it has room for; with another size the
            caller fills `tables`.
        in_words: blocks as rows of words, which TPUs want and get by default.

    Raises:
        UserError: as `quantization.storage.cache_format`.
    """
    words = compiled_for() == "tpu" if in_words is None else in_words
    form, tokens = replace(cache_format(config, format), in_words=words), block_tokens(config)
    columns = -(-capacity // tokens)
    owned = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
    tables = owned if blocks is None else jnp.zeros((batch, columns), jnp.int32)
    count = batch * columns if blocks is None else blocks
    depth = {name: 1 if name == "mtp" else config.segments[int(name.split("/")[0])].repeats for name in stacks(config)}
    states = {name: _empty_state(config, spec, depth[name], batch, form) for name, spec in stacks(config).items()}
    pools = {name: _empty_pools(spec, depth[name], count, tokens, form) for name, spec in stacks(config).items()}
    return Cache(jnp.zeros(batch, jnp.int32), tables, states, pools, form, tokens, own_blocks=blocks is None)


def split_layer(layer: LayerCache) -> tuple[dict[str, Any], dict[str, Stored]]:
    """A layer's new state, and the new pools of its stack."""
    state = {"window": layer.window, "tail": layer.tail, "index_tail": layer.index_tail}
    pools = {"entries": layer.pages, "index_keys": layer.index_pages}
    return (
        {name: part for name, part in state.items() if part is not None},
        {name: pages.store for name, pages in pools.items() if pages is not None},
    )


def block_tokens(config: DeepseekV4Config) -> int:
    """Tokens per block: the least common multiple of the ratios, 128 in the release."""
    return math.lcm(*(spec.ratio for spec in stacks(config).values() if spec.ratio))


def stacks(config: DeepseekV4Config) -> dict[str, LayerSpec]:
    """Every stack of equal layers by name, main model first."""
    named = {f"{i}/{j}": spec for i, segment in enumerate(config.segments) for j, spec in enumerate(segment.unit)}
    return named | ({"mtp": config.mtp_layers[0]} if config.mtp_layers else {})


def _empty_state(
    config: DeepseekV4Config, spec: LayerSpec, layers: int, batch: int, form: CacheFormat
) -> dict[str, Any]:
    """The states of a stack of fresh sequences."""
    state: dict[str, Any] = {"window": form.entry.zeros((layers, batch, config.sliding_window))}
    if spec.attention != SLIDING:
        state["tail"] = _empty_tail(layers, batch, spec, config.head_dim)
    if spec.attention == CSA:
        state["index_tail"] = _empty_tail(layers, batch, spec, config.index_head_dim)
    return state


def _empty_pools(spec: LayerSpec, layers: int, blocks: int, tokens: int, form: CacheFormat) -> dict[str, Stored]:
    """The pools of a stack with room for `blocks` blocks of `tokens` tokens."""
    if spec.attention == SLIDING:
        return {}
    names = ("entries", "index_keys") if spec.attention == CSA else ("entries",)
    return {name: _pool(form, name, spec, tokens).zeros(layers, blocks) for name in names}


def _empty_tail(layers: int, batch: int, spec: LayerSpec, width: int) -> Tail:
    overlap = 2 if spec.attention == CSA else 1
    shape = (layers, batch, overlap * spec.ratio, overlap * width)
    return Tail(jnp.zeros(shape), jnp.zeros(shape))


def _pool(form: CacheFormat, name: str, spec: LayerSpec, tokens: int) -> Pool:
    return pool_of(form.index if name == "index_keys" else form.entry, tokens // spec.ratio, form.in_words)
