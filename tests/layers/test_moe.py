"""Routing, experts and balance against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TINY, check_gradients

from dsv4_jax.layers.experts import Matrices, apply_experts
from dsv4_jax.layers.moe import MoE, Routing, adapt_sharpness, balance_record, hash_table, shares, sqrt_softplus

RNG = np.random.default_rng(0)


def random_values(routing):
    c, draw = TINY, lambda *shape: RNG.normal(size=shape) / shape[-2] ** 0.5
    expert = lambda *stack: {  # noqa: E731
        "w1": draw(*stack, c.hidden_size, c.moe_intermediate_size),
        "w2": draw(*stack, c.moe_intermediate_size, c.hidden_size),
        "w3": draw(*stack, c.hidden_size, c.moe_intermediate_size),
    }
    gate = {"weight": draw(c.hidden_size, c.n_routed_experts)}
    if routing == "moe":
        gate["bias"] = np.asarray(0.2 * RNG.normal(size=c.n_routed_experts), np.float32)
    else:
        gate["tid2eid"] = np.argsort(RNG.random((c.vocab_size, c.n_routed_experts)), -1)[:, :2].astype(np.int32)
    return {"gate": gate, "experts": expert(c.n_routed_experts), "shared_experts": expert()}


@pytest.mark.parametrize("routing", ["moe", "hash_moe"])
def test_value_and_gradients_equal_a_loop_over_tokens_and_experts(routing):
    values, tokens = random_values(routing), RNG.integers(0, TINY.vocab_size, 15)
    graph, state = nnx.split(MoE(TINY, routing, nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(values)
    moving = [i for i, leaf in enumerate(leaves) if leaf.dtype == np.float64]

    def rebuilt(changed):
        full = list(leaves)
        for i, value in zip(moving, changed, strict=True):
            full[i] = value
        return jax.tree.unflatten(tree, full)

    def ours(x, *changed):
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, jax.tree.map(jnp.asarray, rebuilt(changed)))
        return nnx.merge(graph, filled)(x, jnp.asarray(tokens)[None], jnp.ones((1, 15), bool))[0]

    stated = lambda x, *changed: oracle.moe(x[0], rebuilt(changed), TINY, tokens)[0][None]  # noqa: E731
    # 0.7 keeps most pre-activations away from the clamp's corner at 1, where central differences mean nothing.
    check_gradients(ours, stated, (0.7 * RNG.normal(size=(1, 15, 32)), *(leaves[i] for i in moving)), tolerance=5e-4)


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 70), experts=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_a_tile_goes_through_all_three_products_as_it_does_through_one_after_the_other(tokens, experts, k, dtype, seed):
    """What a CPU does alone and when it is differentiated: tiles of other sizes, 1e-6 of the largest, 2e-2 in BF16."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    matrices = Matrices(draw(experts, 16, 24), draw(experts, 16, 24), draw(experts, 24, 16))
    x, weights = draw(tokens, 16), jnp.abs(draw(tokens, k)).astype(jnp.float32)
    ids = jnp.asarray(rng.integers(0, experts + 1, (tokens, k)), jnp.int32)  # `experts` means none
    apply = lambda x: apply_experts(10.0, matrices, x, ids, weights)  # noqa: E731
    alone = apply(x)
    differentiated, backward = jax.vjp(apply, x)
    largest = max(float(jnp.abs(differentiated).max()), 1e-3)
    tolerance = (1e-6 if dtype == "float32" else 2e-2) * largest
    np.testing.assert_allclose(*(np.asarray(y, float) for y in (alone, differentiated)), rtol=0, atol=tolerance)
    assert alone.dtype == differentiated.dtype == backward(differentiated)[0].dtype == dtype


def test_the_bias_chooses_but_does_not_weigh():
    moe = MoE(TINY, "moe", nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(20, 32)), jnp.float32)
    before = moe.gate(x, jnp.zeros(20, jnp.int32))
    moe.gate.bias[...] = jnp.zeros(6).at[2].set(10.0)
    after = moe.gate(x, jnp.zeros(20, jnp.int32))
    assert (after.expert_ids == 2).any(-1).all()
    np.testing.assert_array_equal(after.scores, before.scores)
    chosen = np.take_along_axis(np.asarray(after.scores), np.asarray(after.expert_ids), 1)
    expected = chosen / chosen.sum(1, keepdims=True) * TINY.routed_scaling_factor
    np.testing.assert_allclose(after.weights, expected, rtol=1e-6)


def test_sqrt_softplus_and_its_gradient_where_softplus_underflows():
    x = np.array([-1000, -300, -150, -104, -88, -50, -20.01, -20, -19.99, -1, 0, 1, 20, 100, 1000], np.float32)
    value, gradient = jax.vmap(jax.value_and_grad(sqrt_softplus))(jnp.asarray(x))
    double = x.astype(np.float64)
    root = np.sqrt(np.logaddexp(0, double))
    with np.errstate(over="ignore"):
        slope = np.where(
            double < -700, np.exp(double / 2) / 2, 1 / (1 + np.exp(-double)) / (2 * np.maximum(root, 1e-300))
        )
    np.testing.assert_allclose(value, root, rtol=1e-5, atol=1e-38)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("shift", [0, -60, -150])
def test_routing_weights_and_their_gradient_where_scores_nearly_underflow(shift):
    logits, cotangent = RNG.normal(size=(5, 4)) + shift, RNG.normal(size=(5, 4))
    single = np.asarray(logits, np.float32)
    root = np.exp(np.log(np.logaddexp(0, single.astype(np.float64))) / 2)
    p = root / root.sum(-1, keepdims=True)
    log_slope = 1 / (1 + np.exp(-single.astype(np.float64))) / (2 * root**2)  # d log root / d logit
    expected = p * (cotangent - (p * cotangent).sum(-1, keepdims=True)) * log_slope
    ours = jax.grad(lambda x: (shares(sqrt_softplus(x)) * cotangent).sum())(jnp.asarray(single))
    np.testing.assert_allclose(shares(sqrt_softplus(jnp.asarray(single))), p, rtol=1e-4)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)


def test_shares_of_nothing_are_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: shares(sqrt_softplus(x)).sum())(jnp.full((1, 4), -1000.0))
    assert value == 0
    assert np.isfinite(gradient).all()


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(k=st.integers(1, 6), vocab=st.integers(10, 60), seed=st.integers(0, 9))
def test_hash_tables_have_distinct_experts_and_equal_loads(k, vocab, seed):
    config = TINY.replace(num_experts_per_tok=k, vocab_size=vocab)
    table = np.asarray(jax.jit(hash_table, static_argnums=1)(jax.random.key(seed), config))
    assert table.shape == (vocab, k)
    assert table.min() >= 0 and table.max() < 6
    assert all(len(set(row)) == k for row in table)
    load = np.bincount(table.ravel(), minlength=6)
    assert load.max() - load.min() <= 1


def test_adaptive_temperature_sharpens_the_confident_and_flattens_the_ambiguous():
    scores = np.array([[5.0, 0.1, 0.1, 0.1], [1.0, 0.9, 0.8, 0.95]])
    adapted = np.asarray(adapt_sharpness(jnp.asarray(scores, jnp.float32), 1.0), np.float64)
    p = scores / scores.sum(-1, keepdims=True)
    uncertainty = -(p * np.log(p)).sum(-1, keepdims=True) / np.log(4)
    np.testing.assert_allclose(adapted, scores ** np.exp(1.0 - 2 * uncertainty), rtol=1e-5)
    peak = lambda scores: scores.max(-1) / scores.sum(-1)  # noqa: E731
    assert peak(adapted)[0] > peak(scores)[0]
    assert peak(adapted)[1] < peak(scores)[1]
    np.testing.assert_array_equal(np.argsort(adapted), np.argsort(scores))
    np.testing.assert_allclose(adapt_sharpness(jnp.asarray(scores, jnp.float32), 0.0), scores, rtol=1e-6)


def test_adaptive_temperature_has_a_finite_gradient_at_zero_scores():
    gradient = jax.grad(lambda s: adapt_sharpness(s, 1.0).sum())(jnp.asarray([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert np.isfinite(gradient).all()


def test_balance_loss_and_load_of_the_counted_tokens():
    ids, scores = RNG.integers(0, 6, (3, 9, 2)), RNG.uniform(0.1, 2, (3, 9, 6))
    lengths = (9, 4, 1)
    counted = np.arange(9) < np.array(lengths)[:, None]

    def stated(scores):
        rows = zip(ids, scores, lengths, strict=True)
        return np.mean([oracle.balance_loss(i[:n], s[:n], 2) for i, s, n in rows])

    record = lambda scores: balance_record(  # noqa: E731
        Routing(jnp.asarray(ids), None, scores), jnp.asarray(counted)
    )
    check_gradients(lambda scores: record(scores)["balance"], stated, (scores,))
    load = record(jnp.asarray(scores))["load"]
    np.testing.assert_array_equal(load, np.bincount(ids[counted].ravel(), minlength=6))


def test_a_balanced_router_has_a_balance_loss_of_one():
    ids = jnp.arange(12).reshape(6, 2) % 6
    record = balance_record(Routing(ids[None], None, jnp.ones((1, 6, 6))), jnp.ones((1, 6), bool))
    np.testing.assert_allclose(record["balance"], 1.0, rtol=1e-6)
