"""The TPU kernels of the indexer's loss in interpret mode, against its mathematics in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from drawing import few
from hypothesis import example, given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.indexer_topk import IndexOperands, tpu_loss

SCALE = 0.3
NAMES = "mass", "scores", "d_queries", "d_keys", "d_weights"
# Relative to the largest value. Products of BF16 numbers are exact in float32, and so only sums are rounded; but
# gradients of BF16 operands are sums of products with numbers rounded to 8 bits, and are rounded to 8 bits themselves.
SUMS, ROUNDED = 2e-6, 1e-2


def drawn(rng, batch, length, entries, heads, width, index_heads, index_width, count, dtype, index_dtype):
    """Operands of the loss; of every query some choices are unused, wherever they stand, of the last one all."""
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    operands = IndexOperands(
        draw(index_dtype, batch, length, index_heads, index_width),
        draw(index_dtype, batch, entries, index_width),
        draw("float32", batch, length, index_heads),
    )
    q, rows = draw(dtype, batch, length, heads, width), draw(dtype, batch, entries, width)
    lse = 2 + SCALE * width**0.5 * draw("float32", batch, length, heads)
    numbers = np.arange(entries + count)  # each entry once at most
    choice = rng.permuted(np.where(numbers < entries, numbers, -1) * np.ones((batch, length, 1), int), axis=-1)
    choice = choice[..., :count]
    choice[:, -1] = -1
    d_scores = np.where(choice < 0, np.nan, rng.normal(size=choice.shape))  # nothing of an unused place may be used
    return operands, q, rows, lse, jnp.asarray(choice, jnp.int32), jnp.asarray(d_scores, jnp.float32)


def stated(operands, q, entries, lse, choice, d_scores):
    """What `found` should find, in float64."""
    queries, keys, weights, q, entries, lse = (np.asarray(x, np.float64) for x in (*operands, q, entries, lse))
    seen, at = np.asarray(choice) >= 0, (np.arange(len(q))[:, None, None], np.maximum(choice, 0))
    mass = np.exp(SCALE * np.einsum("bthd,btkd->bthk", q, entries[at]) - lse[..., None]).sum(2)
    products = np.einsum("bthd,btkd->bthk", queries, keys[at])
    scores = np.einsum("bthk,bth->btk", np.maximum(products, 0), weights)
    d_scores = np.where(seen, np.asarray(d_scores, np.float64), 0)
    d_products = (products > 0) * weights[..., None] * d_scores[:, :, None]
    d_keys = np.zeros(keys.shape)
    np.add.at(d_keys, at, np.einsum("bthk,bthd->btkd", d_products, queries))
    d_weights = np.einsum("bthk,btk->bth", np.maximum(products, 0), d_scores)
    d_queries = np.einsum("bthk,btkd->bthd", d_products, keys[at])
    return np.where(seen, mass, 0), np.where(seen, scores, 0), d_queries, d_keys, d_weights


def found(operands, q, entries, lse, choice, d_scores, interpret):
    forward = tpu_loss.forward(operands, q, entries, lse, choice, SCALE, interpret)
    return *forward, *tpu_loss.backward(operands, choice, d_scores, interpret)


@pytest.mark.usefixtures("small_fetches")
@few(5)
@example(2, 9, 6, 3, 16, 4, 200, 8, ("bfloat16", "bfloat16"), 0)  # keys' gradients are added up in VMEM, as with 4
@example(1, 9, 6, 3, 16, 4, 128, 8, ("bfloat16", "float32"), 0)  # in two parts
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 5),
    entries=st.integers(1, 6),
    heads=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([16, 130, 384]),
    index_heads=st.sampled_from([1, 4]),
    index_width=st.sampled_from([8, 128, 200, 256]),
    count=st.integers(1, 9),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16"])] * 2),
    seed=st.integers(0, 99),
)
def test_mass_scores_and_gradients(batch, length, entries, heads, width, index_heads, index_width, count, dtypes, seed):
    rng = np.random.default_rng(seed)
    case = drawn(rng, batch, length, entries, heads, width, index_heads, index_width, count, *dtypes)
    operands, *_, choice, _ = case
    for name, a, b in zip(NAMES, found(*case, pltpu.InterpretParams()), stated(*case), strict=True):
        like = dict(d_queries=operands.queries, d_keys=operands.keys).get(name)
        assert a.dtype == (jnp.float32 if like is None else like.dtype), name
        rounded = like is not None and like.dtype == jnp.bfloat16
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= (ROUNDED if rounded else SUMS) * max(np.abs(b).max(), 1e-6), name
        if name in ("mass", "scores"):
            assert not a[np.asarray(choice) < 0].any(), name


@pytest.mark.usefixtures("small_fetches")
def test_no_races_and_equal_bits(capsys):
    case = drawn(np.random.default_rng(0), 1, 5, 4, 2, 160, 3, 128, 7, "bfloat16", "bfloat16")
    first, again = (found(*case, pltpu.InterpretParams(detect_races=looking)) for looking in (True, False))
    assert "RACE DETECTED" not in capsys.readouterr().out
    for name, a, b in zip(NAMES, first, again, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_operands_of_two_dtypes_are_left_to_xla():
    rows = {dtype: jnp.zeros((1, 4, 128), dtype) for dtype in ("float32", "bfloat16", "float16")}
    supported = lambda queries, keys, q, entries: tpu_loss.supports(  # noqa: E731
        IndexOperands(rows[queries][:, :, None], rows[keys], jnp.zeros((1, 4, 1))), rows[q][:, :, None], rows[entries]
    )
    assert supported("float32", "float32", "bfloat16", "bfloat16")
    assert not supported("float32", "bfloat16", "bfloat16", "bfloat16")
    assert not supported("bfloat16", "bfloat16", "float32", "bfloat16")
    assert not supported("float16", "float16", "bfloat16", "bfloat16")
