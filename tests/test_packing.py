"""A document inside a pack is the document alone: logits, MTP, index loss and gradients, at every kind of offset."""

import numpy as np
import pytest
from support import LENGTH, TINY, leaves_by_name, probe, random_params, random_tokens, run_oracle, weights_for

# Lengths per row; offsets are multiples of neither ratio, some documents hold no entry, the rest of a row is padding.
PACKS = ((7, 13, 1, 11, 3), (2, 17, 22))
MODES = ("sparse", "dense")
DOCUMENTS = [(row, sum(pack[:i]), length) for row, pack in enumerate(PACKS) for i, length in enumerate(pack)]


def segment_ids(pack, first=1):
    ids = np.repeat(np.arange(first, first + len(pack)), pack)
    return np.pad(ids, (0, LENGTH - len(ids))).astype(np.int32)


IDS = np.stack([segment_ids(pack) for pack in PACKS])


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module", params=MODES)
def packed(request, params):
    """(mode, tokens, Output) of the packs."""
    tokens = random_tokens(seed=1)
    return request.param, tokens, probe(request.param, packed=True)(params, tokens, IDS, weights_for(2))[0]


def test_documents_in_a_pack_equal_the_oracle_alone(packed, params):
    mode, tokens, out = packed
    for row, start, length in DOCUMENTS:
        inside = slice(start, start + length)
        alone = run_oracle(TINY, params, tokens[row, inside], mode)
        np.testing.assert_allclose(out.logits[row, inside], alone.logits, rtol=0, atol=6e-5)
        np.testing.assert_allclose(
            out.layers[1]["index_loss"].kl[row, inside], alone.layers[1]["kl"], rtol=0, atol=2e-5
        )
        np.testing.assert_allclose(out.mtp_hidden[row, inside], alone.mtp_hidden, rtol=0, atol=6e-5)


def test_a_document_sees_no_other_document(packed, params):
    mode, tokens, out = packed
    for row, start, length in DOCUMENTS:
        inside = slice(start, start + length)
        others = (tokens + 1) % TINY.vocab_size
        others[row, inside] = tokens[row, inside]
        changed = probe(mode, packed=True)(params, others, IDS, weights_for(2))[0]
        np.testing.assert_array_equal(changed.logits[row, inside], out.logits[row, inside])
        np.testing.assert_array_equal(changed.mtp_hidden[row, inside], out.mtp_hidden[row, inside])


def test_gradients_of_a_document_in_a_pack_equal_those_of_the_document_alone(params):
    row, start, length = DOCUMENTS[1]
    inside = slice(start, start + length)
    tokens = random_tokens(seed=1)
    cotangent = np.random.default_rng(0).normal(size=(length, TINY.vocab_size))
    pack_weights, alone_weights = np.zeros((2, LENGTH, TINY.vocab_size)), np.zeros((2, LENGTH, TINY.vocab_size))
    pack_weights[row, inside], alone_weights[0, :length] = cotangent, cotangent
    alone = np.roll(tokens[[row, row]], -start, axis=1)  # what follows the document is of no consequence
    _, in_pack = probe("sparse", packed=True)(params, tokens, IDS, weights_for(2, logits=pack_weights))
    _, by_itself = probe("sparse", packed=False)(params, alone, IDS, weights_for(2, logits=alone_weights))
    by_itself = leaves_by_name(by_itself)
    for name, value in leaves_by_name(in_pack).items():
        if value.dtype == np.float32:
            scale = max(np.linalg.norm(by_itself[name]), 1e-3)
            assert np.linalg.norm(value - by_itself[name]) < 2e-5 * scale, name


def test_the_plain_layout_equals_one_segment_a_row(params):
    tokens = random_tokens(seed=3)
    ids = np.ones((2, LENGTH), np.int32)
    plain = probe("sparse", packed=False)(params, tokens, ids, weights_for(2))[0]
    packed = probe("sparse", packed=True)(params, tokens, ids, weights_for(2))[0]
    np.testing.assert_allclose(packed.logits, plain.logits, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(packed.layers[1]["selected"], plain.layers[1]["selected"])


def test_padding_is_not_counted_in_the_statistics(params):
    tokens = random_tokens(seed=4)
    ids = np.stack([segment_ids((9, 8)), segment_ids((20,))])
    statistics = ("load", "balance")
    run = lambda tokens: probe("sparse", packed=True)(params, tokens, ids, weights_for(2))[0].layers  # noqa: E731
    first, second = run(tokens), run(np.where(ids == 0, 7, tokens))
    for i, layer in enumerate(first):
        for name in statistics:
            np.testing.assert_allclose(layer[name], second[i][name], rtol=1e-6)
        assert layer["load"].sum() == (ids != 0).sum() * TINY.num_experts_per_tok
