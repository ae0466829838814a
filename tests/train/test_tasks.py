"""Synthetic tasks: every answer is determined by its row, rows are functions of their number, scoring is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.batches import RowBatches
from train.data.tasks import TASKS, TaskError, make_task
from train.data.tasks.rows import TaskRows, TaskSource, evaluation_batches, task_batches
from train.data.tasks.score import TaskScore, distance_edges
from train.data.tasks.task import ASK, MARK, SET

OPTIONS = {
    "mqar": {"n_pairs": st.integers(1, 12), "spacing": st.integers(2, 6), "min_gap": st.integers(0, 30)},
    "needle": {"n_needles": st.integers(4, 9), "n_questions": st.integers(1, 4)},
    "variables": {"n_chains": st.integers(1, 4), "hops": st.integers(0, 3)},
    "selective_copying": {"n_copied": st.integers(1, 16)},
    "induction": {"segment": st.integers(2, 20), "min_gap": st.integers(0, 30)},
}


def after_last(tokens, place, what, before):
    """The token behind the last `what` before `before`, and where `what` stands: read backwards, as a person would."""
    found = max(i for i in range(before) if tokens[i] == what)
    return tokens[found + 1], found


def solve(name, tokens, row):
    """(answer, place of its statement, place of the same token) of every question, from the tokens alone."""
    solved = []
    if name in ("mqar", "needle", "induction"):
        for place in row.answers:
            answer, stated = after_last(tokens, place, tokens[place - 1], place - 1)
            solved.append((answer, stated, stated + 1))
    elif name == "selective_copying":
        end = int(np.flatnonzero(tokens == MARK)[0])
        symbols = [i for i in range(1, end) if tokens[i] in TASK_WORDS[name]]
        solved = [(tokens[i], i, i) for i in symbols]
    else:
        source = tokens[int(np.flatnonzero(tokens == ASK)[0]) + 1]
        for _ in row.answers:  # who was set to this? then who was set to that name?
            stated = next(i for i in range(len(tokens) - 2) if tokens[i + 1] == SET and tokens[i + 2] == source)
            source = tokens[stated]
            solved.append((source, stated, stated))
    return solved


TASK_WORDS = {"selective_copying": set(make_task("selective_copying", {}).words(0).tolist())}


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_answer_is_determined_by_its_row(name, data):
    options = {option: data.draw(values) for option, values in OPTIONS[name].items()}
    task = make_task(name, options | {"offset": data.draw(st.integers(1, 8))})
    length = task.least_length + task.offset + data.draw(st.integers(0, 60))
    row = task.row(length, seed=data.draw(st.integers(0, 9)), index=data.draw(st.integers(0, 10**9)))
    assert row.tokens.shape == (length,) and row.tokens.dtype == np.int32
    assert 0 <= row.tokens.min() and row.tokens.max() < task.vocab_size
    solved = solve(name, row.tokens, row)
    assert (np.diff(row.answers) > 0).all() and len(solved) == len(row.answers) == len(row.needles)
    for (answer, stated, same), place, distance, needle in zip(
        solved, row.answers, row.distances, row.needles, strict=True
    ):
        assert row.tokens[place] == answer == row.tokens[place - distance]
        assert (needle, place - distance) == (stated, same)


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_a_function_of_its_number(name):
    task = make_task(name, {"offset": 4})
    rows = [task.row(128, 0, index) for index in (5, 6, 5)]
    assert np.array_equal(rows[0].tokens, rows[2].tokens) and not np.array_equal(rows[0].tokens, rows[1].tokens)
    assert not np.array_equal(rows[0].tokens, task.row(128, 1, 5).tokens)
    assert not np.array_equal(rows[0].tokens, task.row(128, 0, 5, heldout=True).tokens)


def batches_of(name, rows=64, **options):
    return evaluation_batches(make_task(name, options), 160, 16, rows)


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_scores_one_and_random_answers_score_the_stated_chance(name):
    """`blind` draws among the words of the pool, `shown` among those that the row shows before the question."""
    options = {"needle": {"n_needles": 4, "n_questions": 4}}.get(name, {})
    task, rng = make_task(name, options), np.random.default_rng(0)
    pool = {"mqar": 1, "needle": 1}.get(name, 0)
    scores = {kind: TaskScore(4) for kind in ("oracle", "blind", "shown", "silent")}
    for batch in batches_of(name, 512, **options):
        tokens, guesses = batch["tokens"], np.zeros_like(batch["tokens"])
        for row, place in zip(*np.nonzero(batch["answers"]), strict=True):
            first = np.flatnonzero(batch["answers"][row])[0]
            shown = tokens[row, : first - (1 if name == "induction" else 0)]
            shown = shown[np.isin(shown, task.words(pool))]
            shown = np.unique(shown) if name == "variables" else shown  # a name stands once as target, once as source
            guesses[row, place - 1] = rng.choice(shown)
        scores["shown"].add(batch, guesses)
        scores["blind"].add(batch, rng.choice(task.words(pool), tokens.shape))
        scores["oracle"].add(batch, np.roll(tokens, -1, axis=1))
        scores["silent"].add(batch, np.zeros_like(tokens))
    assert scores["oracle"].accuracy == 1 and scores["silent"].accuracy == 0
    questions = len(np.concatenate(scores["oracle"].correct))
    for kind, chance in (("blind", task.chance.blind), ("shown", task.chance.shown)):
        spread = 4 * np.sqrt(chance * (1 - chance) / questions)
        assert scores[kind].accuracy == pytest.approx(chance, abs=spread + 1e-9), kind


def test_a_single_needles_chance_line_is_blind():
    assert make_task("needle", {}).chance.line == 1 / 64 and make_task("needle", {"n_needles": 4}).chance.line == 0.25


def test_scores_are_told_apart_by_distance_and_phase():
    """Answers that are right at one phase only, or beyond one distance only."""
    by_phase, by_distance = TaskScore(4), TaskScore(4)
    for batch in batches_of("mqar", spacing=3, offset=4, power=1.0):
        right = np.roll(batch["tokens"], -1, axis=1)
        phase, far = (np.roll(x, -1, axis=1) for x in (batch["needles"] % 4 == 3, batch["distances"] > 50))
        by_phase.add(batch, np.where(phase, right, 0))
        by_distance.add(batch, np.where(far, right, 0))
    assert by_phase.by_phase() == {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0} == by_phase.by_phase(beyond=50)
    assert by_distance.beyond(50) == 1.0 and by_distance.beyond(10**6) is None
    assert by_distance.by_distance([0, 51, 1000]) == {0: 0.0, 51: 1.0}
    assert distance_edges(16, 46, 400) == [0, 16, 47, 94, 188, 376]


def test_pairs_lie_beyond_a_gap_that_is_asked_for():
    for batch in batches_of("mqar", min_gap=70):
        assert batch["distances"][batch["answers"]].min() > 70


def test_offsets_move_rows_to_every_phase():
    aligned, moved = (
        np.concatenate([b["needles"][b["answers"]] for b in batches_of("mqar", spacing=4, offset=offset)]) % 4
        for offset in (1, 4)
    )
    assert set(aligned) == {1} and set(moved) == {0, 1, 2, 3}


def test_batches_by_process_are_parts_of_the_whole_and_resume_from_a_number():
    source, rows = TaskSource("mqar"), TaskRows(make_task("mqar", {}), 128, seed=3, start=40)
    whole = task_batches(source, rows, 4)
    first, second = next(whole), next(whole)
    assert {name: x.dtype for name, x in first.items()} == dict.fromkeys(first, np.int32) and "loss_mask" in first
    for own in ((0, 3), (2, 1)):
        part = next(task_batches(source, rows, 4, own))
        assert all(np.array_equal(part[name], x[list(own)]) for name, x in first.items())
    resumed: RowBatches = task_batches(source, rows, 4)
    resumed.set_state({**whole.get_state(), "step": 1})
    assert np.array_equal(next(resumed)["tokens"], second["tokens"])
    assert np.array_equal(first["tokens"][1], rows.task.row(128, 3, 41).tokens)
    with pytest.raises(ValueError, match="other stage"):
        task_batches(source, TaskRows(make_task("mqar", {"n_pairs": 4}), 128, 3, 40), 4).set_state(whole.get_state())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqr", {}, "perhaps you meant 'mqar'"),
        ("mqar", {"n_pair": 4}, "perhaps you meant 'n_pairs'"),
        ("mqar", {"n_pairs": 4.5}, "n_pairs is 4.5; expected int"),
        ("mqar", {"n_pairs": True}, "n_pairs is True; expected int"),
        ("mqar", {"n_pairs": 0}, "n_pairs is 0; at least 1"),
        ("mqar", {"spacing": 1}, "spacing is 1; at least 2"),
        ("mqar", {"n_pairs": 65}, "n_keys and n_values must be as many"),
        ("needle", {"n_questions": 2}, "there are 1 needles"),
        ("variables", {"hops": 40}, "need n_names=82"),
        ("induction", {"segment": 70}, "segment is 70"),
    ],
)
def test_a_wrong_task_is_named(name, options, message):
    with pytest.raises(TaskError, match=message):
        make_task(name, options)


def test_rows_that_are_too_short_say_what_they_need():
    task = make_task("mqar", {"n_pairs": 8, "offset": 4})
    with pytest.raises(TaskError, match="needs rows of 36 tokens, not 35"):
        task.row(35, 0, 0)
    assert all(len(task.row(36, 0, index).answers) == 8 for index in range(20))
