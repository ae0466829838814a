"""Numbers behind the article's claims, by hand: consistency across paraphrases and balance of routing."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from support import TINY, random_params, random_tokens, run_oracle

import dsv4_jax as dsv4
from dsv4_jax.analysis.balance import plot_balance, routing_balance
from dsv4_jax.analysis.consistency import consistency, divergences, plot_consistency
from dsv4_jax.config import LayerSpec
from dsv4_jax.errors import UserError

CONFIG = TINY.replace(
    num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(0,), layer_types=TINY.layer_types[:1]
)


def test_divergences_are_those_of_scipy():
    log_p = np.random.default_rng(0).normal(size=(4, 9))
    log_p -= np.logaddexp.reduce(log_p, -1, keepdims=True)
    expected = [[jensenshannon(np.exp(a), np.exp(b), 2) ** 2 for a in log_p] for b in log_p]
    np.testing.assert_allclose(divergences(log_p), expected, atol=1e-12)


def test_consistency_compares_what_follows_each_text(tmp_path):
    model, tokens = dsv4.Model(CONFIG, random_params(CONFIG)), random_tokens(4, length=9)
    texts = [list(tokens[0]), list(tokens[1, :6]), list(tokens[2]), list(tokens[3, :4])]
    found = consistency(model, [texts[:2], texts[2:]])
    last = np.stack([run_oracle(CONFIG, model.params, np.array(text)).logits[-1] for text in texts])
    last -= np.logaddexp.reduce(last, -1, keepdims=True)
    apart = divergences(last)
    np.testing.assert_allclose(found.within, [apart[0, 1], apart[2, 3]], atol=1e-5)
    np.testing.assert_allclose(found.between, apart[:2, 2:].mean(), atol=1e-5)
    np.testing.assert_allclose(found.ratio, found.within.mean() / found.between, rtol=1e-6)
    same = consistency(model, [[texts[0]] * 2, [texts[1]] * 2])
    assert same.ratio < 1e-4 < found.ratio
    assert plot_consistency({"a": found, "b": same}, tmp_path / "c.png").stat().st_size > 3000
    with pytest.raises(UserError, match="two groups"):
        consistency(model, [texts])


def trace_of(ids, weights):
    experts = SimpleNamespace(expert_ids=jnp.asarray(ids), weights=jnp.asarray(weights))
    hashed = SimpleNamespace(spec=LayerSpec("sliding_attention", 0, "hash_moe"), experts=experts)
    learned = SimpleNamespace(spec=LayerSpec("heavily_compressed_attention", 128, "moe"), experts=experts)
    return SimpleNamespace(config=TINY, layers=[hashed, learned])


def test_balance_by_hand(tmp_path):
    even = trace_of([[[0, 1], [2, 3], [4, 5]]], np.full((1, 3, 2), 0.75))
    found = routing_balance(even)
    assert found.layers == ("1 HCA/128",) and not found.dead.any()
    np.testing.assert_allclose([*found.used, *found.sharpness, *found.load[0]], [1, 0.5, *[1] * 6])
    collapsed = trace_of([[[0, 1], [0, 1], [4, 5]]], [[[0.9, 0.6], [0.9, 0.6], [0.1, 1.4]]])
    found = routing_balance(collapsed, counted=[[True, True, False]])
    np.testing.assert_allclose([*found.used, *found.sharpness], [2 / 6, 0.6])
    np.testing.assert_allclose(found.load[0], [3, 3, 0, 0, 0, 0])
    assert found.dead.tolist() == [4]
    assert plot_balance({"with": routing_balance(even), "without": found}, tmp_path / "b.png").stat().st_size > 3000
    with pytest.raises(UserError, match="no learned router"):
        routing_balance(SimpleNamespace(config=TINY, layers=even.layers[:1]))
