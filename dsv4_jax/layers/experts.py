"""SwiGLU experts on the tokens that chose them: three matrix products for every (token, expert) pair."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul import Groups, collect, grouped_matmul, make_groups, spread
from dsv4_jax.kernels.platforms import compiled_for
from dsv4_jax.layers.norm import dense
from dsv4_jax.quantization.policy import NONE, Policy


class Matrices(NamedTuple):
    """Experts: w1 (gate) and w3 (up) [E, D, I], w2 (down) [E, I, D]."""

    w1: jax.Array
    w3: jax.Array
    w2: jax.Array


def apply_experts(
    limit: float,
    experts: Matrices,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    policy: Policy = NONE,
) -> jax.Array:
    """The weighted sum of each token's experts, accumulated in float32.

    Args:
        limit: clamp of SwiGLU.
        experts: the matrices.
        x: [N, D].
        expert_ids: [N, k]; E, the number of experts, means none.
        weights: [N, k] float32. They multiply the hidden activation, before w2, as in the release.
        policy: rounds the hidden activation; x comes rounded.

    Returns:
        [N, D] in x's dtype.
    """
    count = len(experts.w1)
    if expert_ids.size <= count // 2:
        return _pair_by_pair(limit, experts, x, expert_ids, weights, policy)
    if compiled_for() == "cpu":
        return _tile_by_tile(limit, policy, experts, x, expert_ids, weights)
    return _product_by_product(limit, policy, experts, x, expert_ids, weights)


def _product_by_product(
    limit: float, policy: Policy, experts: Matrices, x: jax.Array, expert_ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """`apply_experts` as one grouped product after the other."""
    count = len(experts.w1)
    groups = make_groups(expert_ids, count, tile_rows(expert_ids.size, count))
    hidden = policy("expert_input", hidden_rows(limit, experts, x, weights, groups))
    return collect(grouped_matmul(hidden, experts.w2, groups), groups)


def hidden_rows(limit: float, experts: Matrices, x: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """Weighted hidden activations [R, I] of the pairs that `groups` lays out; see `apply_experts`."""
    rows = spread(x, groups)
    gate, up = grouped_matmul(rows, experts.w1, groups), grouped_matmul(rows, experts.w3, groups)
    row_weights = spread_weights(weights, groups.row_of, groups.pair_of)
    return _hidden(limit, gate, up, row_weights)


def _hidden(limit: float, gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
    """Hidden activations [R, I], each row with its weight, in gate's dtype."""
    return (swiglu(gate, up, limit).astype(jnp.float32) * weights[:, None]).astype(gate.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tile_by_tile(
    limit: float, policy: Policy, experts: Matrices, x: jax.Array, expert_ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """`apply_experts` on a CPU: a tile goes through all three products while it is in the processor's cache.

    Differentiated it is `_product_by_product`, which keeps what its gradients need.
    """
    count, k = len(experts.w1), expert_ids.shape[1]
    tile = tile_rows(expert_ids.size, count, least=4)
    groups = make_groups(expert_ids, count, tile)
    pairs = groups.pair_of.reshape(-1, tile)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        pair, expert = pairs[i], groups.expert_of_tile[i]
        rows = x.at[pair // k].get(mode="fill", fill_value=0)
        weight = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)
        hidden = _hidden(limit, dense(rows, experts.w1[expert]), dense(rows, experts.w3[expert]), weight)
        done = dense(policy("expert_input", hidden), experts.w2[expert])
        return jax.lax.dynamic_update_slice(out, done, (i * tile, 0))

    out = jnp.zeros((pairs.size, x.shape[1]), x.dtype)
    return collect(jax.lax.fori_loop(0, groups.tiles_used, one, out), groups)


def _tile_by_tile_fwd(limit: float, policy: Policy, *operands: Any):
    return jax.vjp(partial(_product_by_product, limit, policy), *operands)


def _tile_by_tile_bwd(limit: float, policy: Policy, backward: Any, d_out: jax.Array):
    del limit, policy
    return backward(d_out)


_tile_by_tile.defvjp(_tile_by_tile_fwd, _tile_by_tile_bwd)


def _pair_by_pair(
    limit: float, experts: Matrices, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, policy: Policy
) -> jax.Array:
    """`apply_experts` for so few pairs that hardly two meet in an expert: decoding. Nothing is sorted or padded.

    A step reads each matrix once and multiplies it with one row while it is still in the processor's cache.
    """
    count, k = len(experts.w1), expert_ids.shape[1]

    def one(_: None, pair: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        token, expert, weight = pair
        row = x[token][None]
        weight = jnp.where(expert < count, weight, 0)
        hidden = _hidden(limit, dense(row, experts.w1[expert]), dense(row, experts.w3[expert]), weight[None])
        return None, dense(policy("expert_input", hidden), experts.w2[expert])[0]

    tokens = jnp.arange(expert_ids.size, dtype=jnp.int32) // k
    rows = jax.lax.scan(one, None, (tokens, expert_ids.reshape(-1), weights.reshape(-1)))[1]
    return rows.reshape(-1, k, x.shape[1]).astype(jnp.float32).sum(1).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """`silu(min(gate, L)) * clip(up, -L, L)` in float32, returned in gate's dtype; L = 0 means no limit."""
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    if limit:
        g, u = jnp.minimum(g, limit), jnp.clip(u, -limit, limit)
    return (jax.nn.silu(g) * u).astype(gate.dtype)


def tile_rows(pairs: int, experts: int, least: int = 8) -> int:
    """Rows per tile: about half an expert's share, at most 128, so that padding stays small against the work."""
    share = max(pairs // experts, 1)
    return min(max(1 << (share.bit_length() - 1), least), 128)


@jax.custom_vjp
def spread_weights(weights: jax.Array, row_of: jax.Array, pair_of: jax.Array) -> jax.Array:
    """weights [N, k] -> one weight per row [R], zero for padding; its gradient is a gather."""
    return weights.reshape(-1).at[pair_of].get(mode="fill", fill_value=0)


def _spread_weights_fwd(weights: jax.Array, row_of: jax.Array, pair_of: jax.Array):
    return spread_weights(weights, row_of, pair_of), row_of


def _spread_weights_bwd(row_of: jax.Array, d_rows: jax.Array):
    return d_rows.at[row_of].get(mode="fill", fill_value=0), None, None


spread_weights.defvjp(_spread_weights_fwd, _spread_weights_bwd)
