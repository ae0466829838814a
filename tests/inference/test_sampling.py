"""Choosing tokens, against a numpy statement of each filter and against the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import excess

from dsv4_jax.errors import UserError
from dsv4_jax.inference.requests import GenerateOptions, stack_settings
from dsv4_jax.inference.sampling import ACCEPT, DRAFT, PLAIN, draw, log_probabilities, random_keys, weigh

V = 50
weigh_jit, draw_jit = jax.jit(weigh), jax.jit(draw, static_argnums=3)


def settings_of(*rows, vocab_size=V, **same):
    """`Settings` of rows given as keywords of `GenerateOptions`."""
    return stack_settings([GenerateOptions(**{"seed": 0} | same | row).settings(0, vocab_size) for row in rows])


def stated(logits, seen, o, vocab_size=V):
    """Probabilities [V] of one row, token by token in float64: penalty, temperature, top-k, top-p, min-p."""
    x = np.array(logits, np.float64)
    for token in np.flatnonzero(seen):
        x[token] = x[token] / o.repetition_penalty if x[token] > 0 else x[token] * o.repetition_penalty
    x[vocab_size:] = -np.inf
    if o.temperature == 0:
        return np.eye(V)[x.argmax()]
    p = np.exp(x / o.temperature - (x / o.temperature).max())
    order = np.argsort(-p, kind="stable")
    kept = list(order[: o.top_k] if o.top_k else order)
    total, mass, nucleus = sum(p[t] for t in kept), 0.0, []
    for token in kept:
        if mass < o.top_p or o.top_p == 1:
            nucleus.append(token)
        mass += p[token] / total
    final = [t for t in nucleus if p[t] >= o.min_p * p[order[0]]]
    out = np.zeros(V)
    out[final] = p[final] / p[final].sum()
    return out


def test_every_mixture_of_settings_gives_the_stated_probabilities():
    rng = np.random.default_rng(0)
    options = [
        GenerateOptions(
            temperature=float(rng.choice([0, 0.3, 1, 2.5])),
            top_k=int(rng.choice([0, 1, 3, 20, 99])),
            top_p=float(rng.choice([1, 0.9, 0.5, 0.01])),
            min_p=float(rng.choice([0, 0, 0.05, 0.5, 1])),
            repetition_penalty=float(rng.choice([1, 1.3, 0.7])),
            seed=0,
        )
        for _ in range(200)
    ]
    logits, seen = rng.normal(size=(200, V)).astype(np.float32) * 3, rng.random((200, V)) < 0.3
    for vocab_size in (V, 31):
        settings = stack_settings([o.settings(0, vocab_size) for o in options])
        got = jax.nn.softmax(weigh_jit(logits, settings, seen))
        for row, o in enumerate(options):
            np.testing.assert_allclose(
                got[row], stated(logits[row], seen[row], o, vocab_size), atol=2e-6, err_msg=str(o)
            )


def test_temperature_zero_takes_the_first_of_the_most_likely_tokens():
    logits = jnp.zeros((2, V)).at[:, jnp.array([7, 9])].set(4.0)
    settings = settings_of({"top_p": 0.1, "top_k": 3, "min_p": 1.0}, {"seed": 5})
    tokens = draw_jit(weigh_jit(logits, settings, jnp.zeros((2, V), bool)), settings, jnp.arange(2))
    np.testing.assert_array_equal(tokens, [7, 7])


def test_a_tiny_temperature_is_the_greedy_one_and_never_nan():
    logits = np.random.default_rng(1).normal(size=(1, V)).astype(np.float32) * 30
    settings = settings_of({"temperature": 1e-30, "top_p": 0.5})
    weighed = weigh_jit(logits, settings, np.zeros((1, V), bool))
    assert not np.isnan(weighed).any() and int(draw_jit(weighed, settings, jnp.zeros(1, int))[0]) == logits.argmax()


@pytest.mark.parametrize("asked", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5}])
def test_tokens_come_as_often_as_their_probability_says(asked):
    """Chi-square over 20,000 seeds."""
    o, count = GenerateOptions(**{"temperature": 1.0, "seed": 0} | asked), 20_000
    logits = np.random.default_rng(2).normal(size=V).astype(np.float32) * 2
    p = stated(logits, np.zeros(V, bool), o)
    settings = stack_settings([o.settings(seed, V) for seed in range(count)])
    rows = np.broadcast_to(logits, (count, V))
    tokens = draw_jit(weigh_jit(rows, settings, np.zeros((count, V), bool)), settings, jnp.full(count, 3))
    assert excess(np.bincount(tokens, minlength=V), p) < 0


def test_what_a_row_draws_depends_on_its_own_logits_seed_and_place_alone():
    rng = np.random.default_rng(3)
    logits, seen, places = rng.normal(size=(8, V)).astype(np.float32), rng.random((8, V)) < 0.2, np.arange(8)
    rows = [{"seed": i, "temperature": 1.0 + i / 8, "top_p": 0.9, "repetition_penalty": 1.1} for i in range(8)]
    together = draw_jit(weigh_jit(logits, settings_of(*rows), seen), settings_of(*rows), places)
    order = rng.permutation(8)
    moved = settings_of(*(rows[i] for i in order))
    np.testing.assert_array_equal(
        draw_jit(weigh_jit(logits[order], moved, seen[order]), moved, places[order]), together[order]
    )
    for i in range(8):
        own = settings_of(rows[i])
        alone = draw_jit(weigh_jit(logits[i : i + 1], own, seen[i : i + 1]), own, places[i : i + 1])
        assert int(alone[0]) == int(together[i])


def test_random_numbers_of_other_places_seeds_and_purposes_are_others():
    seeds, places = jnp.array([0, 0, 1, 1], jnp.uint32), jnp.array([0, 1, 0, 1])
    drawn = [jax.vmap(jax.random.uniform)(random_keys(seeds, places, purpose)) for purpose in (PLAIN, DRAFT, ACCEPT)]
    assert len(np.unique(np.concatenate(drawn))) == 12


def test_log_probabilities_are_those_of_the_softmax():
    logits = np.random.default_rng(4).normal(size=(3, 2, V)).astype(np.float32)
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    p = np.exp(logits.astype(np.float64))
    expected = np.log(p / p.sum(-1, keepdims=True))
    found = log_probabilities(jnp.asarray(logits), jnp.asarray(tokens), 5)
    np.testing.assert_allclose(found.chosen, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-expected, -1)[..., :5])
    np.testing.assert_allclose(found.top, -np.sort(-expected, -1)[..., :5], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0: it must be above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": "text"}, "a list of strings"),
        ({"stop": [""]}, "none empty"),
        ({"n": 0}, "n is 0"),
        ({"max_new_tokens": 3.5}, "max_new_tokens is 3.5: it must be a whole number"),
        ({"max_new_tokens": True}, "must be a whole number"),
        ({"top_k": 2**40}, "below 2\\^31"),
        ({"top_p": None}, "top_p is None: it must be a number"),
        ({"temperature": "1"}, "temperature is '1': it must be a number"),
        ({"logprobs": 1.5}, "logprobs is 1.5"),
        ({"seed": "1"}, "seed is '1'"),
        ({"stop": None}, "stop is None: it must be a list of strings"),
        ({"stop": [5]}, "a list of strings"),
        ({"stop_tokens": 5}, "stop_tokens is 5: it must be a list of token ids"),
        ({"stop_tokens": [1.5]}, "a list of token ids"),
        ({"n": 2}, "2 continuations at temperature 0 would all be the same"),
    ],
)
def test_impossible_options_are_refused_in_words(wrong, words):
    with pytest.raises(UserError, match=words):
        GenerateOptions(**wrong)
