"""The face that the README shows: a model is a configuration, parameters and pure functions."""

import jax
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

from dsv4_jax.api import Model, load
from dsv4_jax.checkpoint import save
from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import ByteTokenizer


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


def test_a_donated_cache_is_written_in_place(model):
    tokens = random_tokens(2, length=13)
    kept, given = (model.init_cache(batch=2, capacity=24) for _ in range(2))
    out, _ = model.forward(model.params, tokens[:, :8], cache=kept)
    pools = jax.tree.leaves(given.pools)
    again, after = model.forward(model.params, tokens[:, :8], cache=given, donate=True)
    np.testing.assert_array_equal(out.logits, again.logits)
    assert all(pool.is_deleted() for pool in pools) and after.lengths.tolist() == [8, 8]
    assert not any(x.is_deleted() for x in jax.tree.leaves((kept, model.params)))


def test_tokens_that_cannot_be_are_refused_in_words(model):
    cache = model.init_cache(batch=1, capacity=24)
    with pytest.raises(UserError, match="25 tokens do not fit a cache for 24"):
        model.forward(model.params, random_tokens(1, length=25), cache=cache)
    for stray in (64, -1):
        with pytest.raises(UserError, match=f"tokens holds token {stray}: ids of this model go from 0 to 63"):
            model.forward(model.params, [[1, stray]])
    with pytest.raises(UserError, match="different lengths"):
        model.forward(model.params, [[1], [2, 3]])
    with pytest.raises(UserError, match="made of token ids"):
        model.forward(model.params, [[1.5]])
    with pytest.raises(UserError, match=r"shape \(2,\)"):
        model.forward(model.params, [1, 2])
    assert jax.eval_shape(lambda one: model.forward(model.params, [[one]]).logits, 1).shape == (1, 1, TINY.vocab_size)


def test_what_one_text_cannot_show_is_refused(model):
    spoken = Model(TINY, {}, ByteTokenizer())
    for options in ({"n": 2, "temperature": 1.0}, {"logprobs": 1}, {"prompt_logprobs": True}):
        with pytest.raises(UserError, match="generate gives one text"):
            spoken.generate("a", **options)


def test_a_folder_of_one_model_has_no_steps(model, tmp_path):
    save(tmp_path / "model", TINY, model.params)
    with pytest.raises(UserError, match="no steps, so there is no step 7"):
        load(tmp_path / "model", step=7)
