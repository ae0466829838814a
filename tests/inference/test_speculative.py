"""Drafts change how fast tokens come, never which: token for token when greedy, in distribution when sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import excess
from support import TINY, random_params

from dsv4_jax import model
from dsv4_jax.errors import UserError
from dsv4_jax.inference.generate import Engine
from dsv4_jax.inference.requests import GenerateOptions, stack_settings
from dsv4_jax.inference.sampling import DRAFT, draw
from dsv4_jax.inference.speculative import seen_along, verify

FEW = TINY.replace(vocab_size=3)  # a random module guesses one token in three right
PARAMS = random_params(FEW)
PROMPTS = [np.random.default_rng(i).integers(0, 3, length).astype(np.int32) for i, length in enumerate((5, 11, 12, 30))]


@functools.cache
def engine(drafts):
    """Of as many rows as the statistics need, so that all tests share its compiled programs."""
    return Engine(FEW, PARAMS, speculative=drafts, rows=256, capacity=72, prefill_chunk=16)


@functools.cache
def greedy():
    """The continuations of PROMPTS without drafts."""
    return [found.tokens for [found] in engine(0).generate(PROMPTS, GenerateOptions(30))]


@pytest.mark.parametrize("drafts", [1, 3])
def test_greedy_output_is_that_of_plain_decoding_token_for_token(drafts):
    found = engine(drafts).generate(PROMPTS, GenerateOptions(30))
    assert [one.tokens for [one] in found] == greedy()
    kept = {accepted for [one] in found for accepted in one.accepted}
    assert kept >= {0, 1} and max(kept) <= drafts  # drafts are kept and rejected in this very test
    for [one] in found:
        assert one.accepted_length == 1 + np.mean(one.accepted)
        assert 1 + sum(one.accepted) + len(one.accepted) >= 30  # the first token needs no step; the last may be cut


def test_drafts_are_what_the_mtp_module_says_without_a_cache():
    """One draft: it is kept exactly where the module's best guess is the token that comes."""
    found = engine(1).generate(PROMPTS, GenerateOptions(30))
    uncached = jax.jit(lambda p, r: model.forward(FEW, p, r, mtp=True, logits=False).mtp_hidden)
    for prompt, [one] in zip(PROMPTS, found, strict=True):
        row = np.concatenate([prompt, one.tokens]).astype(np.int32)
        hidden = uncached(PARAMS, np.pad(row, (0, 61 - len(row)))[None])
        guesses = np.asarray(model.output_logits(PARAMS, hidden)[0].argmax(-1))  # of place t + 2, behind t
        place, expected = len(prompt) + 1, []
        while place < len(row):
            expected.append(int(guesses[place - 2] == row[place]))
            place += 1 + expected[-1]
        assert list(one.accepted[: len(expected)]) == expected and len(one.accepted) == len(expected)


def test_penalties_stops_and_seeds_mean_the_same_with_drafts():
    options = [
        GenerateOptions(20, repetition_penalty=1.5),
        GenerateOptions(20, stop_tokens=[greedy()[1][4]]),
        GenerateOptions(7),
        GenerateOptions(20, temperature=1.0, top_k=1, seed=3),
    ]
    plain, drafted = (engine(drafts).generate(PROMPTS, options) for drafts in (0, 3))
    for [a], [b] in zip(plain, drafted, strict=True):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
    assert plain[1][0].finish_reason == "stop" and len(plain[2][0].tokens) == 7


def test_sampled_continuations_have_the_probabilities_of_the_model():
    """All 81 continuations of 4 tokens, exactly, against 4,096 seeds; one draft and three."""
    prompt, options = PROMPTS[1], {"max_new_tokens": 4, "temperature": 1.3, "top_p": 0.95}
    every = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), -1).reshape(-1, 4).astype(np.int32)
    rows = np.concatenate([np.broadcast_to(prompt, (81, len(prompt))), every], 1)
    logits = jax.jit(lambda p, r: model.forward(FEW, p, r).logits)(PARAMS, rows)[:, len(prompt) - 1 : -1] / 1.3
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    order = np.argsort(-p, -1)
    before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    kept = np.put_along_axis(mask := np.zeros(p.shape, bool), order, before < 0.95, -1) or mask
    p = np.where(kept, p, 0) / np.where(kept, p, 0).sum(-1, keepdims=True)
    p = np.take_along_axis(p, every[..., None], -1)[..., 0].prod(1)
    for drafts in (1, 3):
        asked = [GenerateOptions(**options, seed=seed) for seed in range(4096)]
        found = engine(drafts).generate([prompt] * 4096, asked)
        cells = np.array([one.tokens for [one] in found]) @ [27, 9, 3, 1]
        assert excess(np.bincount(cells, minlength=81), p) < 0
        assert 0.1 < np.mean([a > 0 for [one] in found for a in one.accepted]) < 0.9


def test_a_verified_token_has_the_targets_probability_whatever_was_proposed():
    """40,000 rows of random p and q over 5 tokens, two drafts: each place that is reached is drawn from its own p."""
    rng, count = np.random.default_rng(0), 40_000
    p, q = rng.dirichlet(np.ones(5), 3), rng.dirichlet(np.ones(5) / 2, 2)
    q[1] = p[1]  # a perfect proposal is always kept
    settings = stack_settings([GenerateOptions(temperature=1.0, seed=seed).settings(0, 5) for seed in range(count)])
    wide = lambda x: jnp.broadcast_to(jnp.log(jnp.asarray(x, jnp.float32)), (count, *x.shape))  # noqa: E731
    places = jnp.full(count, 9)
    drafts = jnp.stack([draw(wide(q[i]), settings, places + i, DRAFT) for i in range(2)], 1)
    accepted, instead = map(np.asarray, jax.jit(verify)(wide(p), wide(q), drafts, settings, places))
    assert set(accepted) == {0, 2}
    tokens = np.where(np.arange(3) == accepted[:, None], instead[:, None], np.pad(drafts, ((0, 0), (0, 1))))
    for place in range(3):
        reached = tokens[accepted >= place, place]
        assert excess(np.bincount(reached, minlength=5), p[place]) < 0
    kept = np.minimum(p[0], q[0]).sum()
    assert abs((accepted > 0).mean() - kept) < 4 * np.sqrt(kept * (1 - kept) / count)


def test_the_penalty_of_each_place_knows_the_drafts_before_it():
    seen = jnp.array([[True, False, False, False]])
    np.testing.assert_array_equal(seen_along(seen, jnp.array([[2, 1]]))[0], [[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])


def test_models_without_the_module_say_so():
    with pytest.raises(UserError, match="needs a multi-token-prediction module"):
        kinds = {"compress_ratios": FEW.compress_ratios[:3], "layer_types": FEW.layer_types[:3]}
        plain = FEW.replace(num_nextn_predict_layers=0, **kinds)
        Engine(plain, {}, speculative=1)
    with pytest.raises(UserError, match="speculative is 9: from 0"):
        Engine(FEW, PARAMS, speculative=9)
