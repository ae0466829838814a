import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, ByteTokenizer
from train.data.manifest import Manifest
from train.data.packing import shuffled
from train.data.pipeline import BatchConfig, Rows, TrainBatches, bits_per_byte, heldout_batches
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
        parts = [take(TrainBatches(STORE, config, i, count), 25) for i in range(count)]
        assert same({k: np.concatenate([part[k] for part in parts], 1) for k in whole}, whole)


def test_a_state_resumes_on_another_number_of_processes(config):
    whole = TrainBatches(STORE, config)
    take(whole, 5)
    half = TrainBatches(STORE, config, 1, 2)
    half.set_state(whole.get_state())
    assert np.array_equal(next(half)["tokens"], next(whole)["tokens"][2:])


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


def test_impossible_shares_and_alignments_are_refused():
    with pytest.raises(ValueError, match="must divide the batch"):
        TrainBatches(STORE, BatchConfig(8, 3), 0, 2)
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


def test_heldout_batches_are_shared_out_evenly():
    whole = list(heldout_batches(STORE, 16, 4))
    halves = [list(heldout_batches(STORE, 16, 4, process_index=i, process_count=2)) for i in range(2)]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    for batch, left, right in zip(whole, *halves, strict=True):
        assert same(batch, {k: np.concatenate([left[k], right[k]]) for k in batch})


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
