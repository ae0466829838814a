"""The losses against float64 statements of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_params

from dsv4_jax import model, weights
from train import losses
from train.evaluate import scores
from train.losses import OBJECTIVES, LossWeights, batch_totals, chunked_cross_entropy, shifted_targets, training_loss
from train.state import join, split

WEIGHTS = LossWeights(balance=0.5, index=2.0)
FACTS = weights.facts(TINY)


def problem(n=37, d=12, v=29, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(n, d)).astype(dtype), rng.normal(size=(d, v)).astype(dtype)
    return hidden, matrix, rng.integers(0, v, n).astype(np.int32), rng.uniform(0, 2, n).astype(np.float32)


def dense_float64(hidden, matrix, targets, weights):
    """Value, gradient of hidden, gradient of the matrix."""
    logits = hidden.astype(np.float64) @ matrix.astype(np.float64)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)
    rows = np.arange(len(targets))
    d_logits = p.copy()
    d_logits[rows, targets] -= 1
    d_logits *= weights[:, None]
    return -(weights * np.log(p[rows, targets])).sum(), d_logits @ matrix.T, hidden.T @ d_logits


@pytest.mark.parametrize("elements", [29 * 5, 29 * 36, 1 << 24])  # 8, 2 and 1 chunks, the first two with padding
def test_chunked_cross_entropy_and_its_gradients_equal_the_dense_formula(monkeypatch, elements):
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", elements)
    hidden, matrix, targets, weights = problem()
    value, d_hidden, d_matrix = dense_float64(hidden, matrix, targets, weights)
    assert chunked_cross_entropy(hidden, matrix, targets, weights) == pytest.approx(value, rel=1e-6)
    scaled = lambda h, m: 3 * chunked_cross_entropy(h, m, targets, weights)  # noqa: E731
    loss, gradients = jax.value_and_grad(scaled, (0, 1))(hidden, matrix)
    assert loss == pytest.approx(3 * value, rel=1e-6)
    np.testing.assert_allclose(gradients[0], 3 * d_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], 3 * d_matrix, rtol=1e-5, atol=1e-5)


def test_bfloat16_hidden_states_keep_a_float32_loss_and_matrix_gradient():
    hidden, matrix, targets, weights = problem(n=64, d=32, v=50)
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(narrow, np.float32), np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32)
    value, d_hidden, d_matrix = dense_float64(*rounded, targets, weights)
    loss, (gh, gm) = jax.value_and_grad(chunked_cross_entropy, (0, 1))(narrow, jnp.asarray(matrix), targets, weights)
    assert loss.dtype == gm.dtype == jnp.float32 and gh.dtype == jnp.bfloat16
    assert loss == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(gm, d_matrix, atol=0.01 * np.abs(d_matrix).max())
    np.testing.assert_allclose(gh.astype(np.float32), d_hidden, atol=0.02 * np.abs(d_hidden).max())


def test_extreme_logits_and_weightless_tokens_stay_finite():
    hidden, matrix = jnp.array([[1e4], [1.0]]), jnp.array([[1.0, -1.0]])
    loss, gradient = jax.value_and_grad(chunked_cross_entropy)(hidden, matrix, jnp.array([1, 0]), jnp.array([1.0, 0.0]))
    assert loss == pytest.approx(2e4)
    np.testing.assert_allclose(gradient, [[2.0], [0.0]])


def test_gradients_take_three_matrix_products_and_no_token_by_vocabulary_array():
    n, d, v = 16384, 64, 8192
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((n, d), "float32"), ((d, v), "float32"), ((n,), "int32"))]
    gradient = jax.grad(chunked_cross_entropy, (0, 1))
    weights = jax.ShapeDtypeStruct((n,), "float32")
    assert str(jax.make_jaxpr(gradient)(*shapes, weights)).count("dot_general[") == 3
    memory = jax.jit(gradient).lower(*shapes, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * v * 4 / 2


def test_targets_stay_inside_their_document():
    tokens = np.array([[10, 11, 12, 13, 14, 15, 16, 17]])
    segments = np.array([[1, 1, 1, 2, 1, 1, 0, 0]])  # the fourth is a document of one token; then padding
    for shift in (1, 2):
        targets, weights = shifted_targets(jnp.asarray(tokens), jnp.asarray(segments), shift)
        expected = np.zeros(8)
        for t in range(8 - shift):
            expected[t] = segments[0, t] != 0 and len(set(segments[0, t : t + shift + 1])) == 1
        np.testing.assert_array_equal(weights[0], expected)
        np.testing.assert_array_equal(targets[0, : 8 - shift], tokens[0, shift:])


def test_a_loss_mask_leaves_the_chosen_targets_only():
    """Means over the targets whose own token is marked, whatever the model says elsewhere."""
    rng, batch = np.random.default_rng(0), packed_batch()
    hidden, mtp_hidden = rng.normal(size=(2, *batch["tokens"].shape, TINY.hidden_size)).astype(np.float32)
    mask = (rng.random(batch["tokens"].shape) < 0.3).astype(np.int32)
    layer = {"load": jnp.ones(6), "hc_errors": jnp.zeros(2), "balance": jnp.zeros(())}
    out = model.Output(None, jnp.asarray(hidden), jnp.asarray(mtp_hidden), [layer] * 4, jnp.zeros(()), None)
    params = {"head": jnp.asarray(rng.normal(size=(TINY.hidden_size, TINY.vocab_size)), jnp.float32)}

    def parts(batch):
        totals = batch_totals(TINY, batch)
        return training_loss(TINY, params, batch, totals, OBJECTIVES["dense"], WEIGHTS, 0.25, lambda *_, **__: out)[1]

    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    masked, unmasked = parts(batch | {"loss_mask": jnp.asarray(mask)}), parts(batch)
    for name, states, shift in (("ce", hidden, 1), ("mtp", mtp_hidden, 2)):
        logits = states.astype(np.float64) @ np.asarray(params["head"], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = [
            -log_p[b, t, tokens[b, t + shift]]
            for b, t in np.ndindex(tokens.shape)
            if t + shift < tokens.shape[1] and segments[b, t] and len(set(segments[b, t : t + shift + 1])) == 1
            if mask[b, t + shift]
        ]
        assert 5 < len(nats) < tokens.size / 2
        assert masked[name] == pytest.approx(np.mean(nats), rel=1e-5) and masked[name] != unmasked[name]
    assert parts(batch | {"loss_mask": jnp.zeros_like(mask)})["ce"] == 0


def packed_batch(rows=2, length=40):
    rng = np.random.default_rng(3)
    segments = np.repeat([[1, 2, 3, 0]], [13, 7, 16, 4], axis=1).repeat(rows, 0)
    tokens = rng.integers(0, TINY.vocab_size, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments, jnp.int32)}


@pytest.fixture(scope="module")
def computed():
    """Parameters, batch, and per stage kind (loss, parts, gradients)."""
    params, batch = random_params(TINY), packed_batch()
    moved, held = split(params, FACTS, _moves)

    def loss(moved, kind):
        totals = batch_totals(TINY, batch)
        return training_loss(TINY, join(moved, held), batch, totals, OBJECTIVES[kind], WEIGHTS, 0.25)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    return params, batch, {kind: run(moved, kind) for kind in ("dense", "indexer_warmup")}


def _moves(fact):
    return fact.optimizer != "none"


def test_the_loss_is_the_weighted_sum_of_its_parts(computed):
    for kind, ((loss, parts), _) in computed[2].items():
        total = WEIGHTS.index * parts.get("index_kl", 0)
        total += parts.get("ce", 0) + 0.25 * parts.get("mtp", 0) + WEIGHTS.balance * parts.get("balance", 0)
        assert float(loss) == pytest.approx(float(total), rel=1e-6), kind
    assert set(computed[2]["indexer_warmup"][0][1]) == {"load", "hc_errors", "index_kl", "index_recall"}


def test_next_token_mtp_and_balance_losses_equal_their_formulas(computed):
    params, batch, results = computed
    out = jax.jit(lambda p: model.forward(TINY, p, **_call(batch), attention="dense", mtp=True, record=True))(params)
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    matrix = np.asarray(model.output_matrix(params), np.float64)
    parts = results["dense"][0][1]
    for name, hidden, shift in (("ce", out.hidden, 1), ("mtp", out.mtp_hidden, 2)):
        logits = np.asarray(hidden, np.float64) @ matrix
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= logits.max(-1, keepdims=True)
        nats = [
            -log_p[b, t, tokens[b, t + shift]]
            for b in range(tokens.shape[0])
            for t in range(tokens.shape[1] - shift)
            if segments[b, t] != 0 and len(set(segments[b, t : t + shift + 1])) == 1
        ]
        assert parts[name] == pytest.approx(np.mean(nats), rel=1e-5)
    learned = [out.layers[i]["balance"] for i in (1, 2, 3)]  # block 0 routes by hash; block 3 is the MTP block
    assert parts["balance"] == pytest.approx(np.mean(learned), rel=1e-6)


def _call(batch):
    return {"tokens": batch["tokens"], "segment_ids": batch["segment_ids"]}


def test_the_index_loss_is_a_mean_over_the_tokens_of_text_that_see_an_entry(computed):
    params, batch, results = computed
    out = jax.jit(lambda p: model.forward(TINY, p, **_call(batch), attention="dense", index_loss=True))(params)
    seen = out.layers[1]["index_loss"]
    kl, counts = np.asarray(seen.kl, np.float64), np.asarray(seen.counts)
    assert counts[:, -1].all()  # the padding is long enough for an entry, which it sees
    counts = counts & np.asarray(batch["segment_ids"] != 0)
    assert 0 < counts.sum() < counts.size
    assert batch_totals(TINY, batch).index[0] == counts.sum()
    assert results["indexer_warmup"][0][1]["index_kl"] == pytest.approx(kl[counts].mean(), rel=1e-5)


def test_padding_neither_trains_the_indexers_nor_counts_in_their_recall():
    """As in rows of conversations, or of held-out documents far shorter than a row."""
    params, batch = random_params(TINY), {name: x[:, :36] for name, x in packed_batch().items()}
    moved, held = split(params, FACTS, _moves)

    def loss(moved, batch):
        totals = batch_totals(TINY, batch)
        return training_loss(TINY, join(moved, held), batch, totals, OBJECTIVES["indexer_warmup"], WEIGHTS, 0.0)

    run = jax.jit(jax.grad(loss, has_aux=True))
    evaluate = jax.jit(lambda batch: scores(TINY, model.forward, "dense", params, batch))
    padded = {name: jnp.pad(x, ((0, 0), (0, 28))) for name, x in batch.items()}
    (bare, parts), (longer, padded_parts) = run(moved, batch), run(moved, padded)
    for name in ("index_kl", "index_recall"):
        assert padded_parts[name] == pytest.approx(float(parts[name]), rel=1e-5), name
    for (path, expected, fact), got in zip(_with_facts(bare), jax.tree.leaves(longer), strict=True):
        size = float(jnp.abs(expected).max())
        assert (size > 0) == (fact.role == "indexer")
        np.testing.assert_allclose(got, expected, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path))
    found, padded_found = evaluate(batch), evaluate(padded)
    assert found["seeing"] == padded_found["seeing"]
    assert padded_found["recall"] == pytest.approx(float(found["recall"]), rel=1e-5)


def test_the_indexer_kl_reaches_every_indexer_parameter_and_nothing_else(computed):
    """Mistake 6 of the field notes: an indexer that silently gets no gradient."""
    for path, gradient, fact in _with_facts(computed[2]["indexer_warmup"][1]):
        assert bool(jnp.any(gradient != 0)) == (fact.role == "indexer"), path


def test_the_language_losses_do_not_reach_the_indexer(computed):
    for path, gradient, fact in _with_facts(computed[2]["dense"][1]):
        assert fact.role != "indexer" or not jnp.any(gradient), path


def _with_facts(gradients):
    facts = [fact for fact in jax.tree.leaves(FACTS) if _moves(fact)]
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return [(path, leaf, fact) for (path, leaf), fact in zip(leaves, facts, strict=True)]
