"""Generation with the cache, against the whole forward, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, random_params

from dsv4_jax import model
from dsv4_jax.api import Model
from dsv4_jax.errors import UserError
from dsv4_jax.inference import decoding
from dsv4_jax.inference.generate import Engine, generate
from dsv4_jax.inference.requests import GenerateOptions
from dsv4_jax.inference.sizes import round_up
from dsv4_jax.inference.stop_strings import ShownText
from dsv4_jax.tokenizer import BOS, EOS, Tokenizer

pytestmark = pytest.mark.optimized

PARAMS = random_params(TINY)
LETTERS = Tokenizer([bytes([48 + i]) for i in range(62)] + [BOS.encode(), EOS.encode()], {BOS: 62, EOS: 63})
PROMPTS = [
    np.random.default_rng(i).integers(0, 62, length).astype(np.int32) for i, length in enumerate((1, 12, 17, 30))
]
ROOM, CHUNK = 72, 16


@functools.cache
def engine(rows=4, tokenizer=LETTERS):
    """All with the same few compiled programs."""
    return Engine(TINY, PARAMS, tokenizer, rows=rows, capacity=ROOM, prefill_chunk=CHUNK)


@functools.cache
def uncached():
    """Compiled: (params, tokens [1, ROOM]) -> logits [ROOM, V] of the whole forward."""
    return jax.jit(lambda params, row: model.forward(TINY, params, row).logits[0])


def logits_of(row):
    """Logits [len(row), V] without a cache."""
    return np.asarray(uncached()(PARAMS, np.pad(np.asarray(row, np.int32), (0, ROOM - len(row)))[None]))[: len(row)]


def greedy_by_hand(prompt, count, penalty=1.0):
    """Token by token from the whole forward, penalising by the textbook."""
    row = list(map(int, prompt))
    for _ in range(count):
        logits = logits_of(row)[-1].astype(np.float64)
        seen = sorted(set(row))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        logits[62 + 2 :] = -np.inf
        row.append(int(logits.argmax()))
    return tuple(row[len(prompt) :])


@functools.cache
def greedy():
    """20 greedy tokens for each of PROMPTS, through the cache and together."""
    return [found.tokens for [found] in engine().generate(PROMPTS, GenerateOptions(20, ignore_eos=True))]


def test_greedy_tokens_are_the_most_likely_ones_of_the_whole_forward():
    """Prompts of different lengths in one batch, across windows, blocks and chunks."""
    for prompt, tokens in zip(PROMPTS, greedy(), strict=True):
        logits = logits_of(np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("rows", [1, 2])
def test_greedy_tokens_are_the_same_in_any_batch(rows):
    found = engine(rows).generate(PROMPTS, GenerateOptions(20, ignore_eos=True))
    assert [one.tokens for [one] in found] == greedy()


def test_other_rows_change_no_bit_of_a_continuation_of_the_same_shape():
    """Log-probabilities of every token, bit for bit: alone, beside others, beside others still, in any place."""
    asked = GenerateOptions(12, temperature=1.0, seed=5, logprobs=1, ignore_eos=True)
    others = [PROMPTS[3], PROMPTS[0], PROMPTS[1]]
    [alone] = engine().generate([PROMPTS[2]], asked)[0]
    for place in range(4):
        batch = [*others[:place], PROMPTS[2], *others[place:]]
        options = [GenerateOptions(20, temperature=0.1 * i, seed=i, top_k=3, logprobs=0) for i in range(4)]
        options[place] = asked
        assert engine().generate(batch, options)[place] == [alone]


def test_a_mixed_batch_gives_each_row_what_it_asked_for():
    options = [
        GenerateOptions(9, ignore_eos=True, repetition_penalty=1.8),
        GenerateOptions(20, stop_tokens=[greedy()[1][5]]),
        GenerateOptions(3, ignore_eos=True),
        GenerateOptions(20, temperature=1.0, seed=11),
    ]
    found = [one for [one] in engine().generate(PROMPTS, options)]
    assert found[0].tokens == greedy_by_hand(PROMPTS[0], 9, 1.8)
    first = greedy()[1].index(greedy()[1][5])
    assert found[1].tokens == greedy()[1][:first] and found[1].finish_reason == "stop"
    assert found[2].tokens == greedy()[2][:3] and found[2].finish_reason == "length"
    assert found[3] == engine().generate([PROMPTS[3]], options[3])[0][0]


def test_samples_share_a_prompt_and_are_those_of_its_seeds_one_by_one():
    asked = {"temperature": 1.2, "top_p": 0.9}
    [together] = engine().generate([PROMPTS[3]], GenerateOptions(8, **asked, seed=7, n=6))  # more than fit at once
    singly = engine().generate([PROMPTS[3]] * 6, [GenerateOptions(8, **asked, seed=7 + i) for i in range(6)])
    assert together == [one for [one] in singly]
    assert len({one.tokens for one in together}) > 1


def test_stop_strings_end_the_text_before_them_and_show_nothing_behind():
    text = LETTERS.decode(greedy()[2])
    assert len(text) == 20  # no special token among them
    for stop in (text[4:6], text[7:12], text[19]):
        [found] = engine().generate([PROMPTS[2]], GenerateOptions(20, stop=["never here", stop], ignore_eos=True))[0]
        assert found.finish_reason == "stop" and found.text == text[: text.index(stop)]
        assert len(found.tokens) == text.index(stop) + len(stop)
    [found] = engine().generate([PROMPTS[2]], GenerateOptions(20, stop=[text[18:] + "X"], ignore_eos=True))[0]
    assert found.finish_reason == "length" and found.text == text  # what was held back came at the end


def test_the_end_token_ends_a_text_unless_it_is_ignored():
    params = PARAMS | {"head": PARAMS["head"].at[:, 63].set(PARAMS["head"][:, greedy()[1][3]] * 1.001)}
    first = greedy()[1].index(greedy()[1][3])
    ending = Engine(TINY, params, LETTERS, rows=4, capacity=ROOM, prefill_chunk=CHUNK)
    [found] = ending.generate([PROMPTS[1]], GenerateOptions(20))[0]
    assert (found.tokens, found.finish_reason) == (greedy()[1][:first], "stop")
    assert found.text == LETTERS.decode(found.tokens, skip_special=True)
    [longer] = ending.generate([PROMPTS[1]], GenerateOptions(20, ignore_eos=True))[0]
    assert longer.tokens[first] == 63 and len(longer.tokens) == 20 and EOS not in longer.text


def test_a_stream_brings_the_tokens_in_order_and_adds_up_to_the_whole():
    options = GenerateOptions(20, logprobs=0, ignore_eos=True)
    events = list(engine().stream(PROMPTS[:2], options))
    for prompt in range(2):
        own = [event for event in events if event.prompt == prompt]
        assert [event.tokens for event in own] == [(token,) for token in greedy()[prompt]]
        assert "".join(event.text for event in own) == LETTERS.decode(greedy()[prompt], skip_special=True)
        assert [event.finish_reason for event in own] == [None] * 19 + ["length"]


def test_log_probabilities_are_those_of_the_whole_forward():
    """Of the prompt and of the continuation, whatever temperature it was drawn at."""
    asked = GenerateOptions(10, temperature=0.7, seed=1, logprobs=3, prompt_logprobs=True, ignore_eos=True)
    for prompt, [found] in zip(PROMPTS, engine().generate(PROMPTS, asked), strict=True):
        row = np.concatenate([prompt, found.tokens]).astype(np.int64)
        expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_of(row))))
        assert found.prompt_log_probs is not None
        given_ = [*found.prompt_log_probs, *found.log_probs]
        assert [one.token for one in given_] == row[1:].tolist()
        np.testing.assert_allclose(
            [one.log_prob for one in given_], expected[np.arange(len(row) - 1), row[1:]], atol=2e-5
        )
        for one, log_p in zip(given_, expected, strict=False):
            np.testing.assert_allclose([value for _, value in one.top], -np.sort(-log_p)[:3], atol=2e-5)


def test_a_prompt_can_be_scored_without_a_new_token():
    [found] = engine().generate([PROMPTS[1]], GenerateOptions(0, prompt_logprobs=True))[0]
    assert found.tokens == () and found.finish_reason == "length" and len(found.prompt_log_probs or ()) == 11


def test_longer_texts_of_a_bucket_compile_nothing_new():
    greedy()
    before = decoding.decode._cache_size()
    engine().generate(PROMPTS[1:3], GenerateOptions(31, top_k=2, temperature=0.3, repetition_penalty=1.2))
    assert decoding.decode._cache_size() == before


def test_sizes_are_rounded_up_to_few():
    assert [round_up(n, 1) for n in (1, 2, 3, 5, 8192, 8193, 33_000)] == [1, 2, 4, 8, 8192, 10240, 40960]
    assert round_up(3, 256) == 256


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], GenerateOptions(), "prompt 0 has no tokens"),
        ([[1], [64]], GenerateOptions(), "prompt 1 holds token 64: ids of this model go from 0 to 63"),
        ([[-1]], GenerateOptions(), "holds token -1"),
        (["hello"], GenerateOptions(), "prompt 0 is not made of token ids"),
        ([1, 2, 3], GenerateOptions(), "prompt 0 is no row of token ids"),
        ([["word"]], GenerateOptions(), "not made of token ids"),
        ([[1]], GenerateOptions(stop_tokens=[99]), "stop_tokens of prompt 0 holds token 99"),
        ([[1] * 10], GenerateOptions(TINY.max_position_embeddings), "prompt 0 has 10 tokens; with max_new_tokens"),
        ([[1] * 10], GenerateOptions(ROOM), "needs room for 82 tokens; the engine's rows hold 72"),
        ([[1]], [GenerateOptions()] * 2, "1 prompts and 2 options"),
    ],
)
def test_impossible_requests_are_refused_before_anything_starts(prompts, options, words):
    with pytest.raises(UserError, match=words):
        Engine(TINY, {}, LETTERS, capacity=ROOM).stream(prompts, options)


def test_engines_that_cannot_be_say_so():
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        Engine(TINY, {}).stream([[1]], GenerateOptions(stop=["a"]))
    nothing_special = Engine(TINY, {}, Tokenizer([b"a"], {}))
    with pytest.raises(UserError, match="cannot tell which token is eos"):
        nothing_special.stream([[1]])
    nothing_special.stream([[1]], GenerateOptions(ignore_eos=True))
    with pytest.raises(UserError, match="no cache format 'fp3'"):
        Engine(TINY, {}, cache_format="fp3")
    with pytest.raises(UserError, match="prefill_chunk is 0"):
        Engine(TINY, {}, prefill_chunk=0)


def test_the_face_gives_text_and_the_function_completions():
    letters = Tokenizer(LETTERS.pieces, LETTERS.specials)
    letters.encode_batch = lambda texts, allow_special=False: [[ord(c) - 48 for c in text] for text in texts]
    text = Model(TINY, PARAMS, letters).generate("abc", 5, ignore_eos=True)
    [[found]] = generate(TINY, PARAMS, [[62, 49, 50, 51]], GenerateOptions(5, ignore_eos=True), tokenizer=letters)
    assert text == found.text == LETTERS.decode(found.tokens, skip_special=True)
    with pytest.raises(UserError, match="has no tokenizer"):
        Model(TINY, PARAMS).generate("abc")


@given(st.text("abé€", max_size=30), st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3))
def test_shown_text_is_what_stands_before_the_first_stop_string(text, stops):
    """Byte by byte: never half a character, never a letter that must be taken back."""
    bytes_only = Tokenizer([bytes([i]) for i in range(256)], {})
    shown, parts = ShownText(bytes_only, stops), []
    for byte in text.encode():
        parts.append(shown.feed(byte))
        assert text.startswith("".join(parts)) and not any(stop in "".join(parts) for stop in stops)
        if shown.stopped:
            break
    parts.append(shown.finish())
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    cut = text[: min(ends)] if ends else text
    expected = min((cut[: cut.index(stop)] for stop in stops if stop in cut), key=len, default=text)
    assert "".join(parts) == expected and shown.stopped == bool(ends)
