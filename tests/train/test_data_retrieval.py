import builtins
import itertools
import re

import numpy as np
import pytest

from dsv4_jax.tokenizer import ByteTokenizer, train_bpe
from train.data.manifest import Manifest
from train.data.retrieval import RecallScore, RecallTask, Words, recall_batches
from train.data.tokens import TokenStore

WORDS = [name for name in dir(builtins) if re.fullmatch("[a-z]{3,10}", name)]
TEXT = "".join(f"{a} {b} set {a}\n{b} {a}\nset\n" for a, b in itertools.product(WORDS, WORDS[::9]))
STORES = {
    name: TokenStore.from_texts([TEXT, TEXT[::-1]], tokenizer, [False, True], Manifest("words"))
    for name, tokenizer in {"bpe": train_bpe([TEXT], 700), "bytes": ByteTokenizer()}.items()
}


@pytest.fixture(params=STORES.values(), ids=STORES.keys())
def store(request):
    return request.param


def lookup(tokens, place):
    """The value last given to the name asked at `place`, found by reading backwards."""
    for i in range(place - 3, 1, -1):
        if tokens[i - 1] == tokens[place - 1] and tokens[i - 2] == tokens[place - 2]:
            return tokens[i], place - i
    raise AssertionError("never stated")


def test_every_answer_was_stated_at_the_given_distance(store):
    task = RecallTask(n_pairs=4, min_distance=40)
    for seed in range(20):
        document = task.document(store, 400, (seed,))
        assert document.tokens.shape == (400,) and document.tokens.dtype == np.int32
        assert len(document.answers) == 4 * ((400 - 2 - 16 - 3) // 56)
        for place, distance in zip(document.answers, document.distances, strict=True):
            assert lookup(document.tokens, place) == (document.tokens[place], distance)
        assert document.distances.min() >= 40


def test_statements_read_as_text_and_tokens_are_the_usual_ones(store):
    task = RecallTask(n_pairs=3, min_distance=50, rounds=1, phase=0)
    document = task.document(store, 200, (1,))
    head = document.tokens[1:13].tolist()
    assert store.tokenizer.encode(store.tokenizer.decode(head)) == head
    pattern = "set [a-z]+ [a-z]+" if store is STORES["bpe"] else "=[a-z][A-Z0-9]"
    assert all(re.fullmatch(pattern, line) for line in store.tokenizer.decode(head).splitlines())


def test_documents_depend_on_the_seed_only(store):
    task = RecallTask(n_pairs=4, min_distance=40)
    assert np.array_equal(task.document(store, 300, (7,)).tokens, task.document(store, 300, (7,)).tokens)
    assert not np.array_equal(task.document(store, 300, (7,)).tokens, task.document(store, 300, (8,)).tokens)


def test_pairings_are_random(store):
    task = RecallTask(n_pairs=8, min_distance=40, rounds=1)
    words = Words.of(store.tokenizer, 64, 64)
    values = [task.document(store, 200, (seed,)) for seed in range(200)]
    answers = np.concatenate([document.tokens[document.answers] for document in values])
    counts = np.array([(answers == value).sum() for value in words.values])
    assert counts.sum() == 1600 and counts.max() < 4 * 1600 / len(counts)


def test_phases_cover_every_residue_and_can_be_fixed(store):
    free, fixed = RecallTask(n_pairs=2, min_distance=20, rounds=1), RecallTask(2, 20, 1, phase=3)
    names = Words.of(store.tokenizer, 64, 64).names
    first = [int(np.flatnonzero(np.isin(free.document(store, 60, (s,)).tokens, names))[0]) for s in range(40)]
    assert len(set(first)) >= 4 or store is STORES["bytes"]
    document = fixed.document(store, 60, (0,))
    assert {int(a - d - 2) for a, d in zip(document.answers, document.distances, strict=True)} == {4, 8}


def test_the_score_counts_exact_answers_by_distance_and_phase(store):
    task = RecallTask(n_pairs=4, min_distance=30, rounds=2)
    perfect, blind = RecallScore(), RecallScore()
    for batch in recall_batches(store, task, 200, 3, 6):
        assert batch["tokens"].shape == (3, 200) and batch["answers"].sum() == 24
        perfect.add(batch, np.roll(batch["tokens"], -1, axis=1))
        blind.add(batch, np.zeros_like(batch["tokens"]))
    assert perfect.accuracy == 1 and blind.accuracy == 0
    assert set(perfect.by_distance([0, 30, 60, 120]).values()) == {1.0} and 0 not in perfect.by_distance([0, 30])
    assert set(perfect.by_phase().values()) == {1.0}


def test_guessing_among_the_values_reaches_the_stated_chance(store):
    task = RecallTask(n_pairs=4, min_distance=30)
    words, score, rng = Words.of(store.tokenizer, 64, 64), RecallScore(), np.random.default_rng(0)
    for batch in recall_batches(store, task, 400, 10, 100):
        score.add(batch, rng.choice(words.values, batch["tokens"].shape))
    chance = task.chance(store.tokenizer)
    assert chance["shown"] == 0.25 and score.accuracy == pytest.approx(chance["blind"], abs=0.02)


def test_rows_that_are_too_short_say_what_they_need(store):
    task = RecallTask(n_pairs=4, min_distance=100)
    with pytest.raises(ValueError, match="need a row of 137 tokens"):
        task.document(store, 100, (0,))
    assert len(task.document(store, 137, (0,)).answers) == 4
    with pytest.raises(ValueError, match="100 pairs need as many single-token words"):
        RecallTask(n_pairs=100, min_distance=1).document(store, 2000, (0,))
