"""Dropless expert parallelism: tokens travel to the devices of their experts and back, in rounds of bounded size.

Every device owns E / P experts and a part of the tokens. It sorts its (token, expert) pairs by owner and sends each
owner up to `capacity` of them in an all-to-all; the owner multiplies what it got as on one device, and a second
all-to-all brings the results back. Pairs beyond the capacity go in further rounds, which run only when some device
needs them: the buffers have a fixed size and no token is ever dropped. Only the filled part of them travels
(`exchange.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.partition import ExpertFunction
from dsv4_jax.quantization.policy import NONE, Policy
from sharding.exchange import all_to_all, travel_rows
from sharding.gathering import expert_specs, owned_experts
from sharding.mesh import EXPERT, TENSOR
from sharding.rules import Axes, used_axes
from sharding.wire import Tile, tile_of

HEADROOM = 2.0
"""Capacity of the first round over the mean load of an owner: routing this uneven still takes one round."""
LANES = 8
"""Capacities are multiples of this."""


@dataclass(frozen=True)
class Dispatch:
    """Static facts of one dispatch.

    Attributes:
        owners: devices of the expert axis.
        experts: experts of one owner.
        capacity: pairs that one device sends to one owner in a round.
        rounds: enough for every pair of a device to go to one owner.
    """

    owners: int
    experts: int
    capacity: int
    rounds: int


@dataclass(frozen=True)
class Travel:
    """How tokens go to their experts and matrices to their owners; static.

    Attributes:
        headroom: capacity of a round over the mean load of an owner.
        tokens: how tokens have been rounded (a `Rounding` or None).
        matrices: how the experts have been rounded.
    """

    headroom: float = HEADROOM
    tokens: Any = None
    matrices: Policy = NONE


class Places(NamedTuple):
    """Where the pairs [N, k] of this device go: their owner, their rank among its pairs for that owner.

    load: how many pairs each owner gets from this device, [owners].
    """

    owner: jax.Array
    rank: jax.Array
    load: jax.Array


def plan_dispatch(tokens: int, k: int, experts: int, owners: int, headroom: float = HEADROOM) -> Dispatch:
    """The buffers for `tokens` tokens a device, each with `k` distinct experts."""
    own = experts // owners
    most = tokens * min(k, own)  # a token has at most `own` experts on one owner
    capacity = min(most, -(-int(tokens * k * headroom / owners) // LANES) * LANES or LANES)
    return Dispatch(owners, own, capacity, -(-most // capacity))


def dispatch_experts(
    mesh: Mesh,
    rows: PartitionSpec,
    rules: Mapping[str, Axes],
    apply: ExpertFunction,
    matrices: Any,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    beside: jax.Array | None = None,
    travel: Travel = Travel(),
) -> jax.Array:
    """`Partition.experts` with the experts spread over the mesh's expert axis, and their width over its tensor axis.

    Args:
        mesh: the devices.
        rows: how [B, S] lies on them. When that uses the expert axis, tokens are exchanged by all-to-all; when tokens
            are repeated along it, each device computes its own experts' share and the shares are summed.
        rules: of parameters; along further axes that spread the matrices they are gathered.
        apply: see `Partition.experts`.
        matrices: w1, w3 [E, D, I] and w2 [E, I, D], arrays or `OfStack`.
        x: [B, S, D].
        expert_ids: [B, S, k].
        weights: [B, S, k] float32.
        beside: [B, S, D], which is added; its computation can stand between the beginning and the end of an exchange.
        travel: what is known of all that travels.

    Returns:
        [B, S, D] in x's dtype, laid out as x.
    """
    exchanged = EXPERT in used_axes(rows)
    local = partial(_exchange, travel=travel, mesh=mesh) if exchanged else _own_share
    specs = expert_specs(matrices, rules, mesh)
    tokens = PartitionSpec(*rows, *(None,) * (3 - len(rows)))

    def one_device(
        matrices: Any, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, beside: jax.Array | None
    ) -> jax.Array:
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        matrices = owned_experts(matrices, specs, x.dtype, travel.matrices)
        experts, split = matrices[0].shape[0] * mesh.shape[EXPERT], mesh.shape[TENSOR] > 1
        added = None if split or beside is None else flat(beside)
        out = local(apply, matrices, flat(x), flat(expert_ids), flat(weights), added, experts=experts)
        out = out.reshape(x.shape)
        if not split:
            return out
        out = jax.lax.psum(out, TENSOR)
        return out if beside is None else out + beside

    return jax.shard_map(
        one_device, mesh=mesh, in_specs=(specs, tokens, tokens, tokens, tokens), out_specs=tokens, check_vma=False
    )(matrices, x, expert_ids, weights, beside)


def _own_share(
    apply: ExpertFunction,
    matrices: Any,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    beside: jax.Array | None,
    experts: int,
) -> jax.Array:
    """Tokens are on every owner: each computes its experts and the sum over owners is the result."""
    del experts
    own = matrices[0].shape[0]
    local = expert_ids - jax.lax.axis_index(EXPERT) * own
    local = jnp.where((local >= 0) & (local < own), local, own)
    out = jax.lax.psum(apply(matrices, x, local, weights).astype(jnp.float32), EXPERT).astype(x.dtype)
    return out if beside is None else out + beside


def _exchange(
    apply: ExpertFunction,
    matrices: Any,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    beside: jax.Array | None,
    experts: int,
    travel: Travel,
    mesh: Mesh,
) -> jax.Array:
    """Tokens are spread over the owners too: send, compute, send back, until every pair has been there."""
    (tokens, k), owners = expert_ids.shape, mesh.shape[EXPERT]
    plan = plan_dispatch(tokens, k, experts, owners, travel.headroom)
    round_ = partial(_round, plan, apply, tile_of(travel.tokens))
    places = _places(expert_ids // plan.experts, owners)
    out = round_(matrices, x, expert_ids, weights, places, jnp.int32(0))
    if beside is not None:  # before further rounds: the first use of what an exchange brings back waits for it
        out = out + beside.astype(jnp.float32)
    if plan.rounds == 1:
        return out.astype(x.dtype)
    # The largest load anywhere decides, so that all devices run the same rounds.
    needed = jax.lax.pmax(-(-places.load.max() // plan.capacity), mesh.axis_names)

    @jax.checkpoint
    def late_round(number: jax.Array, total: jax.Array, x: jax.Array, weights: jax.Array, matrices: Any) -> jax.Array:
        late = lambda: round_(matrices, x, expert_ids, weights, places, number)  # noqa: E731
        return total + jax.lax.cond(number < needed, late, lambda: jnp.zeros_like(total))

    def all_late(total: jax.Array) -> jax.Array:
        step = lambda total, number: (late_round(number, total, x, weights, matrices), None)  # noqa: E731
        return jax.lax.scan(step, total, jnp.arange(1, plan.rounds))[0]

    return jax.lax.cond(needed > 1, all_late, lambda total: total, out).astype(x.dtype)


def _places(owner: jax.Array, owners: int) -> Places:
    """Rank of every pair among the pairs of the same owner, in order of token: no sort, one cumulative count."""
    flat = owner.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    bounds = jnp.searchsorted(flat[order], jnp.arange(owners + 1), side="left").astype(jnp.int32)
    rank = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    return Places(owner, (rank - bounds[flat]).reshape(owner.shape), jnp.diff(bounds))


def _round(
    plan: Dispatch,
    apply: ExpertFunction,
    tile: Tile | None,
    matrices: Any,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    places: Places,
    number: jax.Array,
) -> jax.Array:
    """One there-and-back of the pairs ranked within this round: [N, D] float32, zero for tokens without such pairs.

    Tokens go there in FP8 if it holds them, with a scale for every `tile`.
    """
    slot = places.rank - number * plan.capacity
    here = (slot >= 0) & (slot < plan.capacity)
    size = plan.owners * plan.capacity
    row = jnp.where(here, places.owner * plan.capacity + slot, size)  # [N, k]
    k = row.shape[1]
    pair_of = jnp.full(size, row.size, jnp.int32).at[row.reshape(-1)].set(jnp.arange(row.size), mode="drop")
    ids = (expert_ids % plan.experts).reshape(-1).at[pair_of].get(mode="fill", fill_value=plan.experts)
    sends = jnp.clip(places.load - number * plan.capacity, 0, plan.capacity)
    gets = all_to_all(sends, plan.owners)
    got: Any = travel_rows(_to_rows(x, row, pair_of // k), sends, gets, tile)
    got_ids = all_to_all(ids, plan.owners)
    got_weights = all_to_all(_to_rows(weights.reshape(-1, 1), row.reshape(-1, 1), pair_of), plan.owners)
    done = apply(matrices, got, got_ids[:, None], got_weights)
    return _from_rows(travel_rows(done, gets, sends, None), row, pair_of // k)


@jax.custom_vjp
def _to_rows(x: jax.Array, row: jax.Array, source: jax.Array) -> jax.Array:
    """x [N, ..] -> [R, ..]: row r holds x[source[r]], zero where it has none. Its gradient is a gather as well."""
    return x.at[source].get(mode="fill", fill_value=0)


def _to_rows_fwd(x: jax.Array, row: jax.Array, source: jax.Array):
    return _to_rows(x, row, source), (row, source)


def _to_rows_bwd(saved, d_rows: jax.Array):
    row, source = saved
    return _from_rows(d_rows, row, source).astype(d_rows.dtype), None, None


_to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)


@jax.custom_vjp
def _from_rows(rows: jax.Array, row: jax.Array, source: jax.Array) -> jax.Array:
    """The sum of each token's rows: [R, ..], row [N, k] -> [N, ..] float32, in order of k; rows beyond R count zero."""
    return rows.at[row].get(mode="fill", fill_value=0).astype(jnp.float32).sum(1)


def _from_rows_fwd(rows: jax.Array, row: jax.Array, source: jax.Array):
    return _from_rows(rows, row, source), (jnp.zeros((), rows.dtype), row, source)


def _from_rows_bwd(saved, d_tokens: jax.Array):
    like, row, source = saved
    return _to_rows(d_tokens.astype(like.dtype), row, source), None, None


_from_rows.defvjp(_from_rows_fwd, _from_rows_bwd)
