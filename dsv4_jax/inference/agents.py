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
from dsv4_jax.inference.prefix_store import Found, Hit
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
        lengths: tokens of each row, int32 [rows].
        sealed: see `Cache.sealed`.
        tables: block numbers, int32 [rows, columns].
    """

    def __init__(self, pool: BlockPool, rows: int, capacity: int):
        """A batch of `rows` empty rows with room for `capacity` tokens each, rounded up to whole blocks."""
        empty = init_cache(pool.config, rows, capacity, pool.format.name, blocks=0)
        self.pool, self._states, self._capacity = pool, empty.states, empty.capacity
        self.lengths, self.sealed = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.tables, self._held = np.zeros(empty.tables.shape, np.int32), np.zeros(rows, np.int32)
        self._tokens: list[list[np.ndarray] | None] = [None] * rows  # None where nobody is
        self._pending: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> int:
        """Rows, taken or free."""
        return len(self.lengths)

    @property
    def state_bytes(self) -> int:
        """Bytes of all rows' states."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._states))

    def blocks(self, row: int) -> np.ndarray:
        """The blocks that a row holds, shared ones included."""
        return self.tables[row, : self._held[row]].copy()

    def enter(self, document: Document | None = None) -> int:
        """Let a new agent go on from `document` (or from nothing) in a free row; the row's number."""
        if None not in self._tokens:
            raise UserError(f"all {self.rows} rows are taken: an agent must leave first")
        row = self._tokens.index(None)
        held = 0 if document is None else len(document.blocks)
        if document is None:
            document = Document(self.pool, np.zeros(0, np.int32), np.zeros(0, np.int32), _zeros_of_row(self._states))
        if document.pool is not self.pool or document.closed:
            raise UserError("the document is closed" if document.closed else "the document lies in another pool")
        if len(document.tokens) > self._capacity:
            raise UserError(f"a document of {len(document.tokens)} tokens exceeds the capacity of {self._capacity}")
        self.pool.retain(document.blocks)
        self.tables[row, :held], self._held[row] = document.blocks, held
        self.lengths[row], self.sealed[row], self._tokens[row] = len(document.tokens), 0, [document.tokens]
        self._states = _put_row(self._states, document.states, row)
        return row

    def resume(self, found: Found, tokens: np.ndarray) -> int:
        """Let an agent go on where a store's blocks of `tokens` lead; the row owns the blocks. The row's number."""
        row = self.enter()
        self.tables[row, : len(found.blocks)], self._held[row] = found.blocks, len(found.blocks)
        self.lengths[row], self.sealed[row] = found.start, len(found.blocks) * self.pool.block_tokens
        self._tokens[row] = [tokens[: found.start]]
        if found.states is not None:
            self._states = _put_row(self._states, found.states, row)
        return row

    def leave(self, row: int) -> None:
        """End a row's agent and give its blocks back; an empty row stays as it is."""
        self.pool.release(self.blocks(row))
        self.tables[row], self._held[row], self.lengths[row], self.sealed[row] = 0, 0, 0, 0
        self._tokens[row] = None

    def keep(self, row: int) -> Document:
        """What the row has seen, as a document: to fork it, or to come back to it. The row goes on."""
        if (tokens := self._tokens[row]) is None or self._pending:
            raise UserError(f"row {row} is empty" if tokens is None else "commit the last forward first")
        blocks = self.blocks(row)
        self.pool.retain(blocks)
        return Document(self.pool, np.concatenate(tokens), blocks, _take_row(self._states, row))

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
            UserError: when a row would exceed its capacity, is free, or waits for a commit.
        """
        tokens = np.asarray(tokens, np.int32)
        taken = np.array([row is not None for row in self._tokens])
        counts = np.asarray(taken * tokens.shape[1] if counts is None else counts, np.int32)
        if self._pending or (counts[~taken] > 0).any():
            raise UserError("commit the last forward first" if self._pending else "a free row cannot have tokens")
        self._make_room(counts)
        static = (self.pool.config, logits, keep_all, self.pool.options)
        out = _forward(*static, params, tokens, self.pool.pools, self._cache(), counts)
        assert out.cache is not None
        self.pool.pools, self._states = out.cache.pools, out.cache.states
        self._pending = tokens, counts
        if not keep_all:
            self._advance(counts)
        return out._replace(cache=None)

    def commit(self, counts: np.ndarray) -> None:
        """Settle a forward with `keep_all`: of its tokens the first `counts` [rows] were real, the rest is gone."""
        if self._pending is None:
            raise UserError("there is nothing to commit: the last forward did not keep all")
        self._states = self.states_after(counts)
        self._advance(np.asarray(counts))

    def empty_states(self) -> Any:
        """The state of one row that has seen nothing."""
        return _zeros_of_row(self._states)

    def states_after(self, counts: np.ndarray) -> Any:
        """The rows' states if `counts` [rows] tokens of a forward with `keep_all` were real."""
        return _commit(self.pool.config, self._cache(), jnp.array(counts, jnp.int32)).states

    def _cache(self) -> Cache:
        """The batch as the model takes it, but for the pools."""
        # Copies on the host: JAX may still read an array it was given while the next step changes it.
        lengths, tables, sealed = (jnp.asarray(x.copy()) for x in (self.lengths, self.tables, self.sealed))
        return Cache(lengths, tables, self._states, {}, self.pool.format, self.pool.block_tokens, sealed)

    def _advance(self, counts: np.ndarray) -> None:
        """Count tokens in, and give back blocks that only refused tokens needed."""
        assert self._pending is not None
        for row, history in enumerate(self._tokens):
            if history is not None:
                history.append(self._pending[0][row, : counts[row]].copy())
        self.lengths += np.asarray(counts, np.int32)
        self._pending = None
        for row in range(self.rows):
            needed = self._columns(max(self.lengths[row], self.sealed[row]))
            self.pool.release(self.tables[row, needed : self._held[row]])
            self._held[row] = min(needed, self._held[row])

    def _make_room(self, counts: np.ndarray) -> None:
        """Give every row the blocks that its tokens need, and its own copy of a shared block that it would write to."""
        after = self.lengths + counts
        if (after > self._capacity).any():
            row = int(np.argmax(after))
            raise UserError(f"row {row} would hold {after[row]} tokens; rows have room for {self._capacity}")
        torn = [row for row in range(self.rows) if counts[row] and self._writes_to_shared(row)]
        wanted = [max(0, self._columns(length) - int(held)) for length, held in zip(after, self._held, strict=True)]
        fresh = self.pool.allocate(len(torn) + sum(wanted))
        self._copy_torn(torn, fresh[: len(torn)])
        fresh = fresh[len(torn) :]
        for row, count in enumerate(wanted):
            self.tables[row, self._held[row] : self._held[row] + count] = fresh[:count]
            self._held[row] += count
            fresh = fresh[count:]

    def _columns(self, length: int) -> int:
        return -(-int(length) // self.pool.block_tokens)

    def _writes_to_shared(self, row: int) -> bool:
        """Whether the next entry goes to a block that others hold too."""
        column = max(self.lengths[row], self.sealed[row]) // self.pool.block_tokens
        return column < self._held[row] and self.pool.holders(self.tables[row, column]) > 1

    def _copy_torn(self, rows: list[int], blocks: list[int]) -> None:
        """Replace the incomplete blocks of `rows` by copies in `blocks`."""
        if not rows:
            return
        source, target = np.zeros(self.rows, np.int32), np.full(self.rows, -1, np.int32)  # one shape for any number
        columns = np.maximum(self.lengths, self.sealed)[rows] // self.pool.block_tokens
        source[: len(rows)], target[: len(rows)] = self.tables[rows, columns], blocks
        self.pool.copy(source, target)
        self.pool.release(source[: len(rows)])
        self.tables[rows, columns] = blocks


def padded(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of tokens [n] as [1, length], zeros behind them, and [n]."""
    return np.pad(tokens, (0, length - len(tokens)))[None], np.array([len(tokens)])


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def _forward(
    config: DeepseekV4Config,
    logits: bool,
    keep_all: bool,
    options: tuple[tuple[str, Any], ...],
    params: model.Params,
    tokens: jax.Array,
    pools: Any,
    cache: Cache,
    counts: jax.Array,
) -> model.Output:
    cache = replace(cache, pools=pools)
    return model.forward(
        config, params, tokens, cache=cache, counts=counts, logits=logits, keep_all=keep_all, **dict(options)
    )


_commit = jax.jit(commit, static_argnums=0)


@partial(jax.jit, donate_argnums=0)
def _put_row(states: Any, one: Any, row: int) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 1), states, one)


@jax.jit
def _take_row(states: Any, row: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, 1), states)


def _zeros_of_row(states: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros_like(x[:, :1]), states)
