"""Top-k of the index scores against a full sort, and the indexer's loss against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.kernels import chunks
from dsv4_jax.kernels.indexer_topk import IndexOperands, index_loss, index_topk, kl, reference, xla

property_test = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def scores_of(queries, keys, weights):
    return np.einsum("bth,bthi->bti", weights, np.maximum(np.einsum("bthd,bid->bthi", queries, keys), 0))


def sorted_choice(scores, lo, hi, k):
    """The k best visible entries, ties to the earlier one, -1 for unused places."""
    choice = np.full((*lo.shape, min(k, scores.shape[-1])), -1)
    for b, t in np.ndindex(lo.shape):
        visible = np.arange(lo[b, t], hi[b, t])
        best = visible[np.argsort(-scores[b, t, visible], kind="stable")][:k]
        choice[b, t, : len(best)] = best
    return choice


def random_case(rng, batch, length, entries, levels=0):
    """Operands whose products are exact in float32 (small integers, so there are ties) or normal; and bounds."""
    draw = lambda *s: rng.integers(-levels, levels + 1, s) if levels else rng.normal(size=s)  # noqa: E731
    operands = [draw(batch, length, 2, 3), draw(batch, entries, 3), draw(batch, length, 2)]
    lo, hi = np.sort(rng.integers(0, entries + 1, (2, batch, length)), axis=0)
    return [np.asarray(np.asarray(x, np.float32), np.float64) for x in operands], lo, hi


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@property_test
@given(
    batch=st.integers(1, 2), length=st.integers(1, 15), entries=st.integers(1, 30), k=st.integers(1, 9),
    tile=st.sampled_from([1, 4, 7, 8192]), budget=st.sampled_from([1, 200, 1 << 22]), levels=st.sampled_from([0, 2]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_topk_equals_a_full_sort_ties_and_tiles_included(batch, length, entries, k, tile, budget, levels, seed):
    operands, lo, hi = random_case(np.random.default_rng(seed), batch, length, entries, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "KEY_TILE", tile)
        patch.setattr(chunks, "SCORE_ELEMENTS", budget)
        ours = jax.jit(lambda o, lo, hi: index_topk(o, lo, hi, k))(IndexOperands(*f32(*operands)), lo, hi)
    np.testing.assert_array_equal(ours, sorted_choice(scores_of(*operands), lo, hi, k))


def test_the_reference_is_a_full_sort():
    operands, lo, hi = random_case(np.random.default_rng(0), 2, 9, 12, levels=2)
    ours = reference.index_topk(IndexOperands(*f32(*operands)), jnp.asarray(lo), jnp.asarray(hi), 4)
    np.testing.assert_array_equal(ours, sorted_choice(scores_of(*operands), lo, hi, 4))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def loss_by_hand(operands, q, entries, elsewhere, compared, k, cotangent):
    """KL, recall and the operands' gradients, token by token; `compared[b][t]` are the entries of the distributions."""
    queries, keys, weights = operands
    scores, kl, recall = scores_of(*operands), np.zeros(q.shape[:2]), np.zeros(q.shape[:2])
    gradients = [np.zeros_like(x) for x in operands]
    for b, t in np.ndindex(q.shape[:2]):
        seen = compared[b][t]
        if not len(seen):
            continue
        logits = 0.5 * q[b, t] @ entries[b, seen].T
        everything = np.exp(logits).sum(1) + np.exp(elsewhere[b, t])  # window and sink share the denominator
        mass = (np.exp(logits) / everything[:, None]).sum(0)
        target, predicted = mass / mass.sum(), softmax(scores[b, t, seen])
        kl[b, t] = (target * np.log(target / predicted)).sum()
        recall[b, t] = target[np.argsort(-scores[b, t, seen], kind="stable")[:k]].sum() if k else 1
        d_scores = (predicted - target) * cotangent[b, t]
        products = queries[b, t] @ keys[b, seen].T
        gradients[2][b, t] = np.maximum(products, 0) @ d_scores
        d_products = weights[b, t][:, None] * (products > 0) * d_scores
        gradients[0][b, t] = d_products @ keys[b, seen]
        np.add.at(gradients[1][b], seen, d_products.T @ queries[b, t])
    return kl, recall, gradients


@pytest.mark.parametrize(("budget", "tile"), [(1, 4), (300, 2048), (1 << 22, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_index_loss_is_its_formula_and_so_are_its_gradients(monkeypatch, sparse, budget, tile):
    monkeypatch.setattr(chunks, "SCORE_ELEMENTS", budget)
    monkeypatch.setattr(kl, "ENTRY_TILE", tile)
    rng = np.random.default_rng(3)
    operands, lo, hi = random_case(rng, 2, 11, 9)
    q, entries = 2 * rng.normal(size=(2, 11, 4, 6)), rng.normal(size=(2, 9, 6))
    elsewhere, cotangent = rng.normal(size=(2, 11, 4)) * 2, rng.normal(size=(2, 11))
    choice = sorted_choice(scores_of(*operands), lo, hi, 3)
    if sparse:
        compared = [[row[row >= 0] for row in rows] for rows in choice]
        given, k = choice, 0
    else:
        compared = [[np.arange(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(lo, hi, strict=True)]
        given, k = np.stack([lo, hi], -1), 3
    joint = np.log(np.exp(elsewhere) + joint_mass(q, entries, compared))

    def weighted(operands, cotangent, q, entries, lse):
        out = index_loss(operands, q, entries, lse, jnp.asarray(given), 0.5, k)
        return (out.kl * cotangent).sum(), out

    gradients, ours = jax.jit(jax.grad(weighted, has_aux=True))(
        IndexOperands(*f32(*operands)), *f32(cotangent, q, entries, joint)
    )
    divergence, recall, expected = loss_by_hand(operands, q, entries, elsewhere, compared, k, cotangent)
    np.testing.assert_allclose(ours.kl, divergence, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(ours.recall, recall, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.counts, [[len(seen) > 0 for seen in row] for row in compared])
    for ours_, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=5e-5)


def joint_mass(q, entries, visible):
    """Sum of exp(score) over all compressed entries of each softmax: [B, S, H]."""
    mass = np.zeros(q.shape[:3])
    for b, t in np.ndindex(q.shape[:2]):
        mass[b, t] = np.exp(0.5 * q[b, t] @ entries[b, visible[b][t]].T).sum(1)
    return mass


@pytest.mark.parametrize("sparse", [False, True])
def test_the_index_loss_reaches_only_the_operands(sparse):
    rng = np.random.default_rng(4)
    operands, lo, hi = random_case(rng, 1, 5, 6)
    bounds = np.stack([np.zeros((1, 5), int), np.full((1, 5), 6)], -1)
    compared, k = (sorted_choice(scores_of(*operands), lo, hi, 2), 0) if sparse else (bounds, 2)
    q, entries, lse = f32(rng.normal(size=(1, 5, 2, 4)), rng.normal(size=(1, 6, 4)), rng.normal(size=(1, 5, 2)) + 3)

    def loss(q, entries, lse):
        return index_loss(IndexOperands(*f32(*operands)), q, entries, lse, jnp.asarray(compared), 1.0, k).kl.sum()

    for gradient in jax.grad(loss, (0, 1, 2))(q, entries, lse):
        assert not gradient.any()
