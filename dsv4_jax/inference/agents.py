"""Documents, and agents that go on from them, in one pool of counted blocks: see `sharing`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.inference.block_pool import BlockPool
from dsv4_jax.inference.block_tables import BlockTables, Row
from dsv4_jax.inference.prefix_store import Found, Hit
from dsv4_jax.inference.requests import token_ids
from dsv4_jax.layers.kv_cache import Cache, commit, init_cache


@dataclass(eq=False)
class Document:
    """A sequence that does not change: what agents start from. `close` it when no more will.

    Attributes:
        pool: where its blocks lie.
        tokens: int32 [n].
        blocks: the blocks it holds.
        states: its state, arrays [layers, 1, ..] as in `Cache.states`.
        logits: of its last token, float32 [V], or None when nothing was computed.
        hit: what a store had of it; None without one.
    """

    pool: BlockPool
    tokens: np.ndarray
    blocks: np.ndarray
    states: Any
    logits: jax.Array | None = None
    hit: Hit | None = None
    closed: bool = field(default=False, init=False)

    def fork(self, count: int, capacity: int) -> Agents:
        """`count` agents that go on from here, with room for `capacity` tokens each, the document's included."""
        agents = Agents(self.pool, count, capacity)
        for _ in range(count):
            agents.enter(self)
        return agents

    def close(self) -> None:
        """Give its blocks back; agents that share them keep theirs."""
        if not self.closed:
            self.pool.release(self.blocks)
            self.closed = True


class Agents:
    """Sequences that decode in one batch. Rows come and go; their number and capacity stay, so nothing compiles anew.

    The MTP module's state is not kept up here.

    Attributes:
        pool: where their blocks lie.
    """

    def __init__(self, pool: BlockPool, rows: int, capacity: int):
        """A batch of `rows` empty rows with room for `capacity` tokens each, rounded up to whole blocks."""
        empty = init_cache(pool.config, rows, capacity, pool.format.name, blocks=0)
        self.pool, self._states, self._capacity = pool, empty.states, empty.capacity
        self._held = BlockTables(pool, *empty.tables.shape)
        self._pending: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> int:
        """Rows, taken or free."""
        return len(self._held.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int32 [rows]."""
        return self._held.lengths

    @property
    def sealed(self) -> np.ndarray:
        """See `Cache.sealed`, int32 [rows]."""
        return self._held.sealed

    @property
    def tables(self) -> np.ndarray:
        """Block numbers, int32 [rows, columns], 0 where a row has none."""
        return self._held.tables

    @property
    def state_bytes(self) -> int:
        """Bytes of all rows' states."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._states))

    def blocks(self, row: int) -> np.ndarray:
        """The blocks that a row holds, shared ones included."""
        return np.array(found.blocks if (found := self._held.rows[row]) else [], np.int32)

    def enter(self, document: Document | None = None) -> int:
        """Let a new agent go on from `document` (or from nothing) in a free row; the row's number."""
        if self._pending:
            raise UserError("commit the last forward first")
        if None not in self._held.rows:
            raise UserError(f"all {self.rows} rows are taken: an agent must leave first")
        if document is None:
            document = Document(self.pool, np.zeros(0, np.int32), np.zeros(0, np.int32), _zeros_of_row(self._states))
        if document.pool is not self.pool or document.closed:
            raise UserError("the document is closed" if document.closed else "the document lies in another pool")
        if len(document.tokens) > self._capacity:
            raise UserError(f"a document of {len(document.tokens)} tokens exceeds the capacity of {self._capacity}")
        self.pool.retain(document.blocks)
        number = self._held.rows.index(None)
        self._held.put(number, Row([document.tokens], document.blocks.tolist(), len(document.tokens)))
        self._states = _put_row(self._states, document.states, number)
        return number

    def resume(self, found: Found, tokens: np.ndarray) -> int:
        """Let an agent go on where a store's blocks of `tokens` lead; the row owns the blocks. The row's number."""
        number = self.enter()
        sealed = len(found.blocks) * self.pool.block_tokens
        self._held.put(number, Row([tokens[: found.start]], list(found.blocks), found.start, sealed))
        if found.states is not None:
            self._states = _put_row(self._states, found.states, number)
        return number

    def leave(self, row: int) -> None:
        """End a row's agent and give its blocks back; an empty row stays as it is."""
        self.pool.release(self.blocks(row))
        self._held.put(row, None)

    def keep(self, row: int) -> Document:
        """What the row has seen, as a document: to fork it, or to come back to it. The row goes on."""
        if (found := self._held.rows[row]) is None or self._pending:
            raise UserError(f"row {row} is empty" if found is None else "commit the last forward first")
        self.pool.retain(found.blocks)
        return Document(self.pool, np.concatenate(found.pieces), self.blocks(row), _take_row(self._states, row))

    def forward(
        self,
        params: model.Params,
        tokens: np.ndarray,
        counts: np.ndarray | None = None,
        *,
        logits: bool = True,
        keep_all: bool = False,
    ) -> model.Output:
        """One step of `model.forward` for all rows at once.

        Args:
            params: the parameters.
            tokens: int32 [rows, S]; free rows take any.
            counts: how many of each row's are real, [rows]; by default all of those in taken rows.
            logits: also multiply the output matrix.
            keep_all: `commit` will say how many are real, at most `counts`.

        Returns:
            The output, without its cache.

        Raises:
            OutOfBlocks: when the pool has no room; nothing has changed then.
            UserError: when a row would exceed its capacity, is free, or waits for a commit, and for tokens or counts
                that cannot be.
        """
        if self._pending:
            raise UserError("commit the last forward first")
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or len(tokens) != self.rows:
            raise UserError(f"tokens have the shape {tokens.shape}: a row for each of {self.rows} rows is needed")
        taken, length = self._held.taken, tokens.shape[1]
        counts = _counts(taken * length if counts is None else counts, np.full(self.rows, length))
        if (counts[~taken] > 0).any():
            raise UserError("a free row cannot have tokens")
        real = np.arange(length) < counts[:, None]
        token_ids(self.pool.config, tokens[real], "tokens")
        tokens = np.where(real, tokens, 0).astype(np.int32)
        self._held.make_room(counts)
        run = _forward if keep_all else _forward_in_place
        static = (self.pool.config, logits, keep_all, self.pool.options)
        out = run(*static, params, tokens, self.pool.pools, self._states, self._cache({}), counts)
        assert out.cache is not None
        self.pool.pools, self._states = out.cache.pools, out.cache.states
        if keep_all:
            self._pending = tokens, counts
        else:
            self._held.advance(tokens, counts)
        return out._replace(cache=None)

    def commit(self, counts: np.ndarray) -> None:
        """Settle a forward with `keep_all`: of its tokens the first `counts` [rows] were real, the rest is gone.

        Whoever has left since then counts none.

        Raises:
            UserError: without such a forward, and for counts above those that it was given.
        """
        if self._pending is None:
            raise UserError("there is nothing to commit: the last forward did not keep all")
        tokens, given = self._pending
        counts = np.where(self._held.taken, _counts(counts, given), 0)
        self._states, self._pending = self.states_after(counts), None
        self._held.advance(tokens, counts)

    def empty_states(self) -> Any:
        """The state of one row that has seen nothing."""
        return _zeros_of_row(self._states)

    def states_after(self, counts: np.ndarray) -> Any:
        """The rows' states if `counts` [rows] tokens of a forward with `keep_all` were real."""
        return _commit(self.pool.config, self._cache(self._states), jnp.array(counts, jnp.int32)).states

    def _cache(self, states: Any) -> Cache:
        """The batch as the model takes it, but for the pools."""
        lengths, tables, sealed = jnp.asarray(self.lengths), self._held.on_device(), jnp.asarray(self.sealed)
        return Cache(lengths, tables, states, {}, self.pool.format, self.pool.block_tokens, sealed)


def _counts(counts: Any, most: np.ndarray) -> np.ndarray:
    """Counts of tokens as int32 [rows], from 0 to `most` [rows] each; UserError for others."""
    counts = np.asarray(counts)
    if counts.shape != most.shape or not np.issubdtype(counts.dtype, np.integer):
        raise UserError(f"counts are {counts.tolist()}: a whole number for each of {len(most)} rows is needed")
    if ((counts < 0) | (counts > most)).any():
        raise UserError(f"counts are {counts.tolist()}: they go from 0 to {most.tolist()}, the tokens given")
    return counts.astype(np.int32)


def padded(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of tokens [n] as [1, length], zeros behind them, and [n]."""
    return np.pad(tokens, (0, length - len(tokens)))[None], np.array([len(tokens)])


def _step(
    config: DeepseekV4Config,
    logits: bool,
    keep_all: bool,
    options: tuple[tuple[str, Any], ...],
    params: model.Params,
    tokens: jax.Array,
    pools: Any,
    states: Any,
    cache: Cache,
    counts: jax.Array,
) -> model.Output:
    cache = replace(cache, pools=pools, states=states)
    return model.forward(
        config, params, tokens, cache=cache, counts=counts, logits=logits, keep_all=keep_all, **dict(options)
    )


_forward = jax.jit(_step, static_argnums=(0, 1, 2, 3), donate_argnums=6)  # states that keep all tokens are larger
_forward_in_place = jax.jit(_step, static_argnums=(0, 1, 2, 3), donate_argnums=(6, 7))
_commit = jax.jit(commit, static_argnums=0)


@partial(jax.jit, donate_argnums=0)
def _put_row(states: Any, one: Any, row: int) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 1), states, one)


@jax.jit
def _take_row(states: Any, row: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, 1), states)


def _zeros_of_row(states: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros_like(x[:, :1]), states)
