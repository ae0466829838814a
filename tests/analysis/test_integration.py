"""Attention by distance: against the float64 statement's masses."""

import numpy as np
import pytest
from support import LENGTH, TINY, random_params, random_tokens, run_oracle

import dsv4_jax as dsv4
from dsv4_jax.analysis.integration import context_integration, plot_integration, weighted_median
from dsv4_jax.config import CSA, SLIDING
from dsv4_jax.errors import UserError

QUERIES = (19, 33, LENGTH - 1)


def test_mass_by_distance_is_that_of_the_statement(tmp_path):
    model, tokens = dsv4.Model(TINY, random_params(TINY)), random_tokens()
    found = context_integration(dsv4.trace(model, tokens[:1], queries=QUERIES))
    stated = run_oracle(TINY, model.params, tokens[0]).layers
    assert found.layers == ("1 CSA/4", "2 HCA/6") and found.edges.tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    for row, (i, spec) in enumerate((i, spec) for i, spec in enumerate(TINY.layers) if spec.attention != SLIDING):
        expected, pairs = np.zeros(len(found.edges) - 1), []
        for t in QUERIES:
            ids = stated[i]["selected"][t] if spec.attention == CSA else np.arange((t + 1) // spec.ratio)
            for entry, mass in zip(ids, stated[i]["mass"][t][1].mean(0), strict=True):
                distance = t - (spec.ratio * (entry + 1) - 1)
                expected[np.searchsorted(found.edges, distance, side="right") - 1] += mass / len(QUERIES)
                pairs.append((distance, mass))
        np.testing.assert_allclose(found.mass[row], expected, atol=1e-5)
        np.testing.assert_allclose(found.uniform[row].sum(), expected.sum(), atol=1e-5)
        pairs.sort()
        reached = np.cumsum([mass for _, mass in pairs])
        assert found.median[row] == pairs[int((reached < reached[-1] / 2).sum())][0]
    assert plot_integration(found, tmp_path / "reach.png").stat().st_size > 5000


def test_an_even_spread_by_hand():
    assert weighted_median(np.array([5, 1, 9]), np.array([0.2, 0.2, 0.6])) == 9
    assert np.isnan(weighted_median(np.array([5]), np.array([0.0])))


def test_a_trace_that_cannot_say():
    empty = type("T", (), {"queries": ()})
    with pytest.raises(UserError, match="queries="):
        context_integration(empty)
