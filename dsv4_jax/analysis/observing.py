"""What a trace looks at inside a layer: masses of attention, chosen entries, distributions of a few queries, mixing.

Everything is computed from what the layer itself computed with. Memory: of every token a few numbers per head and per
chosen entry; distributions over tokens and entries only of the queries asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.analysis.rounding_errors import Measured, expert_sums
from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk import IndexOperands, PagedOperands
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.layers.moe import shares
from dsv4_jax.observer import Attended, Observer, Passed

Seen = dict[str, Any]
ATTENTION_ROLES = ("attn_input", "kv_entry", "index_q", "index_k")


@dataclass(frozen=True)
class Tracer(Observer):
    """Adds "trace" to the records.

    Attributes:
        queries: positions in their sequences whose whole distributions are wanted.
        per_head: their distributions per head instead of the mean of the heads.
        measured: the policy of the forward, when it rounds.
    """

    queries: tuple[int, ...] = ()
    per_head: bool = False
    measured: Measured | None = None

    def attention(self, seen: Attended) -> Seen:
        """See `trace.AttentionTrace`; every leaf is [B, ..], its second axis the tokens or the queries at hand."""
        sink = jnp.exp(seen.layer.attn_sink[...].astype(jnp.float32) - seen.lse)
        masses = [jnp.exp(lse - seen.lse) for _, lse in seen.branches]
        found: Seen = {"window_mass": masses[0], "entry_mass": sum(masses[1:], jnp.zeros_like(sink)), "sink_mass": sink}
        if seen.choice is not None:
            found |= {"chosen": seen.choice, **of_chosen(seen)}
        if self.queries:
            found["queries"] = at_queries(seen, self.queries, self.per_head)
        if self.measured:
            found["rounding"] = self.measured.take(ATTENTION_ROLES)
        return {"trace": found}

    def block(self, seen: Passed) -> Seen:
        """See `trace_records.LayerTrace`."""
        routing, attended = seen.routing, dict(seen.attended["trace"])
        rounding = attended.pop("rounding", {})
        if self.measured:
            rounding = rounding | self.measured.take()
            if "expert_input" in self.measured.rounding:
                rounding["expert_input"] += expert_sums(seen)
        p = shares(routing.scores)
        entropy = -jax.scipy.special.xlogy(p, p).sum(-1)
        experts = {"expert_ids": routing.expert_ids, "weights": routing.weights, "entropy": entropy}
        mixing = jax.tree.map(lambda *sites: jnp.stack(sites, axis=2), *seen.maps)._asdict()
        return {"trace": {"attention": attended, "experts": experts, "mixing": mixing, "rounding": rounding}}


def of_chosen(seen: Attended) -> Seen:
    """Of every chosen entry [B, S, k]: its index score, and the attention mass on it as the mean of the heads."""
    assert seen.choice is not None and seen.operands is not None and seen.entries is not None
    scale, operands = seen.q.shape[-1] ** -0.5, seen.operands

    def one(args: tuple[jax.Array, ...]) -> Seen:
        q, lse, choice, queries, weights = args
        used = choice >= 0
        mass = _masses(q, lse, _read(seen.entries, choice, q.dtype), used, scale).mean(2)
        scores = IndexOperands(queries, _read(_keys(operands), choice, queries.dtype), weights).scores()
        return {"chosen_mass": mass, "chosen_scores": jnp.where(used, scores, -jnp.inf)}

    batch, length, heads, width = seen.q.shape
    widest = max(heads, width, operands.queries.shape[2], operands.queries.shape[3])
    chunk = chunk_length(length, batch * seen.choice.shape[-1] * widest)
    chunks = split((seen.q, seen.lse, seen.choice, operands.queries, operands.weights), chunk)
    return join(jax.lax.map(one, chunks), length)


def at_queries(seen: Attended, queries: tuple[int, ...], per_head: bool) -> Seen:
    """The distributions of the queries at these positions; see `trace.QueryTrace`."""
    positions, window = seen.layout.positions, seen.layer.config.sliding_window
    at = jnp.asarray(queries, jnp.int32) - positions[:, :1]
    found = (at >= 0) & (at < positions.shape[1])
    at = jnp.clip(at, 0, positions.shape[1] - 1)
    pick = lambda x: jax.vmap(lambda row, at: row[at])(x, at)  # noqa: E731
    q, lse, scale = pick(seen.q), pick(seen.lse), seen.q.shape[-1] ** -0.5

    back = jnp.arange(window - 1, -1, -1, dtype=jnp.int32)
    rows = at[..., None] + (seen.kv.shape[1] - seen.q.shape[1]) - back
    visible = (back <= pick(positions)[..., None]) & found[..., None]
    out = {
        "found": found,
        "window": _in_chunks(_distribution(scale, per_head, lambda rows: _read(seen.kv, rows, q.dtype)))(
            q, lse, jnp.where(visible, rows, -1)
        ),
    }
    if seen.entries is None or seen.blocks is None:
        return out
    index = jnp.arange(_count(seen.entries), dtype=jnp.int32)
    lo, hi = pick(seen.blocks.lo)[..., None], jnp.where(found, pick(seen.blocks.hi), 0)[..., None]
    everything = jnp.where((index >= lo) & (index < hi), index, -1)
    ids = everything if seen.choice is None else jnp.where(found[..., None], pick(seen.choice), -1)
    read = lambda ids: _read(seen.entries, ids, q.dtype)  # noqa: E731
    out |= {"entry_ids": ids, "entries": _in_chunks(_distribution(scale, per_head, read))(q, lse, ids)}
    if seen.operands is not None:
        out["index_scores"] = _index_scores(seen.operands, pick, everything)
    return out


def _index_scores(
    operands: IndexOperands | PagedOperands, pick: Callable[[jax.Array], jax.Array], visible: jax.Array
) -> jax.Array:
    """Scores of all entries [B, Q, T], -inf where they are not visible."""

    def one(queries: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
        scores = IndexOperands(queries, _read(_keys(operands), visible, queries.dtype), weights).scores()
        return jnp.where(visible >= 0, scores, -jnp.inf)

    return _in_chunks(one)(pick(operands.queries), pick(operands.weights), visible)


def _distribution(scale: float, per_head: bool, read: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """From q [B, Q, H, K], lse [B, Q, H] and ids [B, Q, N] the masses [B, Q, H, N], or [B, Q, N] as their mean."""

    def one(q: jax.Array, lse: jax.Array, ids: jax.Array) -> jax.Array:
        masses = _masses(q, lse, read(ids), ids >= 0, scale)
        return masses if per_head else masses.mean(2)

    return one


def _in_chunks(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of queries [B, Q, H, K], weights and ids [B, Q, N], over few enough queries at a time."""

    def run(q: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        chunk = chunk_length(q.shape[1], q.shape[0] * ids.shape[-1] * max(q.shape[2:]))
        chunks = (*split((q, weights), chunk), split(ids, chunk, fill=-1))
        return join(jax.lax.map(lambda args: function(*args), chunks), q.shape[1])

    return run


def _masses(q: jax.Array, lse: jax.Array, keys: jax.Array, used: jax.Array, scale: float) -> jax.Array:
    """Probabilities under the joint softmax [B, Q, H, N] of each query's own keys [B, Q, N, K], 0 where not `used`."""
    scores = jnp.einsum("bqhk,bqnk->bqhn", q, keys, preferred_element_type=jnp.float32) * scale
    return jnp.where(used[..., None, :], jnp.exp(scores - lse[..., None]), 0.0)


def _keys(operands: IndexOperands | PagedOperands) -> jax.Array | Pages:
    return operands.pages if isinstance(operands, PagedOperands) else operands.keys


def _count(entries: jax.Array | Pages) -> int:
    return entries.capacity if isinstance(entries, Pages) else entries.shape[1]


def _read(entries: jax.Array | Pages | None, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows `index` [B, Q, N] of entries [B, T, K], or of a cache's pages: [B, Q, N, K]; -1 reads the first."""
    assert entries is not None
    if isinstance(entries, Pages):
        return entries.read_entries(index, dtype)
    return jax.vmap(lambda row, index: row[jnp.maximum(index, 0)])(entries, index)
