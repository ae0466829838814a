"""One prefix, many sequences: `fork` for a cache, and documents and agents in one pool of counted blocks.

A document's compressed blocks lie in memory once (report 3.6.2, article 4.3). An agent that goes on from it refers to
them, has a state of its own (windows and tails), chooses entries for itself, and gets blocks of its own from where it
begins to write.

    pool = BlockPool(config, blocks=100)
    document = prefill(pool, params, tokens)
    agents = document.fork(10, capacity=4096)
    logits = agents.forward(params, questions).logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.errors import UserError
from dsv4_jax.inference.agents import Agents, Document, padded
from dsv4_jax.inference.block_pool import BlockPool, OutOfBlocks
from dsv4_jax.inference.prefix_store import Hit, PrefixStore
from dsv4_jax.inference.requests import token_ids
from dsv4_jax.inference.sizes import LEAST_CAPACITY, round_up
from dsv4_jax.layers.kv_cache import Cache

__all__ = ["Agents", "BlockPool", "Document", "Hit", "OutOfBlocks", "PrefixStore", "fork", "prefill"]


def fork(cache: Cache, count: int, capacity: int, blocks: int | None = None) -> Cache:
    """`count` sequences that go on from one: they share its complete blocks, the rest is each one's own.

    Args:
        cache: of one sequence; it stays as it is.
        count: rows of the result.
        capacity: tokens that each row has room for, those of the prefix included.
        blocks: size of the new pool; as large as it must be by default. Whoever forks prefixes of many lengths rounds
            it up, since every size is compiled for anew.

    Returns:
        A cache with a new pool: the complete blocks once, then the blocks of each row, of which the first begins as a
        copy of the incomplete one.

    Raises:
        ValueError: when the cache holds more than one sequence, or capacity or blocks do not suffice.
    """
    if cache.batch != 1:
        raise ValueError(f"only a cache of one sequence can be forked; this one holds {cache.batch}")
    length, tokens = int(cache.lengths[0]), cache.block_tokens
    columns, shared = -(-capacity // tokens), length // tokens
    if capacity < length:
        raise ValueError(f"a capacity of {capacity} tokens does not hold the {length} tokens of the prefix")
    needed = shared + count * (columns - shared)
    if blocks is not None and blocks < needed:
        raise ValueError(
            f"{count} sequences of {capacity} tokens that share {length} need {needed} blocks, not {blocks}"
        )
    tables = np.tile(np.arange(columns, dtype=np.int32), (count, 1))
    tables[:, shared:] += (columns - shared) * np.arange(count, dtype=np.int32)[:, None]
    before, source = np.asarray(cache.tables[0]), np.zeros(blocks or needed, np.int32)
    source[:shared] = before[:shared]
    if length % tokens:
        source[tables[:, shared]] = before[shared]
    states, pools = _spread(cache.states, cache.pools, source, count)
    return replace(
        cache,
        lengths=jnp.full(count, length, jnp.int32),
        tables=jnp.asarray(tables),
        states=states,
        pools=pools,
        sealed=None,
        own_blocks=False,
    )


@partial(jax.jit, static_argnums=3)
def _spread(states: Any, pools: Any, source: jax.Array, count: int) -> tuple[Any, Any]:
    """One row's states `count` times, and the pools' blocks `source`."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, 1), states), jax.tree.map(lambda x: x[:, source], pools)


def prefill(
    pool: BlockPool,
    params: model.Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    chunk: int = 512,
    store: PrefixStore | None = None,
) -> Document:
    """The document of `tokens` [n], run through the model once.

    Args:
        pool: where its blocks will lie.
        params: the parameters; those of the store, if there is one.
        tokens: int32 [n].
        chunk: tokens that run at a time.
        store: prefixes on disk: what it holds of the document is not computed again (`Document.hit` says how much),
            and what it does not hold is added.

    Raises:
        OutOfBlocks: when the pool has no room for it.
        UserError: when there are no tokens, or they are none of the model's.
    """
    tokens = token_ids(pool.config, tokens, "a document")
    if tokens.ndim != 1 or not len(tokens):
        raise UserError(f"a document is a row of one or more tokens; these have the shape {tokens.shape}")
    agents = Agents(pool, 1, round_up(len(tokens), LEAST_CAPACITY))  # whose table is compiled for
    found = store and store.find(pool, tokens, agents.empty_states())
    agents.resume(found, tokens) if found else agents.enter()
    keys = store.keys(pool, tokens) if store else []
    try:
        while (start := int(agents.lengths[0])) < len(tokens):
            part, count = padded(tokens[start : start + chunk], chunk)
            out = agents.forward(params, part, count, logits=False, keep_all=store is not None)
            if store:
                _store_states(store, agents, keys, start, start + int(count[0]))
                agents.commit(count)
                _store_blocks(store, agents, keys, start)
        if store:
            store.evict(keys)
        logits = _last_logits(params, out.hidden, count[0] - 1)
        return replace(agents.keep(0), logits=logits, hit=found.hit if found else None)
    finally:
        agents.leave(0)


def _store_states(store: PrefixStore, agents: Agents, keys: list[str], start: int, stop: int) -> None:
    """Store the states within tokens start .. stop of a forward with `keep_all` that the store wants."""
    size = agents.pool.block_tokens
    for after in range(start // size * size + size, stop + 1, size):
        if after < agents.sealed[0]:
            continue  # recomputed from an empty state: windows may not be right yet
        if store.wants_state(agents.pool, after):
            store.add_state(
                agents.pool, keys[after // size - 1], lambda after=after: agents.states_after(np.array([after - start]))
            )


def _store_blocks(store: PrefixStore, agents: Agents, keys: list[str], start: int) -> None:
    """Store the blocks that were completed since token `start`."""
    size = agents.pool.block_tokens
    done = slice(start // size, int(agents.lengths[0]) // size)
    store.add_blocks(agents.pool, keys[done], agents.blocks(0)[done])


@jax.jit
def _last_logits(params: model.Params, hidden: jax.Array, index: int) -> jax.Array:
    return model.output_logits(params, jax.lax.dynamic_index_in_dim(hidden[0], index, keepdims=False))
