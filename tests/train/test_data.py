import dataclasses
import itertools
import json
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, ByteTokenizer
from train.data.manifest import Manifest
from train.data.packing import FirstFit, shuffled
from train.data.pipeline import BatchConfig, Rows, TrainBatches, bits_per_byte, documents_within, heldout_batches
from train.data.retrieval import RecallTask
from train.data.tasks.rows import TaskSource
from train.data.tokens import TokenStore
from train.recipe import find_recipe
from train.run_data import describe_passes


def made(sizes, heldout=4) -> TokenStore:
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, size)) for size in sizes]
    return TokenStore.from_texts(texts, ByteTokenizer(), [i < heldout for i in range(len(texts))], Manifest("made"))


STORE = made([5, 40, 100, 17, *np.random.default_rng(1).integers(1, 150, 60)])
RECALL = RecallTask(n_pairs=2, min_distance=8)


def take(iterator, n):
    batches = list(itertools.islice(iterator, n))
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def documents_in(batches):
    """The pieces of documents found in batches, in order, as lists of ids."""
    names = ("tokens", "segment_ids", "positions")
    tokens, segments, positions = (batches[name].reshape(-1, batches[name].shape[-1]) for name in names)
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            where = np.flatnonzero(segments[row] == segment)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            assert np.array_equal(positions[row, where], np.arange(len(where)))
            yield tokens[row, where].tolist()


CONFIGS = {
    "plain": BatchConfig(64, 4, seed=3),
    "fim": BatchConfig(64, 4, seed=3, fim_rate=0.5),
    "aligned": BatchConfig(64, 4, seed=3, align=8, fim_rate=0.3),
    "first fit": BatchConfig(64, 4, seed=3, packing="first_fit", align=4),
    "recall": BatchConfig(64, 4, seed=3, recall=RECALL, mixture=0.3),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def test_rows_equal_grains_own_concat_then_split():
    order, _ = shuffled(STORE.lengths[STORE.train_documents], 3, 0)
    source = [{"tokens": STORE.document(STORE.train_documents[i]).astype(np.int32)} for i in order]
    packed = grain.experimental.ConcatThenSplitIterDataset(
        grain.MapDataset.source(source).to_iter_dataset(), length_struct={"tokens": 64}
    )
    ours = TrainBatches(STORE, BatchConfig(64, 1, seed=3))
    complete = int(STORE.lengths[STORE.train_documents].sum()) // 64
    for theirs, batch in zip(itertools.islice(packed, complete), ours, strict=False):
        assert np.array_equal(theirs["tokens"], batch["tokens"][0])
        assert np.array_equal(theirs["tokens_positions"], batch["positions"][0])
        assert np.array_equal(theirs["tokens_segment_ids"], batch["segment_ids"][0])


def test_batches_are_int32_and_padding_is_segment_zero(config):
    batches = take(TrainBatches(STORE, config), 30)
    assert {name: array.dtype for name, array in batches.items()} == dict.fromkeys(batches, np.dtype(np.int32))
    assert batches["tokens"].shape == (30, 4, 64)
    padding = batches["segment_ids"] == 0
    assert np.all(batches["tokens"][padding] == STORE.tokenizer.pad_id) and not batches["positions"][padding].any()
    list(documents_in(batches))


def test_an_epoch_holds_every_training_document_once_in_another_order_each_time():
    total = int(STORE.lengths[STORE.train_documents].sum())
    stream = take(TrainBatches(STORE, BatchConfig(64, 1, seed=3)), 2 * total // 64 + 1)["tokens"].ravel()
    expected = sorted(STORE.document(i).tolist() for i in STORE.train_documents)
    orders = []
    for epoch in (stream[:total], stream[total : 2 * total]):
        found = [part.tolist() for part in np.split(epoch, np.flatnonzero(epoch == STORE.tokenizer.bos_id)[1:])]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(config):
    once, again = (take(TrainBatches(STORE, config), 40) for _ in range(2))
    other = take(TrainBatches(STORE, BatchConfig(64, 4, seed=4)), 40)
    assert same(once, again) and not same(once, other)


@pytest.mark.parametrize("step", [0, 1, 7, 33])
def test_a_saved_state_resumes_to_the_bit(config, step):
    reference = TrainBatches(STORE, config)
    take(reference, step) if step else None
    state = json.loads(json.dumps(reference.get_state()))
    rest = take(reference, 20)
    resumed = TrainBatches(STORE, config)
    take(resumed, 3)
    resumed.set_state(state)
    assert same(take(resumed, 20), rest)
    assert resumed.get_state() == reference.get_state() and resumed.offset == reference.offset


def test_two_and_four_processes_together_see_the_batch_of_one(config):
    whole = take(TrainBatches(STORE, config), 25)
    for count in (2, 4):
        parts = [take(TrainBatches(STORE, config, range(i, 4, count)), 25) for i in range(count)]
        assert all(same(part, {k: x[:, i::count] for k, x in whole.items()}) for i, part in enumerate(parts))


def test_a_state_resumes_on_another_number_of_processes(config):
    whole = TrainBatches(STORE, config)
    take(whole, 5)
    half = TrainBatches(STORE, config, (0, 3))
    half.set_state(whole.get_state())
    assert np.array_equal(next(half)["tokens"], next(whole)["tokens"][[0, 3]])
    assert half.get_state() == whole.get_state()


@pytest.mark.parametrize("changes", [{}, {"fim_rate": 0.4}, {"align": 8}])
def test_a_stage_with_longer_rows_goes_on_where_the_last_one_ended(changes):
    short = TrainBatches(STORE, BatchConfig(32, 4, seed=3, **changes))
    head = take(short, 6)["tokens"].ravel()
    long = take(TrainBatches(STORE, BatchConfig(128, 2, seed=3, start=short.offset, **changes)), 10)["tokens"].ravel()
    straight = take(TrainBatches(STORE, BatchConfig(64, 1, seed=3, **changes)), 40)["tokens"].ravel()
    both = np.concatenate([head, long])
    assert np.array_equal(both[: len(straight)], straight[: len(both)])


def test_recall_rows_displace_no_text():
    mixed = TrainBatches(STORE, CONFIGS["recall"])
    tokens = take(mixed, 50)["tokens"].reshape(200, 64)
    is_recall = np.array([(i + 1) * 0.3 // 1 > i * 0.3 // 1 for i in range(200)])
    text = take(TrainBatches(STORE, BatchConfig(64, 1, seed=3)), 140)["tokens"].reshape(140, 64)
    assert np.array_equal(tokens[~is_recall], text) and mixed.offset == 140 * 64
    assert len({row.tobytes() for row in tokens[is_recall]}) == 60


def test_first_fit_keeps_short_documents_whole_and_loses_nothing():
    store = made([1] * 4 + [int(n) for n in np.random.default_rng(2).integers(1, 120, 50)])
    packed, rows = TrainBatches(store, BatchConfig(64, 1, packing="first_fit")), []
    expected = sorted(
        store.document(i)[a : a + 64].tolist()
        for i in store.train_documents
        for a in range(0, int(store.lengths[i]), 64)
    )
    found: list[list[int]] = []
    while len(found) < len(expected):
        rows.append(next(packed))
        found += documents_in({k: v[None] for k, v in rows[-1].items()})
    assert sorted(found) == expected
    assert np.mean([row["segment_ids"] > 0 for row in rows]) > 0.8


def plainly_packed(lengths, row_length, seed, align=1, epoch=0):
    """First fit over 32 open rows, as one writes it down: a list of (document, begin, end, column) for each row."""
    closed, opened = [], []
    for document in np.random.default_rng([seed, epoch, 0]).permutation(len(lengths)).tolist():
        for begin in range(0, int(lengths[document]), row_length):
            end = min(begin + row_length, int(lengths[document]))
            row = next((row for row in opened if row[0] + end - begin <= row_length), None)
            if row is None:
                closed += [opened.pop(0)] if len(opened) == 32 else []
                opened.append(row := [0, []])
            row[1].append((document, begin, end, row[0]))
            row[0] = -(-(row[0] + end - begin) // align) * align
    return [pieces for _, pieces in closed + opened]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=300).filter(any),
    st.sampled_from([(64, 1), (64, 8), (48, 3), (1, 1), (128, 128)]),
    st.integers(0, 2),
)
def test_first_fit_is_first_fit(sizes, shape, seed):
    (row_length, align), lengths = shape, np.array(sizes)
    packing = FirstFit(lambda epoch: lengths, row_length, seed, align=align)
    rows = [row for epoch in (0, 1) for row in plainly_packed(lengths, row_length, seed, align, epoch)]
    assert [[tuple(piece[1:]) for piece in packing.row(i)] for i in range(len(rows))] == rows
    assert next(packing.row(len(rows))).epoch == 2


def test_first_fit_plans_many_documents_in_a_small_part_of_the_time_it_takes_plainly():
    lengths = np.random.default_rng(0).lognormal(6, 1, 60_000).astype(np.int64) + 2
    began = time.process_time()
    rows = plainly_packed(lengths, 4096, 0)
    plainly = time.process_time() - began
    packing = FirstFit(lambda epoch: lengths, 4096, 0)
    began = time.process_time()
    first = list(packing.row(0))
    assert time.process_time() - began < plainly / 2  # a sixth or less when seen
    assert [tuple(piece[1:]) for piece in first] == rows[0]
    assert [tuple(piece[1:]) for piece in packing.row(len(rows) - 1)] == rows[-1]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=3, max_size=20),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["concat", "first_fit"]),
    st.integers(0, 5),
)
def test_every_document_begins_at_a_multiple_of_the_alignment(sizes, align, packing, seed):
    store = made(sizes, heldout=1)
    batches = take(TrainBatches(store, BatchConfig(32, 2, seed=seed, packing=packing, align=align)), 6)
    assert not (np.flatnonzero((batches["positions"] == 0) & (batches["segment_ids"] > 0)) % align).any()
    assert not (np.flatnonzero(batches["tokens"] == store.tokenizer.bos_id) % align).any()


def test_fill_in_the_middle_rearranges_the_given_share_and_can_be_undone():
    store = made([10] * 4 + [30] * 200)
    begin, hole, end = (store.tokenizer.special_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
    total = int(store.lengths[store.train_documents].sum())
    stream = take(TrainBatches(store, BatchConfig(64, 1, fim_rate=0.1)), total // 64)["tokens"].ravel()
    originals = {tuple(store.document(i).tolist()) for i in store.train_documents}
    changed = 0
    for part in np.split(stream, np.flatnonzero(stream == store.tokenizer.bos_id)[1:])[:-1]:
        part = part.tolist()
        if begin in part:
            changed += 1
            a, b, c = part.index(begin), part.index(hole), part.index(end)
            assert a == 1
            part = part[:1] + part[a + 1 : b] + part[c + 1 : -1] + part[b + 1 : c] + part[-1:]
        assert tuple(part) in originals
    assert 8 <= changed <= 34


def test_states_of_other_data_or_stages_are_refused():
    state = TrainBatches(STORE, CONFIGS["plain"]).get_state()
    with pytest.raises(ValueError, match="other stage: fim_rate was 0.0, is 0.5"):
        TrainBatches(STORE, CONFIGS["fim"]).set_state(state)
    other = dataclasses.replace(STORE, manifest=Manifest("other"))
    with pytest.raises(ValueError, match="other data: manifest was"):
        TrainBatches(other, CONFIGS["plain"]).set_state(state)


@pytest.mark.parametrize(
    "wrong", [{"packing": "best"}, {"seq_len": 0}, {"mixture": 0.5}, {"fim_rate": 2.0}, {"start": -1}]
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError):
        BatchConfig(**{"seq_len": 8, "batch_size": 2, **wrong})


def test_impossible_rows_and_alignments_are_refused():
    for own in ((), (1, 3), (-1, 0)):
        with pytest.raises(ValueError, match="whose rows are 0 to 2"):
            TrainBatches(STORE, BatchConfig(8, 3), own)
    with pytest.raises(ValueError, match="align 5 must divide"):
        TrainBatches(STORE, BatchConfig(8, 2, align=5))


def test_heldout_batches_predict_every_token_once():
    predicted = []
    for batch in heldout_batches(STORE, 16, 3):
        assert batch["tokens"].shape == (3, 16)
        within = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
        predicted += batch["tokens"][:, 1:][within].tolist()
    expected = [i for d in STORE.heldout_documents for i in STORE.document(d)[1:].tolist()]
    assert predicted == expected
    assert STORE.tokenizer.token_bytes()[predicted].sum() == len(STORE.heldout_bytes())


def test_documents_are_counted_by_the_rows_that_they_fill():
    for rows in range(12):
        documents = documents_within(STORE, 16, rows)
        assert 1 <= documents <= len(STORE.heldout_documents)
        filled = [len(list(heldout_batches(STORE, 16, 1, documents=n))) for n in (documents, documents + 1)]
        assert filled[0] <= rows or documents == 1
        assert filled[1] > rows or documents == len(STORE.heldout_documents)
        assert STORE.heldout_size(documents) == len(STORE.heldout_bytes(documents))
    assert STORE.heldout_size() == len(STORE.heldout_bytes())


def test_a_uniform_byte_model_needs_eight_bits_per_byte():
    assert bits_per_byte(1000 * np.log(256), 1000) == pytest.approx(8)


def test_shuffled_rows_are_the_same_rows_in_another_order_and_the_next_stage_begins_behind_the_stretch():
    plain = Rows(STORE, BatchConfig(seq_len=32, batch_size=1))
    mixed = Rows(STORE, BatchConfig(seq_len=32, batch_size=1, shuffle_rows=16))
    for stretch in range(2):
        numbers = range(16 * stretch, 16 * (stretch + 1))
        in_order = [plain.row(i)["tokens"].tobytes() for i in numbers]
        shuffled = [mixed.row(i)["tokens"].tobytes() for i in numbers]
        assert in_order != shuffled and sorted(in_order) == sorted(shuffled)
    assert mixed.offset(17) == 32 * 32 and plain.offset(17) == 17 * 32


def test_a_run_says_how_often_it_reads_its_text_and_warns_where_that_is_often():
    few, many = (find_recipe("recall", ["data.task=null", f"stages.dense.steps={n}"]) for n in (0, 10_000))
    few = dataclasses.replace(few, stages=few.stages[:1])
    text = int(STORE.lengths[STORE.train_documents].sum())
    [told] = describe_passes(few, STORE)
    assert told == f"0 tokens asked for, {text:,} in the text to train on: 0 passes over the text"
    told, warning = describe_passes(many, STORE)
    passes = f"{many.tokens / text:,.0f} passes over"
    assert f"{many.tokens:,} tokens asked for" in told and f"{passes} the text" in told
    assert warning.startswith(f"warning: {passes} one text") and "--data" in warning
    half = dataclasses.replace(many, data=dataclasses.replace(many.data, recall_share=0.5))  # made rows are no text
    assert f"{many.tokens / text / 2:,.0f} passes over" in describe_passes(half, STORE)[0]
    assert not describe_passes(find_recipe("recall"), TaskSource("mqar", True))
