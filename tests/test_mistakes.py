"""Mistakes that implementations of V4 have made, one test each; the numbers are those of the field notes' table.

Those of caches, checkpoints and quantisation (7, 8, 10-13, 15-17) are tested beside these parts; 18 is in test_memory.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from support import (
    LENGTH,
    TINY,
    leaves_by_name,
    one_document,
    probe,
    random_params,
    random_tokens,
    run_oracle,
    weights_for,
)

from dsv4_jax import model, weights
from dsv4_jax.config import CSA, HCA
from dsv4_jax.kernels.indexer_topk import IndexOperands, index_loss
from dsv4_jax.kernels.streams import sinkhorn, write
from dsv4_jax.layers.hyper_connections import HyperConnection
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.layers.moe import Gate, swiglu

MODES = ("sparse", "dense")
DENSE_SLOWLY = ("sparse", pytest.param("dense", marks=pytest.mark.slow))
FACTS = jax.tree_util.tree_flatten_with_path(weights.facts(TINY))[0]
ROLES = {"/".join(key.key for key in path): fact for path, fact in FACTS}


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


def test_every_mistake_has_a_test_with_its_number():
    sources = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    named = {int(n) for source in sources for n in re.findall(r"^def test_mistake_(\d+)_", source, re.MULTILINE)}
    assert named == set(range(1, 23))


def test_mistake_1_mixing_maps_are_not_transposed():
    rng = np.random.default_rng(0)
    streams, y = rng.normal(size=(1, 7, 4, 5)), rng.normal(size=(1, 7, 5))
    post, comb = rng.uniform(size=(1, 7, 4)), rng.uniform(size=(1, 7, 4, 4))
    ours = np.asarray(write(*(jnp.asarray(x, jnp.float32) for x in (streams, y, post, comb))))
    first = oracle.hyper_write(streams[0], y[0], post[0], comb[0])
    second = oracle.hyper_write(streams[0], y[0], post[0], comb[0].swapaxes(1, 2))
    np.testing.assert_allclose(ours[0], first, rtol=0, atol=1e-6)
    assert np.abs(ours[0] - second).max() > 0.1


def test_mistake_1_columns_are_the_ones_normalised_last():
    a = np.asarray(sinkhorn(jnp.asarray(np.random.default_rng(0).normal(size=(50, 4, 4)), jnp.float32), 1, 1e-6))
    assert np.abs(a.sum(-2) - 1).max() < 1e-5  # eps over the smallest sum
    assert np.abs(a.sum(-1) - 1).max() > 0.1


def test_mistake_2_sinkhorn_has_the_released_order_eps_and_count():
    logits = 2 * np.random.default_rng(1).normal(size=(50, 4, 4))
    eps = 0.05  # large, so that a misplaced one shows
    ours = np.asarray(sinkhorn(jnp.asarray(logits, jnp.float32), 3, eps))
    np.testing.assert_allclose(ours, oracle.sinkhorn(logits, 3, eps), rtol=0, atol=1e-6)
    without_first_eps = oracle.softmax(logits)
    rows_first = np.swapaxes(oracle.sinkhorn(np.swapaxes(logits, -1, -2), 3, eps), -1, -2)
    for other in (oracle.sinkhorn(logits, 2, eps), oracle.sinkhorn(logits, 3, 0), rows_first, without_first_eps):
        assert np.abs(ours - other).max() > 1e-3


@pytest.mark.parametrize("scale", [1, 8, 40])
def test_mistake_3_sinkhorn_backward_is_finite_and_right_at_realistic_scale(scale):
    rng = np.random.default_rng(2)
    logits, weights = scale * rng.normal(size=(20, 4, 4)), rng.normal(size=(20, 4, 4))
    ours = np.asarray(jax.grad(lambda x: (sinkhorn(x, 20, 1e-6) * weights).sum())(jnp.asarray(logits, jnp.float32)))
    expected = np.zeros_like(logits)
    for i, j in np.ndindex(4, 4):  # central differences in float64
        step = np.zeros((4, 4))
        step[i, j] = 1e-5
        up, down = (oracle.sinkhorn(logits + sign * step, 20, 1e-6) for sign in (1, -1))
        expected[:, i, j] = ((up - down) * weights).sum((-1, -2)) / 2e-5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def test_mistake_3_maps_of_bfloat16_streams_are_computed_in_float32():
    site = HyperConnection(TINY, nnx.Rngs(0))
    site.scale[...] = jnp.full(3, 40.0)  # logits of some hundreds of units: softmax saturates
    rng = np.random.default_rng(2)
    streams, weights = jnp.asarray(30 * rng.normal(size=(1, 50, 3, 32)), jnp.bfloat16), rng.normal(size=(1, 50, 3, 3))
    gradient = jax.grad(lambda streams: (site(streams).comb * weights).sum())
    low, full = gradient(streams), gradient(streams.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(low), np.asarray(full.astype(jnp.bfloat16)))
    assert np.isfinite(np.asarray(full)).all() and np.asarray(full).any()


@pytest.mark.parametrize("mode", DENSE_SLOWLY)
def test_mistake_4_no_gradient_comes_from_the_future(params, mode):
    tokens = np.stack([np.random.default_rng(i).permutation(TINY.vocab_size)[:LENGTH] for i in (0, 0)]).astype(np.int32)
    rng = np.random.default_rng(3)
    for t in (0, 3, 5, *range(20, 32), LENGTH - 1):  # every residue of both ratios
        weights = np.zeros((2, LENGTH, TINY.vocab_size))
        weights[0, t] = rng.normal(size=TINY.vocab_size)
        _, gradients = probe(mode, packed=False)(params, tokens, one_document(), weights_for(2, logits=weights))
        rows = np.asarray(gradients["embed"])[tokens[0]]  # every token occurs once: one row per position
        assert not rows[t + 1 :].any()
        assert rows[: t + 1].any(-1)[max(0, t + 1 - TINY.sliding_window) :].all()


@pytest.mark.parametrize("mode", MODES)
def test_mistake_4_changing_token_t_plus_1_leaves_everything_up_to_t_bitwise_identical(params, mode):
    tokens = random_tokens(seed=5)
    run = lambda tokens: probe(mode, packed=False)(params, tokens, one_document(), weights_for(2))[0]  # noqa: E731
    before = run(tokens)
    for t in range(LENGTH - 1):
        changed = tokens.copy()
        changed[:, t + 1] = (changed[:, t + 1] + 1 + t) % TINY.vocab_size
        after = run(changed)
        np.testing.assert_array_equal(after.logits[:, : t + 1], before.logits[:, : t + 1])
        np.testing.assert_array_equal(after.mtp_hidden[:, :t], before.mtp_hidden[:, :t])
        ours, theirs = after.layers[1]["index_loss"].kl, before.layers[1]["index_loss"].kl
        np.testing.assert_array_equal(ours[:, : t + 1], theirs[:, : t + 1])
        assert (np.asarray(after.logits)[:, t + 1] != np.asarray(before.logits)[:, t + 1]).any()


def test_mistake_5_the_index_target_is_of_the_joint_softmax():
    rng = np.random.default_rng(4)
    heads, entries, width = 4, 6, 8
    q, keys = 2 * rng.normal(size=(heads, width)), rng.normal(size=(entries, width))
    elsewhere = rng.normal(size=(heads, 3)) * 3  # scores of two window tokens and the sink
    scores, logits = rng.normal(size=entries), q @ keys.T
    joint = oracle.softmax(np.concatenate([logits, elsewhere], 1))[:, :entries].sum(0)
    kl, _ = oracle.divergence(joint, scores, np.ones(entries, bool))
    mistaken, _ = oracle.divergence(oracle.softmax(logits).sum(0), scores, np.ones(entries, bool))
    lse = np.logaddexp.reduce(np.concatenate([logits, elsewhere], 1), axis=1)
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    # One index head whose products are the scores themselves, made positive by a constant that softmax ignores.
    operands = IndexOperands(f32(np.ones((1, 1, 1, 1))), f32(scores[None, :, None] + 5), f32(np.ones((1, 1, 1))))
    bounds = jnp.asarray([[[0, entries]]])
    ours = index_loss(operands, f32(q[None, None]), f32(keys[None]), f32(lse[None, None]), bounds, 1.0, 2).kl[0, 0]
    np.testing.assert_allclose(ours, kl, rtol=1e-5)
    assert abs(float(ours) - mistaken) > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_mistake_6_the_index_loss_moves_every_indexer_parameter_and_nothing_else(params, mode):
    _, gradients = probe(mode, packed=False)(params, random_tokens(), one_document(), weights_for(2, kl=1.0))
    for name, value in leaves_by_name(gradients).items():
        if ROLES[name].role == "indexer":
            assert value.any(), f"{name} gets no gradient from the index loss"
        elif ROLES[name].optimizer != "none":
            assert not value.any(), f"{name} gets a gradient from the index loss"


def test_mistake_6_all_other_losses_move_everything_else_and_no_indexer_parameter(params):
    rng = np.random.default_rng(0)
    weights = weights_for(2, rng.normal(size=(2, LENGTH, 64)), rng.normal(size=(2, LENGTH, 32)), balance=1.0)
    _, gradients = probe("sparse", packed=False)(params, random_tokens(), one_document(), weights)
    for name, value in leaves_by_name(gradients).items():
        if ROLES[name].role == "indexer":
            assert not value.any(), f"{name} gets a gradient from the language-model losses"
        elif ROLES[name].optimizer != "none":
            assert value.any(), f"{name} gets no gradient"


RELEASED_RATIOS = TINY.replace(
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    compress_ratios=(4, 128),
    layer_types=(CSA, HCA),
    num_hash_layers=0,
    sliding_window=128,
    index_topk=1,
)


@pytest.fixture(scope="module")
def released_ratios():
    """(params, tokens [1, 131], the oracle's logits of all of them) at V4's own window and ratios."""
    params, tokens = random_params(RELEASED_RATIOS), random_tokens(1, seed=6, length=131)
    return params, tokens, run_oracle(RELEASED_RATIOS, params, tokens[0]).logits


@pytest.mark.parametrize("length", [*range(1, 10), 127, 128, 129])
def test_mistake_9_lengths_around_the_first_closed_blocks(released_ratios, length):
    params, tokens, logits = released_ratios
    ours = jax.jit(lambda p, t: model.forward(RELEASED_RATIOS, p, t).logits)(params, tokens[:, :length])
    np.testing.assert_allclose(ours[0], logits[:length], rtol=0, atol=3e-5)


def test_mistake_14_no_block_or_overlap_straddles_two_documents():
    rng = np.random.default_rng(7)
    for lengths in (rng.multinomial(50, np.full(6, 1 / 6)) for _ in range(5)):
        ids = np.repeat(np.arange(6), lengths)[None].astype(np.int32)
        layout = make_layout(TINY, 1, ids.size, jnp.asarray(ids))
        for kind, ratio in ((CSA, 4), (HCA, 6)):
            blocks = jax.device_get(layout.blocks[kind, ratio])
            start, hi = 0, 0
            for length in lengths:
                expected = np.arange(start, start + length // ratio * ratio).reshape(-1, ratio)
                np.testing.assert_array_equal(blocks.tokens[0, hi : hi + len(expected)], expected)
                first = np.arange(len(expected)) == 0
                np.testing.assert_array_equal(blocks.starts_document[0, hi : hi + len(expected)], first)
                inside = slice(start, start + length)
                np.testing.assert_array_equal(blocks.lo[0, inside], hi)
                np.testing.assert_array_equal(blocks.hi[0, inside], hi + (np.arange(length) + 1) // ratio)
                start, hi = start + length, hi + len(expected)


def test_mistake_19_the_clamp_stands_before_the_product_and_on_the_gate_from_above_only():
    gate, up = np.meshgrid(np.linspace(-30, 30, 61), np.linspace(-30, 30, 61))
    ours = np.asarray(swiglu(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32), 10.0))
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(ours, silu(np.minimum(gate, 10)) * np.clip(up, -10, 10), rtol=2e-6, atol=1e-6)
    assert np.abs(ours).max() > 90  # a clamp of the product would stop at 10


def test_mistake_19_the_clamp_reaches_routed_and_shared_experts(params):
    tokens = random_tokens(1)[0]
    unclamped = run_oracle(TINY.replace(swiglu_limit=0.0), params, tokens).layers[0]["mlp_out"]
    out, _ = probe("sparse", packed=False)(params, np.stack([tokens, tokens]), one_document(), weights_for(2))
    ours, expected = out.layers[0]["mlp_out"][0], run_oracle(TINY, params, tokens).layers[0]["mlp_out"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
    assert np.abs(unclamped - expected).max() > 0.1


def test_mistake_20_the_bias_balances_a_skewed_stream():
    # One learned router, tokens drawn around one direction: without the bias most experts stay empty.
    config = RELEASED_RATIOS.replace(n_routed_experts=8)
    gate = Gate(config, "moe", nnx.Rngs(0))
    rng = np.random.default_rng(8)
    gate.weight[...] = jnp.asarray(rng.normal(size=(32, 8)) / 32**0.5, jnp.float32)
    x = jnp.asarray(rng.normal(size=32) * 1.5 + 0.5 * rng.normal(size=(512, 32)), jnp.float32)
    route = jax.jit(lambda bias: _load(gate, bias, x))
    bias, first = jnp.zeros(8), np.asarray(route(jnp.zeros(8)))
    for _ in range(2000):
        load = route(bias)
        bias += 0.001 * jnp.sign(load.mean() - load)
    last = np.asarray(route(bias))
    assert first.max() > 2 * first.mean() and first.min() < 0.2 * first.mean()
    assert last.max() < 1.1 * last.mean() and last.min() > 0.9 * last.mean()


def _load(gate, bias, x):
    biased = nnx.clone(gate)
    biased.bias[...] = bias
    return jnp.zeros(8).at[biased(x, jnp.zeros(len(x), jnp.int32)).expert_ids.ravel()].add(1.0)


def test_mistake_21_left_padding_shifts_nothing(params):
    tokens = random_tokens(seed=2)
    pads = (5, 18)  # multiples of neither ratio
    ids = np.stack([np.repeat([0, 1], [pad, LENGTH - pad]) for pad in pads]).astype(np.int32)
    out, _ = probe("sparse", packed=True)(params, tokens, ids, weights_for(2))
    for row, pad in enumerate(pads):
        alone = run_oracle(TINY, params, tokens[row, pad:])
        np.testing.assert_allclose(out.logits[row, pad:], alone.logits, rtol=0, atol=6e-5)


def test_mistake_22_mtp_is_fed_with_the_streams_before_the_head_read(params):
    weights = weights_for(2, mtp=np.random.default_rng(0).normal(size=(2, LENGTH, TINY.hidden_size)))
    _, gradients = probe("sparse", packed=False)(params, random_tokens(), one_document(), weights)
    for name, value in leaves_by_name(gradients).items():
        if name in ("norm", "head") or name.startswith("hc_head/"):
            assert not value.any(), f"{name} stands between the last block and the MTP module"
        elif name.startswith("mtp/0/hc_head/") or name in ("embed", "mtp/0/h_proj", "mtp/0/e_proj"):
            assert value.any(), name
