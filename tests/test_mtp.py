"""The multi-token-prediction module and the whole tiny model against the float64 oracle."""

import numpy as np
import pytest
from support import LENGTH, TINY, one_document, probe, random_params, random_tokens, run_oracle, weights_for

from dsv4_jax.config import CSA

MODES = ("sparse", "dense")


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module", params=MODES)
def both(request, params):
    """(Output, oracle's results per row) on the same tokens."""
    tokens = random_tokens()
    out, _ = probe(request.param, packed=True)(params, tokens, one_document(), weights_for(2))
    return out, [run_oracle(TINY, params, row, request.param) for row in tokens]


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(np.asarray(theirs)).max()))


def test_logits_match(both):
    out, expected = both
    close(out.logits, [row.logits for row in expected])


def test_mtp_matches_the_written_formula(both):
    out, expected = both
    close(out.mtp_hidden, [row.mtp_hidden for row in expected])


def test_every_block_matches_mtp_included(both):
    out, expected = both
    assert len(out.layers) == TINY.num_hidden_layers + 1
    for i, layer in enumerate(out.layers):
        close(layer["layer_out"], [row.layers[i]["layer_out"] for row in expected])


def test_index_loss_and_recall_match(both):
    out, expected = both
    csa = [i for i, spec in enumerate(TINY.layers) if spec.attention == CSA]
    for i in csa:
        loss = out.layers[i]["index_loss"]
        close(loss.kl, [row.layers[i]["kl"] for row in expected])
        close(loss.recall, [row.layers[i]["recall"] for row in expected])
        np.testing.assert_array_equal(loss.counts, [np.arange(LENGTH) >= TINY.compress_ratios[i] - 1] * 2)


def test_balance_loss_and_load_match(both):
    out, expected = both
    for i, layer in enumerate(out.layers):
        close(layer["balance"], np.mean([row.layers[i]["balance"] for row in expected]))
        chosen = np.concatenate([row.layers[i]["expert_ids"] for row in expected])
        np.testing.assert_array_equal(layer["load"], np.bincount(chosen.ravel(), minlength=TINY.n_routed_experts))


def test_mtp_reads_the_streams_and_the_next_tokens_embedding(params):
    # Position t may depend on tokens up to t+1, and does on t+1; the main logits at t do not.
    tokens = random_tokens()
    changed = tokens.copy()
    changed[:, 20] = (changed[:, 20] + 1) % TINY.vocab_size
    run = lambda tokens: probe("sparse", packed=True)(params, tokens, one_document(), weights_for(2))[0]  # noqa: E731
    before, after = run(tokens), run(changed)
    same = lambda a, b: (np.asarray(a) == np.asarray(b)).all(-1)  # noqa: E731
    assert same(before.mtp_hidden, after.mtp_hidden)[:, :19].all()
    assert not same(before.mtp_hidden, after.mtp_hidden)[:, 19].any()
    assert same(before.logits, after.logits)[:, :20].all()
