"""Grouped matmul, spread and collect against one product per (token, expert) pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import pack

from dsv4_jax.kernels.chunks import materialise
from dsv4_jax.kernels.grouped_matmul import OfStack, collect, grouped_matmul, make_groups, reference, spread

pytestmark = pytest.mark.optimized

property_test = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def random_ids(rng, tokens, k, experts):
    return np.argsort(rng.random((tokens, experts)), -1)[:, :k].astype(np.int32)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(k=st.integers(1, 3), experts=st.integers(3, 9), tile=st.sampled_from([1, 3, 8, 64]), seed=st.integers(0, 99),
       skew=st.booleans())  # fmt: skip
def test_every_pair_has_its_own_row_in_a_tile_of_its_expert(k, experts, tile, seed, skew):
    rng = np.random.default_rng(seed)
    ids = np.full((17, k), experts - 1, np.int32) if skew else random_ids(rng, 17, k, experts)
    groups = jax.device_get(jax.jit(make_groups, static_argnums=(1, 2))(ids, experts, tile))
    rows = groups.row_of.ravel()
    assert len(set(rows)) == ids.size
    np.testing.assert_array_equal(groups.expert_of_tile[rows // tile], ids.ravel())
    np.testing.assert_array_equal(groups.pair_of[rows], np.arange(ids.size))
    assert (np.delete(groups.pair_of, rows) == ids.size).all()
    assert groups.tiles_used == sum(-(-count // tile) for count in np.bincount(ids.ravel()))
    assert rows.max() < groups.tiles_used * tile


def layer_by_hand(x, weights, ids, d_out):
    """sum over a token's experts of x W_e, and its gradients, float64."""
    out, d_x, d_w = np.zeros((len(x), weights.shape[2])), np.zeros_like(x), np.zeros_like(weights)
    for token, experts in enumerate(ids):
        for e in experts:
            out[token] += x[token] @ weights[e]
            d_x[token] += weights[e] @ d_out[token]
            d_w[e] += np.outer(x[token], d_out[token])
    return out, d_x, d_w


def check(ids, experts, tile, matmul=grouped_matmul, seed=0):
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(len(ids), 6)), rng.normal(size=(experts, 6, 5))
    d_out = rng.normal(size=(len(ids), 5))

    def run(x, weights, d_out, ids):
        groups = make_groups(ids, experts, tile)
        out, pull = jax.vjp(lambda x, w: collect(matmul(spread(x, groups), w, groups), groups), x, weights)
        return out, *pull(d_out)

    ours = jax.jit(run)(*(jnp.asarray(a, jnp.float32) for a in (x, weights, d_out)), jnp.asarray(ids))
    for a, b in zip(ours, layer_by_hand(x, weights, ids, d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@property_test
@given(tokens=st.integers(1, 20), k=st.integers(1, 3), experts=st.integers(3, 7), tile=st.sampled_from([1, 4, 32]),
       seed=st.integers(0, 99))  # fmt: skip
def test_value_and_gradients(tokens, k, experts, tile, seed):
    check(random_ids(np.random.default_rng(seed), tokens, k, experts), experts, tile, seed=seed)


@pytest.mark.parametrize("matmul", [grouped_matmul, reference.grouped_matmul])
@pytest.mark.parametrize("ids", [np.full((13, 1), 4), np.full((13, 1), 0), np.tile([1, 3], (13, 1))])
def test_empty_experts_and_all_tokens_on_one(matmul, ids):
    check(ids.astype(np.int32), 5, 4, matmul)


def test_gradients_of_rows_and_weights_equal_autodiff_of_the_reference():
    rng = np.random.default_rng(1)
    groups = make_groups(jnp.asarray(random_ids(rng, 11, 2, 6)), 6, 4)
    x, weights = (
        jnp.asarray(rng.normal(size=(11, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(6, 3, 5)), jnp.float32),
    )
    used = jnp.arange(groups.pair_of.shape[0])[:, None] < groups.tiles_used * groups.tile
    loss = lambda matmul: lambda rows, w: jnp.sum(jnp.where(used, jnp.sin(matmul(rows, w, groups)), 0))  # noqa: E731
    rows = spread(x, groups)
    ours, theirs = (jax.grad(loss(m), (0, 1))(rows, weights) for m in (grouped_matmul, reference.grouped_matmul))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [None, "fp8", "fp4"])
def test_experts_in_their_stack_give_what_the_layers_own_give(format):
    """To the bit, for every layer and for experts by number too."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(3, 4, 128, 128)), jnp.float32)
    stack = weights if format is None else pack(weights, format)
    ids = jnp.asarray(random_ids(rng, 9, 2, 4))
    x = jnp.asarray(rng.normal(size=(9, 128)), jnp.float32)

    @jax.jit
    def run(experts):
        groups = make_groups(ids, 4, 8)
        return collect(grouped_matmul(spread(x, groups), experts, groups), groups), experts[jnp.int32(2)].astype(
            x.dtype
        )

    for layer in range(3):
        held = OfStack(stack, jnp.int32(layer))
        assert len(held) == 4 and held[...] is held
        jax.tree.map(np.testing.assert_array_equal, run(held), run(stack[layer]))


def test_materialise_is_the_identity_not_a_number_included():
    for first in (1.0, np.nan):
        x = np.array([[first, np.inf], [-0.0, np.nan]], np.float32)
        np.testing.assert_array_equal(jax.jit(materialise)(x), x)
