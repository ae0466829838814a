"""The attention branches against a float64 statement of softmax attention and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check_gradients

from dsv4_jax.kernels import chunks
from dsv4_jax.kernels.sparse_attention import gather_attention, merge, range_attention, reference, window_attention

SCALE = 0.4


def by_hand(q, keys, visible, d_out, d_lse):
    """Output, log-sum-exp and gradients of masked attention, float64, one query and head at a time."""
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    d_q, d_keys = np.zeros_like(q), np.zeros_like(keys)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        if not len(seen):
            continue
        k = keys[b, seen]
        scores = SCALE * k @ q[b, t, h]
        lse[b, t, h] = np.logaddexp.reduce(scores)
        p = np.exp(scores - lse[b, t, h])
        out[b, t, h] = p @ k
        d_scores = p * (k @ d_out[b, t, h] - d_out[b, t, h] @ out[b, t, h] + d_lse[b, t, h])
        d_q[b, t, h] = SCALE * d_scores @ k
        d_keys[b, seen] += SCALE * np.outer(d_scores, q[b, t, h]) + np.outer(p, d_out[b, t, h])
    return out, lse, d_q, d_keys


def check(branch, q, keys, visible, rng):
    """One branch, `branch(q, keys)`, against `by_hand`."""
    d_out, d_lse = rng.normal(size=q.shape), rng.normal(size=q.shape[:3])

    def run(q, keys, *cotangents):
        primal, pull = jax.vjp(branch, q, keys)
        return *primal, *pull(cotangents)

    args = [jnp.asarray(x, jnp.float32) for x in (q, keys, d_out, d_lse)]
    ours = jax.jit(run)(*args)
    expected = by_hand(q, keys, visible, d_out, d_lse)
    for name, a, b in zip(("out", "lse", "d_q", "d_keys"), ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


def inputs(rng, batch, length, heads, width, entries):
    draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32).astype(np.float64)  # noqa: E731
    return draw(batch, length, heads, width), draw(batch, length, width), draw(batch, entries, width)


def in_window(ids, window):
    distance = np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1])
    return (distance >= 0) & (distance < window) & (ids[:, :, None] == ids[:, None, :])


def in_range(lo, hi, entries):
    return (np.arange(entries) >= lo[..., None]) & (np.arange(entries) < hi[..., None])


def chosen_in(choice, entries):
    return (choice[..., None] == np.arange(entries)).any(-2)


def random_choice(rng, batch, length, entries, k):
    """k distinct entries per query, a random number of them unused; some queries choose nothing."""
    order = np.argsort(rng.random((batch, length, entries)), -1)[..., :k]
    return np.where(np.arange(order.shape[-1]) < rng.integers(0, k + 1, (batch, length, 1)), order, -1)


shapes = {
    "batch": st.integers(1, 2),
    "length": st.integers(1, 19),
    "heads": st.integers(1, 3),
    "seed": st.integers(0, 99),
}
budgets = st.sampled_from([1, 100, 1 << 22])  # from one query at a time to all at once
property_test = settings(max_examples=6, deadline=None, derandomize=True, database=None)


@property_test
@given(**shapes, window=st.integers(1, 21), documents=st.integers(1, 4), budget=budgets)
def test_window_attention(batch, length, heads, seed, window, documents, budget):
    rng = np.random.default_rng(seed)
    q, kv, _ = inputs(rng, batch, length, heads, 5, 1)
    ids = np.sort(rng.integers(0, documents, (batch, length)), axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SCORE_ELEMENTS", budget)
        branch = lambda q, kv: window_attention(q, kv, jnp.asarray(ids), window, SCALE)  # noqa: E731
        check(branch, q, kv, in_window(ids, window), rng)


@property_test
@given(**shapes, entries=st.integers(1, 11), budget=budgets)
def test_range_attention(batch, length, heads, seed, entries, budget):
    rng = np.random.default_rng(seed)
    q, _, keys = inputs(rng, batch, length, heads, 5, entries)
    lo, hi = np.sort(rng.integers(0, entries + 1, (2, batch, length)), axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SCORE_ELEMENTS", budget)
        branch = lambda q, keys: range_attention(q, keys, jnp.asarray(lo), jnp.asarray(hi), SCALE)  # noqa: E731
        check(branch, q, keys, in_range(lo, hi, entries), rng)


@property_test
@given(**shapes, entries=st.integers(1, 11), k=st.integers(1, 5), budget=budgets)
def test_gather_attention(batch, length, heads, seed, entries, k, budget):
    rng = np.random.default_rng(seed)
    q, _, keys = inputs(rng, batch, length, heads, 5, entries)
    choice = random_choice(rng, batch, length, entries, min(k, entries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SCORE_ELEMENTS", budget)
        branch = lambda q, keys: gather_attention(q, keys, jnp.asarray(choice), SCALE)  # noqa: E731
        check(branch, q, keys, chosen_in(choice, entries), rng)


def test_the_budget_of_the_property_tests_makes_many_chunks(monkeypatch):
    q, keys = jnp.ones((1, 12, 2, 5)), jnp.ones((1, 7, 5))
    bound = jnp.full((1, 12), 7)

    def loops():
        jaxpr = jax.make_jaxpr(lambda q: range_attention(q, keys, 0 * bound, bound, SCALE))(q)
        return str(jaxpr).count("length=12")

    assert loops() == 0
    monkeypatch.setattr(chunks, "SCORE_ELEMENTS", 1)
    assert loops() == 1


def test_the_reference_states_the_same_mathematics():
    rng = np.random.default_rng(0)
    q, kv, keys = inputs(rng, 2, 13, 3, 5, 6)
    ids = np.sort(rng.integers(0, 3, (2, 13)), axis=1)
    lo, hi = np.sort(rng.integers(0, 7, (2, 2, 13)), axis=0)
    choice = random_choice(rng, 2, 13, 6, 3)
    zeros = np.zeros_like(q), np.zeros(q.shape[:3])
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    for ours, keys_, visible in (
        (reference.window_attention(f32(q), f32(kv), ids, 4, SCALE), kv, in_window(ids, 4)),
        (reference.range_attention(f32(q), f32(keys), lo, hi, SCALE), keys, in_range(lo, hi, 6)),
        (reference.gather_attention(f32(q), f32(keys), choice, SCALE), keys, chosen_in(choice, 6)),
    ):
        out, lse, *_ = by_hand(q, keys_, visible, *zeros)
        np.testing.assert_allclose(ours[0], out, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ours[1], lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("branch", ["range", "gather"])
def test_queries_that_see_nothing_give_minus_infinity_and_zero_gradients(branch):
    q, keys = jnp.ones((1, 6, 2, 4)), jnp.ones((1, 3, 4))
    nothing = jnp.zeros((1, 6), jnp.int32)

    def merged(q, keys):
        if branch == "range":
            out = range_attention(q, keys, nothing, nothing, SCALE)
        else:
            out = gather_attention(q, keys, jnp.full((1, 6, 2), -1), SCALE)
        return merge([window_attention(q, q[:, :, 0], None, 2, SCALE), out], jnp.zeros(2))[0].sum(), out

    (d_q, d_keys), (out, lse) = jax.jit(jax.grad(merged, (0, 1), has_aux=True))(q, keys)
    assert not out.any()
    assert (lse == -jnp.inf).all()
    assert not d_keys.any()
    assert np.isfinite(d_q).all()


def test_scores_far_apart_neither_overflow_nor_lose_the_largest():
    q = jnp.full((1, 1, 1, 1), 1000.0)
    keys = jnp.asarray([[[1.0], [-1.0], [0.5]]])
    out, lse = range_attention(q, keys, jnp.zeros((1, 1), int), jnp.full((1, 1), 3), 1.0)
    assert out[0, 0, 0, 0] == 1.0
    assert lse[0, 0, 0] == 1000.0


def test_merge_is_one_softmax_over_all_branches_and_the_sink():
    rng = np.random.default_rng(1)
    logits, values, sink = rng.normal(size=(1, 3, 2, 7)) * 3, rng.normal(size=(1, 3, 2, 7, 4)), rng.normal(size=2) * 3

    def stated(logits, values, sink):
        e, extra = np.exp(logits), np.exp(np.broadcast_to(sink, (1, 3, 2)))
        return (e[..., None] * values).sum(-2) / (e.sum(-1) + extra)[..., None]

    def ours(logits, values, sink):
        parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
        one = lambda s: ((jax.nn.softmax(logits[..., s])[..., None] * values[..., s, :]).sum(-2),  # noqa: E731
                         jax.nn.logsumexp(logits[..., s], -1))  # fmt: skip
        return merge([one(part) for part in parts], sink)[0]

    check_gradients(ours, stated, (logits, values, sink))
