"""The optimizer against float64 statements of its algorithms and of the singular value decomposition."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv4_jax.facts import Fact
from train import newton_schulz
from train.optimizer import OptimizerConfig, at_step, make_optimizer, orthogonalize, update_rms

FACTS = {
    "embed": Fact(("vocab", "embed"), "adamw", "embed"),
    "layers": {
        "experts": Fact(("layers", "experts", "embed", "mlp"), "muon", "experts"),
        "wide": Fact(("layers", "embed", "mlp"), "muon", "attn"),
        "tall": Fact(("layers", "mlp", "embed"), "muon", "indexer"),
        "norm": Fact(("layers", "embed"), "adamw", "norm"),
        "ape": Fact(("layers", "window", "embed"), "adamw", "indexer"),
    },
}
SHAPES = {
    "embed": (11, 8),
    "layers": {"experts": (2, 3, 8, 6), "wide": (2, 8, 12), "tall": (2, 12, 8), "norm": (2, 8), "ape": (2, 4, 8)},
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tree(seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def newton_schulz_by_hand(x: np.ndarray) -> np.ndarray:
    """Algorithm 1's ten iterations on one matrix, in float64, from its text."""
    x = x / np.linalg.norm(x) if x.any() else x
    for i in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if i < 8 else (2.0, -1.5, 0.5)
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def each_matrix(f, x: np.ndarray) -> np.ndarray:
    return np.stack([f(m) for m in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape)


def muon_by_hand(w, gradients, rate, decay=0.1):
    """Algorithm 1 in float64 on a stack of matrices."""
    momentum = np.zeros_like(w)
    for g in gradients:
        momentum = 0.95 * momentum + g
        o = each_matrix(newton_schulz_by_hand, 0.95 * momentum + g) * 0.18 * math.sqrt(max(w.shape[-2:]))
        w = w * (1 - rate * decay) - rate * o
    return w


def adamw_by_hand(w, gradients, rate, decay=0.1):
    """AdamW with betas 0.9 and 0.95 and eps 1e-20, in float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-20)
        w = w * (1 - rate * decay) - rate * step
    return w


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def run(optimizer, params, gradients, jit: bool = True):
    """Parameters after one update for each gradient, the last update and the state."""
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state, updates = optimizer.init(params), None
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (1, 16), (16, 1)])
def test_singular_values_come_near_one_and_directions_are_those_of_the_svd(shape):
    # A matrix of condition number 20 with known singular vectors.
    u, _, vt = np.linalg.svd(normal(0, *shape), full_matrices=False)
    x = (u * np.geomspace(0.05, 1, min(shape))) @ vt
    y = float64(orthogonalize(jnp.asarray(x, jnp.float32)))
    values = np.linalg.svd(y, compute_uv=False)
    assert 0.998 < values.min() and values.max() < 1.002
    np.testing.assert_allclose(y, u @ vt, atol=2e-3)
    # The same singular vectors: U^T Y V is diagonal.
    inside = u.T @ y @ vt.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-5)


def test_random_matrices_come_near_the_orthogonal_factor_of_their_svd():
    x = normal(1, 4, 48, 64)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    y = float64(orthogonalize(jnp.asarray(x, jnp.float32)))
    values = np.linalg.svd(y, compute_uv=False)
    assert 0.998 < values.min() and values.max() < 1.002
    assert np.linalg.norm(y - u @ vt) < 1e-3 * np.linalg.norm(u @ vt)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 2, 16, 24), (5, 24, 16)])
def test_newton_schulz_equals_its_float64_statement(shape):
    x = normal(2, *shape)
    y = orthogonalize(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, each_matrix(newton_schulz_by_hand, x), atol=2e-5)


def test_rows_above_columns_is_the_transpose_of_columns_above_rows():
    x = jnp.asarray(normal(3, 5, 40, 24), jnp.float32)
    np.testing.assert_array_equal(orthogonalize(x), orthogonalize(x.mT).mT)


@pytest.mark.parametrize("elements", [1, 24 * 40 * 4, 2**20])
def test_stacked_layers_and_experts_equal_each_matrix_alone_whatever_the_piece(elements, monkeypatch):
    monkeypatch.setattr(newton_schulz, "PIECE_ELEMENTS_CPU", elements)
    x = jnp.asarray(normal(4, 2, 5, 24, 40), jnp.float32)
    together = orthogonalize(x)
    for layer in range(2):
        for expert in range(5):
            np.testing.assert_allclose(together[layer, expert], orthogonalize(x[layer, expert]), atol=2e-5)


@pytest.mark.parametrize("stack", [1, 5000, 2**26])
def test_parameters_orthogonalised_together_equal_each_alone(stack, monkeypatch):
    monkeypatch.setattr(newton_schulz, "STACK_ELEMENTS", stack)
    shapes = [(3, 16, 24), (24, 16), (2, 2, 16, 24), (16, 16), (5, 24, 16), (16, 24)]
    xs = [jnp.asarray(normal(i, *shape), jnp.float32) for i, shape in enumerate(shapes)]
    for x, y in zip(xs, newton_schulz.orthogonalize_all(xs), strict=True):
        np.testing.assert_allclose(y, orthogonalize(x), atol=2e-5)


def test_same_shaped_parameters_share_one_newton_schulz():
    def loops(xs):
        return str(jax.make_jaxpr(newton_schulz.orthogonalize_all)(xs)).count("length=10")

    one = [jnp.ones((3, 16, 24))]
    assert loops([jnp.ones((3, 16, 24)), jnp.ones((16, 24)), jnp.ones((24, 16)), jnp.ones((2, 24, 16))]) == loops(one)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-20, 1e20, 1e37])
def test_the_direction_does_not_depend_on_the_size_of_the_gradient(scale):
    x = normal(5, 12, 16)
    x /= np.abs(x).max()
    y = orthogonalize(jnp.asarray(x * scale, jnp.float32))
    expected = newton_schulz_by_hand(x) if scale > 1e-38 else np.zeros_like(x)  # FP32 subnormals count as zero
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_one_zero_matrix_in_a_stack_stays_zero_and_leaves_the_others_alone():
    x = normal(6, 3, 12, 16)
    x[1] = 0
    y = np.asarray(orthogonalize(jnp.asarray(x, jnp.float32)))
    assert not y[1].any()
    np.testing.assert_allclose(y[2], newton_schulz_by_hand(x[2]), atol=2e-5)


def test_bfloat16_newton_schulz_is_close_and_stable():
    x = normal(7, 3, 64, 96)
    y = float64(orthogonalize(jnp.asarray(x, jnp.float32), dtype=jnp.bfloat16))
    assert orthogonalize(jnp.asarray(x, jnp.float32), dtype=jnp.bfloat16).dtype == jnp.float32
    exact = each_matrix(newton_schulz_by_hand, x)
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    values = np.linalg.svd(y, compute_uv=False)
    assert 0.98 < values.min() and values.max() < 1.02


def test_a_bfloat16_matrix_is_orthogonalised_from_float32():
    x = jnp.asarray(normal(7, 32, 48), jnp.bfloat16)
    y = orthogonalize(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(float64(y), newton_schulz_by_hand(float64(x)), atol=4e-3)


@pytest.mark.parametrize("jit", [True, False])
def test_five_updates_equal_the_float64_statement_of_muon_and_adamw(jit):
    rate = optax.linear_schedule(1e-2, 1e-2, 1)
    gradients = [tree(10 + i) for i in range(5)]
    params = tree(1)
    after, _, _ = run(make_optimizer(FACTS, rate), params, gradients, jit)
    statements = {"muon": muon_by_hand, "adamw": adamw_by_hand}

    def check(fact, w, result, *gs):
        expected = statements[fact.optimizer](float64(w), [float64(g) for g in gs], 1e-2)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, FACTS, params, after, *gradients)


def test_the_learning_rate_schedule_is_read_at_the_step():
    rate = optax.piecewise_constant_schedule(1e-2, {1: 0.0})
    params, gradients = tree(1), [tree(2), tree(3)]
    once, _, _ = run(make_optimizer(FACTS, rate), params, gradients[:1])
    twice, updates, _ = run(make_optimizer(FACTS, rate), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_jit_changes_nothing():
    gradients = [tree(i) for i in range(3)]
    results = [run(make_optimizer(FACTS, 1e-2), tree(9), gradients, jit)[0] for jit in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)


def test_an_orthogonalised_update_has_the_rms_of_adamw():
    optimizer = make_optimizer(FACTS, 1.0, OptimizerConfig(weight_decay=0.0))
    _, updates, _ = run(optimizer, tree(1), [tree(2)])
    rms = update_rms(updates, FACTS)
    assert set(rms) == {"muon", "adamw"}
    assert float(rms["muon"]) == pytest.approx(0.18, rel=0.03)
    assert float(rms["adamw"]) == pytest.approx(1.0, rel=1e-3)  # Adam's first step is the sign of the gradient
    roles = update_rms(updates, FACTS, by="role")
    tall, ape = (float64(updates["layers"][name]) for name in ("tall", "ape"))
    together = np.concatenate([tall.ravel(), ape.ravel()])
    assert float(roles["indexer"]) == pytest.approx(np.sqrt(np.mean(together**2)), rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-20, 1e-19, 4e-19, 1.1e-18, 1e-10, 1e10])
def test_adamw_with_eps_1e_20_neither_fails_nor_explodes_in_float32(size):
    # The square of a gradient below 5e-19 is no FP32 number: such gradients count as zero, others are exact.
    facts = {"w": FACTS["layers"]["norm"]}
    params, gradient = {"w": jnp.ones((1, 1))}, {"w": jnp.full((1, 1), size, jnp.float32)}
    after, _, _ = run(make_optimizer(facts, 1e-3), params, [gradient] * 3)
    felt = size if size > 1e-18 else 0.0
    expected = adamw_by_hand(np.ones((1, 1)), [np.full((1, 1), felt)] * 3, 1e-3)
    np.testing.assert_allclose(after["w"], expected, rtol=1e-6)


def test_adamw_updates_stay_bounded_while_the_moments_of_vanished_gradients_decay():
    facts = {"w": FACTS["layers"]["norm"]}
    sizes = jnp.asarray([np.geomspace(1e-19, 1e-15, 50)], jnp.float32)
    optimizer = make_optimizer(facts, 1.0, OptimizerConfig(weight_decay=0.0))
    params, update = {"w": jnp.zeros_like(sizes)}, jax.jit(optimizer.update)
    state, largest = optimizer.init(params), 0.0
    for step in range(300):
        updates, state = update({"w": sizes if step < 5 else jnp.zeros_like(sizes)}, state, params)
        largest = max(largest, float(jnp.max(jnp.abs(updates["w"]))))
    assert largest < 1.2  # the bound of Adam with these betas


def test_a_zero_gradient_only_decays():
    params = tree(1)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = run(make_optimizer(FACTS, 1e-2), params, [zero])
    jax.tree.map(lambda w, p: np.testing.assert_allclose(w, p * (1 - 1e-3), rtol=1e-6), after, params)


def test_clipping_scales_all_gradients_by_one_global_norm():
    gradients = [jax.tree.map(lambda g: 100 * g, tree(2)), tree(3)]
    norm = [math.sqrt(sum(np.sum(float64(g) ** 2) for g in jax.tree.leaves(grads))) for grads in gradients]
    assert min(norm) > 1
    by_hand = [jax.tree.map(lambda g, n=n: g / n, grads) for grads, n in zip(gradients, norm, strict=True)]
    clipped, _, _ = run(make_optimizer(FACTS, 1e-2, OptimizerConfig(clip_norm=1.0)), tree(1), gradients)
    expected, _, _ = run(make_optimizer(FACTS, 1e-2), tree(1), by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clipped, expected)


def only_indexer(fact: Fact) -> bool:
    return fact.role.startswith("indexer")


@pytest.mark.parametrize("as_tree", [True, False])
def test_frozen_parameters_get_exactly_zero_and_the_others_train_as_if_alone(as_tree):
    trainable = jax.tree.map(only_indexer, FACTS) if as_tree else only_indexer
    config = OptimizerConfig(clip_norm=1.0)
    params, gradients = tree(1), [tree(2), tree(3)]
    poisoned = [jax.tree.map(lambda g, f: g if only_indexer(f) else g * jnp.nan, g, FACTS) for g in gradients]
    after, updates, _ = run(make_optimizer(FACTS, 1e-2, config, trainable=trainable), params, poisoned)

    def check(fact, before, result, update):
        assert only_indexer(fact) == bool(np.any(update))
        assert only_indexer(fact) or np.array_equal(before, result)

    jax.tree.map(check, FACTS, params, after, updates)
    alone = [{name: t["layers"][name] for name in ("tall", "ape")} for t in (FACTS, params, *gradients, after)]
    expected, _, _ = run(make_optimizer(alone[0], 1e-2, config), alone[1], alone[2:4])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, alone[4])


def test_a_stage_that_freezes_takes_over_the_state_and_keeps_the_frozen_moments():
    params = tree(1)
    everything = make_optimizer(FACTS, 1e-2)
    warmup = make_optimizer(FACTS, 1e-2, trainable=only_indexer)
    _, _, state = run(everything, params, [tree(2)])
    _, new = warmup.update(tree(3), state, params)
    assert jax.tree.structure(state) == jax.tree.structure(new) == jax.tree.structure(warmup.init(params))

    def moments(s):
        muon, adam = (s[2].inner_states[name].inner_state for name in ("muon", "adamw"))
        return {"muon": muon.momentum, "mu": adam.mu, "nu": adam.nu}

    before, after = moments(state), moments(new)
    for name in before:
        for (path, old), value in zip(
            jax.tree_util.tree_leaves_with_path(before[name]), jax.tree.leaves(after[name]), strict=True
        ):
            moved = any(part in jax.tree_util.keystr(path) for part in ("tall", "ape"))
            assert moved != np.array_equal(old, value)


def test_parameters_without_an_optimizer_stay():
    facts = {"w": FACTS["layers"]["wide"], "bias": Fact(("experts",), "none", "router")}
    params = {"w": jnp.ones((2, 8, 12)), "bias": jnp.ones(4)}
    after, _, _ = run(make_optimizer(facts, 1e-2), params, [params])
    np.testing.assert_array_equal(after["bias"], params["bias"])
    assert np.any(after["w"] != params["w"])


def test_bfloat16_gradients_are_summed_in_float32():
    params, gradient = tree(1), tree(2, jnp.bfloat16)
    after, updates, state = run(make_optimizer(FACTS, 1e-2), params, [gradient])
    expected, _, _ = run(make_optimizer(FACTS, 1e-2), params, [jax.tree.map(lambda g: g.astype("float32"), gradient)])
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    arrays = jax.tree.leaves((updates, state))
    assert {a.dtype for a in arrays} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_bfloat16_newton_schulz_trains_like_float32():
    config = OptimizerConfig(newton_schulz_dtype="bfloat16")
    gradients = [tree(i) for i in range(3)]
    low, _, _ = run(make_optimizer(FACTS, 1e-2, config), tree(9), gradients)
    high, _, _ = run(make_optimizer(FACTS, 1e-2, replace(config, newton_schulz_dtype="float32")), tree(9), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), low, high)


def test_orbax_saves_and_restores_the_state(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = make_optimizer(FACTS, lambda step: 1e-2 / (step + 1))
    _, _, state = run(optimizer, tree(1), [tree(2)])
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(optimizer.init, tree(1)))
    assert jax.tree.structure(state) == jax.tree.structure(restored)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_the_schedule_can_be_ahead_of_the_moments():
    """After skipped steps: the rate is that of the step, the bias correction that of the gradients seen."""
    optimizer = make_optimizer(FACTS, lambda step: 1e-2 / (step + 1))
    params, gradients, state = tree(1), tree(2), optimizer.init(tree(1))
    first, _ = optimizer.update(gradients, at_step(state, jnp.int32(0)), params)
    fourth, after = optimizer.update(gradients, at_step(state, jnp.int32(3)), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 4, rtol=1e-6), fourth, first)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    plain, _ = optimizer.update(gradients, state, params)
    jax.tree.map(np.testing.assert_array_equal, first, plain)


def test_muon_fits_a_linear_map():
    target = jnp.asarray(normal(1, 8, 12) / 4, jnp.float32)
    inputs = jnp.asarray(normal(2, 64, 8), jnp.float32)
    facts = {"w": Fact(("embed", "mlp"), "muon", "attn"), "b": Fact(("mlp",), "adamw", "attn")}
    params = {"w": jnp.zeros((8, 12)), "b": jnp.zeros(12)}
    optimizer = make_optimizer(facts, optax.cosine_decay_schedule(0.05, 150), OptimizerConfig(weight_decay=0.0))

    def loss(p):
        return jnp.mean(jnp.square(inputs @ (p["w"] - target) + p["b"] - 0.5))

    @jax.jit
    def step(p, state):
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    first, state = float(loss(params)), optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    assert float(loss(params)) < 1e-4 * first


@pytest.mark.parametrize(
    ("params", "facts", "message"),
    [
        ({"a": jnp.ones(3)}, {"a": Fact(("embed",), "muon", "attn")}, r"a has shape \(3,\): Muon needs a matrix"),
        ({"a": jnp.ones((3, 3))}, {"a": Fact(("embed",), "adamw", "attn")}, r"a has shape .* names 1 axes"),
        ({"a": jnp.ones(3, "bfloat16")}, {"a": Fact(("embed",), "adamw", "attn")}, "a is bfloat16.*float32"),
        ({"a": {"b": jnp.ones(3)}}, {"c": Fact(("embed",), "adamw", "attn")}, r"without a fact: \['a.b'\].*\['c'\]"),
    ],
)
def test_parameters_that_disagree_with_their_facts_are_named(params, facts, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(facts, 1e-2).init(params)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="trainable must have the structure of the facts"):
        make_optimizer(FACTS, 1e-2, trainable={"embed": True})
    optimizer = make_optimizer(FACTS, 1e-2)
    with pytest.raises(ValueError, match="with the parameters"):
        optimizer.update(tree(1), optimizer.init(tree(1)))
    with pytest.raises(ValueError, match=r"shape \(3,\); give it to AdamW"):
        orthogonalize(jnp.ones(3))


def test_the_size_of_a_giant_does_not_overflow():
    huge = jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32)
    found = jax.eval_shape(lambda x: update_rms({"w": x}, {"w": Fact(("embed", "mlp"), "muon", "experts")}), huge)
    assert found["muon"].shape == ()
