"""One training step: what moves, by how much, and that microbatches are a matter of memory only."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_params

from dsv4_jax import weights
from dsv4_jax.analysis.count import count_parameters
from dsv4_jax.config import CSA, HCA, SLIDING
from train import flops
from train.flops import mean_visible, training_flops_per_token
from train.losses import OBJECTIVES, LossWeights
from train.optimizer import OptimizerConfig
from train.schedule import warmup_constant_cosine
from train.state import TrainState, move_router_biases
from train.step import Precision, StepPlan, batch_gradients, make_train_step

FACTS = weights.facts(TINY)
PLAN = StepPlan(
    TINY,
    warmup_constant_cosine(1e-2, 1e-3, 0, 5, 10),
    decay_start=5,
    optimizer=OptimizerConfig(clip_norm=1.0),
    weights=LossWeights(balance=0.1),
)


def a_batch(rows=4, length=24):
    rng = np.random.default_rng(1)
    segments = np.ones((rows, length), np.int32)
    segments[1, 9:], segments[2, 20:], segments[3, 5:11] = 2, 0, 3  # microbatches with unequal numbers of targets
    tokens = rng.integers(0, TINY.vocab_size, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments)}


def state_of(params, step=0):
    state = PLAN.init(0)
    return TrainState(jnp.asarray(step, jnp.int32), params, state.optimizer, state.key)


@pytest.fixture(scope="module")
def steps():
    return {kind: make_train_step(PLAN, kind, 2 if kind == "sparse" else 1) for kind in OBJECTIVES}


def gradients(microbatches, plan=PLAN):
    run = jax.jit(partial(batch_gradients, plan, OBJECTIVES["sparse"], microbatches))
    return run(random_params(TINY), a_batch(), jnp.float32(0.3))


@pytest.fixture(scope="module")
def whole():
    return gradients(1)


def close(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = float(jnp.abs(x).max()) + 1e-6
        np.testing.assert_allclose(x, y, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_accumulated_microbatches_give_the_gradient_of_the_whole_batch(whole):
    """Normalised by the whole batch's targets, although the microbatches hold unequal numbers of them."""
    parts = gradients(4)
    close(whole[0], parts[0], 2e-5)
    close(whole[1], parts[1], 2e-5)


def test_rematerialisation_does_not_change_the_gradient(whole):
    plan = dataclasses.replace(PLAN, precision=Precision(remat="block"))
    close(whole[0], gradients(1, plan)[0], 1e-5)


def test_bfloat16_compute_gives_float32_gradients_near_those_of_float32(whole):
    got = gradients(1, dataclasses.replace(PLAN, precision=Precision(compute="bfloat16")))
    assert {x.dtype for x in jax.tree.leaves(got[0])} == {jnp.dtype("float32")}
    assert got[1]["ce"] == pytest.approx(float(whole[1]["ce"]), rel=0.02)
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(g[0])]) for g in (whole, got)]
    assert flat[0] @ flat[1] / (jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1])) > 0.95


def changed(before, after):
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    return [(path, m, f) for (path, m), f in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(FACTS), strict=True)]  # fmt: skip


def test_indexer_warmup_moves_every_indexer_parameter_and_no_other_bit(steps):
    params = random_params(TINY)
    state, metrics = steps["indexer_warmup"](state_of(params), a_batch())
    for path, moved, fact in changed(random_params(TINY), state.params):
        assert moved == (fact.role == "indexer"), path
    assert "ce" not in metrics and metrics["index_kl"] > 0 and 0 < metrics["index_recall"] <= 1


def test_a_sparse_step_moves_all_but_the_hash_tables_and_biases_by_their_speed(steps):
    state, metrics = steps["sparse"](state_of(random_params(TINY)), a_batch())
    old = random_params(TINY)
    for path, moved, fact in changed(old, state.params):
        assert moved or fact.optimizer == "none", path
    np.testing.assert_array_equal(old["segments"]["0"]["0"]["ffn"]["gate"]["tid2eid"],
                                  state.params["segments"]["0"]["0"]["ffn"]["gate"]["tid2eid"])  # fmt: skip
    step = state.params["mtp"]["0"]["block"]["ffn"]["gate"]["bias"] - old["mtp"]["0"]["block"]["ffn"]["gate"]["bias"]
    np.testing.assert_allclose(np.unique(np.round(np.abs(step), 6)), [0.001], atol=1e-6)
    assert int(state.step) == 1 and "index_recall" not in metrics
    assert all(np.isfinite(float(value)) and value.ndim == 0 for value in metrics.values())


def test_a_step_descends_and_the_mtp_weight_falls_when_the_decay_starts(steps):
    for at, weight in ((4, 0.3), (5, 0.1)):
        _, m = steps["dense"](state_of(random_params(TINY), at), a_batch())
        assert m["loss"] - m["ce"] - 0.1 * m["balance"] == pytest.approx(weight * float(m["mtp"]), rel=1e-4)
    state, first = steps["dense"](state_of(random_params(TINY)), a_batch())
    for _ in range(4):
        state, last = steps["dense"](state, a_batch())
    assert last["ce"] < first["ce"] - 0.1


def test_router_biases_move_against_the_load_of_their_own_block():
    kinds, ratios = (SLIDING, CSA, HCA, CSA, HCA, SLIDING), (0, 4, 6, 4, 6, 0)
    config = TINY.replace(num_hidden_layers=5, layer_types=kinds, compress_ratios=ratios)
    params = random_params(config)
    load = np.random.default_rng(0).integers(0, 9, (6, config.n_routed_experts)).astype(np.float32)
    new = move_router_biases(config, params, jnp.asarray(load), 0.001)
    expected = 0.001 * np.sign(load.mean(1, keepdims=True) - load)
    bias = lambda p, s, u: p["segments"][s][u]["ffn"]["gate"]["bias"]  # noqa: E731
    assert bias(params, "1", "0").shape[0] == 2  # (CSA, HCA) twice
    for unit, rows in (("0", [1, 3]), ("1", [2, 4])):
        np.testing.assert_allclose(bias(new, "1", unit) - bias(params, "1", unit), expected[rows], atol=1e-7)
    mtp = [p["mtp"]["0"]["block"]["ffn"]["gate"]["bias"] for p in (params, new)]
    np.testing.assert_allclose(mtp[1] - mtp[0], expected[5], atol=1e-7)


def test_balancing_evens_out_a_skewed_router():
    """Mistake 20 of the field notes: a router bias that is switched off."""
    rng = np.random.default_rng(0)
    affinity = rng.normal(size=(512, TINY.n_routed_experts)) + np.linspace(0, 2, TINY.n_routed_experts)
    params = random_params(TINY)
    params["mtp"]["0"]["block"]["ffn"]["gate"]["bias"] *= 0
    loads = []
    for _ in range(300):
        bias = np.asarray(params["mtp"]["0"]["block"]["ffn"]["gate"]["bias"])
        chosen = np.argsort(affinity + bias, axis=1)[:, -TINY.num_experts_per_tok :]
        loads.append(np.bincount(chosen.ravel(), minlength=TINY.n_routed_experts).astype(np.float32))
        params = move_router_biases(TINY, params, jnp.asarray([loads[-1] * 0] * 3 + [loads[-1]]), 0.01)
    assert loads[0].max() / loads[0].mean() > 1.5 and loads[-1].max() / loads[-1].mean() < 1.1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="4 rows cannot be cut into 3 microbatches"):
        jax.eval_shape(partial(batch_gradients, PLAN, OBJECTIVES["dense"], 3), random_params(TINY), a_batch(), 0.3)


def test_flops_of_matrices_are_two_per_activated_matrix_element(monkeypatch):
    """Without attention: against the parameter counts of `analysis`, less what is no matrix."""
    monkeypatch.setattr(flops, "mean_visible", lambda *_: 0)
    config = TINY.replace(num_nextn_predict_layers=0)
    small = {"embedding", "norms"}
    counted = sum(part.activated for part in count_parameters(config) if part.name not in small)
    vectors = sum(
        x.size
        for path, x in _shapes(config)
        if path.endswith(("ape", "bias", "attn_sink", "base", "scale")) or ("compressor" in path and "norm" in path)
    )
    forward = training_flops_per_token(config, 64, "sparse") / 3
    assert forward == pytest.approx(2 * (counted - vectors), rel=1e-9)


def _shapes(config):
    tree = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def test_flops_of_attention_count_what_each_query_sees():
    for length, ratio, limit in ((41, 1, 5), (41, 4, 41), (41, 4, 3), (64, 6, 2), (3, 4, 9)):
        brute = np.mean([min(len(range(ratio - 1, t + 1, ratio)), limit) for t in range(length)])
        assert mean_visible(length, ratio, limit) == pytest.approx(brute)
    longer = training_flops_per_token(TINY, 400, "dense") - training_flops_per_token(TINY, 200, "dense")
    heads = 4 * TINY.num_attention_heads * TINY.head_dim
    seen = lambda n: sum(min(t + 1, 5) * 4 + (t + 1) // 4 + (t + 1) // 6 for t in range(n)) / n  # noqa: E731
    assert longer == pytest.approx(3 * heads * (seen(400) - seen(200)))
