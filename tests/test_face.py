"""The face that the README shows: a model is a configuration, parameters and pure functions."""

import jax
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

from dsv4_jax.api import Model


@pytest.fixture(scope="module")
def model():
    return Model(TINY, random_params(TINY))


def test_a_forward_is_a_pure_function_to_be_jitted_and_mapped(model):
    tokens = random_tokens(4, length=13).reshape(2, 2, 13)
    one_by_one = jax.jit(lambda params, rows: jax.lax.map(lambda row: model.forward(params, row).logits, rows))
    together = jax.jit(jax.vmap(lambda params, row: model.forward(params, row).logits, in_axes=(None, 0)))
    expected = one_by_one(model.params, tokens)
    assert expected.shape == (2, 2, 13, TINY.vocab_size) and expected.dtype == np.float32
    np.testing.assert_allclose(together(model.params, tokens), expected, rtol=0, atol=2e-5)


def test_a_cache_is_given_and_given_back(model):
    tokens, step = random_tokens(2, length=13), jax.jit(model.forward)
    cache = model.init_cache(batch=2, capacity=24)
    out, after = step(model.params, tokens[:, :8], cache=cache)
    again, after = step(model.params, tokens[:, 5:13], cache=after)
    assert out.logits.shape == again.logits.shape == (2, 8, TINY.vocab_size)
    assert cache.lengths.tolist() == [0, 0] and after.lengths.tolist() == [16, 16]
