"""Searches that are not exact, what FP4 operands keep exact, and the memory of the indexer's loss."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LENGTH, TINY

from dsv4_jax import model, weights
from dsv4_jax.errors import UserError
from dsv4_jax.kernels import chunks
from dsv4_jax.kernels.indexer_topk import IndexOperands, Search, index_loss, index_topk, xla
from dsv4_jax.quantization.policy import precision_policy
from dsv4_jax.quantization.rounding import Rounding


def random_operands(rng, length, entries):
    """With positive weights, so that few of the best scores are equal."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return IndexOperands(draw(1, length, 2, 8), draw(1, entries, 8), jnp.abs(draw(1, length, 2)))


def choose(operands, lo, hi, k, search):
    bounds = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), operands.weights.shape[:2]) for x in (lo, hi))
    return np.asarray(jax.jit(lambda o, lo, hi: index_topk(o, lo, hi, k, search))(operands, *bounds))[0]


def share_of(found, exact):
    return np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)])


@pytest.mark.parametrize("tile", [256, 8192])
def test_two_levels_miss_as_many_entries_as_chance_says(monkeypatch, tile):
    monkeypatch.setattr(xla, "KEY_TILE", tile)
    operands, k = random_operands(np.random.default_rng(0), 300, 1000), 8
    exact = choose(operands, 0, 1000, k, Search())
    found = choose(operands, 0, 1000, k, Search(candidates=16))
    assert all(len(set(row)) == k and row.min() >= 0 for row in found)
    # 250 candidates are more than 16 for each of 8 places, so 4 entries compete: the best misses nothing, the second
    # best with probability 3 / 999, and so on.
    assert share_of(found, exact) == pytest.approx(1 - 3 / 999 * (k - 1) / 2, abs=0.006) and (found != exact).any()


def test_two_levels_are_exact_where_little_is_visible(monkeypatch):
    monkeypatch.setattr(chunks, "SCORE_ELEMENTS", 1)  # one query in each chunk
    operands = random_operands(np.random.default_rng(1), 3, 1000)
    lo, hi = jnp.asarray([[600, 10, 0]]), jnp.asarray([[700, 10, 1000]])
    exact, found = (choose(operands, lo, hi, 8, search) for search in (Search(), Search(candidates=16)))
    np.testing.assert_array_equal(found[:2], exact[:2])
    assert (found[1] == -1).all()


def test_scores_rounded_to_bf16_are_compared_as_such():
    operands = random_operands(np.random.default_rng(2), 40, 2000)
    scores = np.asarray(operands.scores())[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    wanted = np.argsort(-scores, axis=-1, kind="stable")[:, :100]
    found = choose(operands, 0, 2000, 100, Search(bf16=True))
    np.testing.assert_array_equal(found, wanted)
    assert 0.9 < share_of(found, choose(operands, 0, 2000, 100, Search())) < 1


def test_a_policy_says_whether_scores_are_compared_in_bf16():
    assert set(precision_policy("none,index_score=bf16", TINY).rounding) == {"index_score"}
    assert "index_score" not in precision_policy("v4", TINY).rounding
    for text in ("none,index_score=fp8", "none,index_q=bf16"):
        with pytest.raises(UserError, match="or index_score=bf16"):
            precision_policy(text, TINY)


def fp4_vectors(rng, count, exponents):
    """[count, 128] numbers on the FP4 grid, the scales of their four blocks of 32 being 2^exponents; float64."""
    codes = rng.choice([0, 0.5, 1, 1.5, 2, 3, 4, 6], (count, 4, 32)) * rng.choice([-1, 1], (count, 4, 32))
    codes[..., 0] = 6
    return (codes * 2.0 ** exponents[:, None]).reshape(count, 128)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    exponents=st.lists(st.integers(-40, 40), min_size=4, max_size=4),
    apart=st.lists(st.integers(0, 9), min_size=4, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_of_fp4_vectors_are_exact_in_bf16_and_in_fp8(exponents, apart, seed):
    rng, first = np.random.default_rng(seed), np.asarray(exponents)
    # The scales of a block's products are the sums of both exponents: they lie at most 2^9 apart.
    second = np.asarray(apart) - first
    q, keys = fp4_vectors(rng, 8, first), fp4_vectors(rng, 40, second)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys)]
    for numbers, x in zip(low, (q, keys), strict=True):
        np.testing.assert_array_equal(np.asarray(numbers, np.float64), x)
        np.testing.assert_array_equal(Rounding("fp4", (1, 32))(numbers), numbers)
    products = jnp.einsum("qd,kd->qk", *low, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(np.asarray(products, np.float64), q @ keys.T)
    # FP8 holds every FP4 number; the scales multiply each block's sum.
    fp8 = [
        jnp.asarray(x.reshape(-1, 4, 32) / 2.0 ** e[:, None], jnp.float8_e4m3fn)
        for x, e in ((q, first), (keys, second))
    ]
    sums = jnp.einsum("qbd,kbd->qkb", *fp8, preferred_element_type=jnp.float32)
    scaled = (sums * jnp.asarray(2.0 ** (first + second), jnp.float32)).sum(-1)
    np.testing.assert_array_equal(np.asarray(scaled, np.float64), q @ keys.T)


def test_scales_far_apart_round_as_float32_does():
    rng = np.random.default_rng(0)
    q, keys = fp4_vectors(rng, 8, np.array([0, 30, 0, 0])), fp4_vectors(rng, 40, np.zeros(4))
    products = jnp.einsum(
        "qd,kd->qk", *(jnp.asarray(x, jnp.bfloat16) for x in (q, keys)), preferred_element_type=jnp.float32
    )
    assert (np.asarray(products, np.float64) != q @ keys.T).any()
    np.testing.assert_allclose(products, q @ keys.T, rtol=1e-5)


def test_the_loss_over_visible_entries_keeps_no_queries_times_entries_for_its_backward_pass():
    def loss(queries, keys, weights, q, entries, lse, bounds):
        return index_loss(IndexOperands(queries, keys, weights), q, entries, lse, bounds, 1.0, 64).kl.sum()

    count, heads = 16_384, 32
    make = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, count, *shape), dtype)  # noqa: E731
    operands = make(8, 16), make(16), make(8, dtype=jnp.float32)
    rest = make(heads, 16), make(16), make(heads, dtype=jnp.float32), make(2, dtype=jnp.int32)
    needed = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands, *rest).compile().memory_analysis()
    assert needed.temp_size_in_bytes < count * count  # a quarter of one float32 matrix without heads


@pytest.mark.parametrize(
    ("attention", "policy", "wanted"),
    [
        ("sparse", "none", Search()),
        ("sparse", "none,index_score=bf16", Search(bf16=True)),
        ("approximate", "none", Search(candidates=16)),
    ],
)
def test_a_forward_searches_as_it_was_asked_to(monkeypatch, attention, policy, wanted):
    asked = []
    spy = lambda *args: asked.append(args[-1]) or index_topk(*args)  # noqa: E731
    monkeypatch.setattr("dsv4_jax.layers.attention.index_topk", spy)
    params = jax.eval_shape(lambda: weights.init(TINY, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    options = {"attention": attention, "policy": precision_policy(policy, TINY)}
    jax.eval_shape(lambda params, tokens: model.forward(TINY, params, tokens, **options).hidden, params, tokens)
    assert asked and set(asked) == {wanted}
