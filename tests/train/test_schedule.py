"""Schedules: what the report's runs do at each token, against numbers written by hand."""

import math

import jax
import numpy as np
import pytest

from train.schedule import (
    FLASH,
    PRO,
    Schedule,
    Stage,
    batch_ramp,
    batch_size_at,
    learning_rate,
    mtp_weight_at,
    steps_until,
    tokens_at,
    tokens_per_step_at,
    value_at,
    warmup_constant_cosine,
)

TRILLION = 10**12


def small(**changes) -> Schedule:
    """100 steps of 40 tokens after 20 of 20, then sequences twice as long."""
    return Schedule(
        **{
            "total_tokens": 4400,
            "warmup_steps": 10,
            "peak": 1.0,
            "floor": 0.1,
            "decay_start": 2400,
            "batch_tokens": (Stage(0, 20), Stage(400, 40)),
            "sequence_length": (Stage(0, 10), Stage(2400, 20)),
            **changes,
        }
    )


def by_hand(step: int, peak: float, floor: float, warmup: int, decay: int, total: int) -> float:
    """The same schedule, from its description, in float64."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < decay:
        return peak
    progress = min(1.0, (step - decay) / (total - decay))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_learning_rate_warms_up_stays_and_falls_by_a_cosine(warmup):
    schedule = jax.jit(jax.vmap(warmup_constant_cosine(3e-4, 3e-5, warmup, 30, 50)))
    steps = np.arange(70)
    expected = [by_hand(int(step), 3e-4, 3e-5, warmup, 30, 50) for step in steps]
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-5)


def test_no_step_of_the_warm_up_is_wasted_on_a_rate_of_zero():
    assert float(warmup_constant_cosine(1.0, 0.1, 2000, 3000, 4000)(0)) == pytest.approx(1 / 2000, rel=1e-4)


@pytest.mark.parametrize(
    ("run", "peak", "floor", "batch", "tokens"),
    [(FLASH, 2.7e-4, 2.7e-5, 75.5e6, 32), (PRO, 2.0e-4, 2.0e-5, 94.4e6, 33)],
)
def test_the_report_runs_have_the_report_numbers(run, peak, floor, batch, tokens):
    schedule = run.schedule
    assert schedule.total_tokens == tokens * TRILLION
    rate = learning_rate(schedule)
    steps = steps_until(schedule, schedule.total_tokens)
    assert float(rate(1999)) == pytest.approx(peak) == float(rate(steps // 2))
    assert float(rate(steps)) == pytest.approx(floor)
    assert tokens_per_step_at(schedule, 2 * TRILLION) == pytest.approx(batch, rel=1e-3)
    lengths = [stage.value for stage in schedule.sequence_length]
    assert lengths == [4096, 16384, 65536, 1048576]
    assert value_at(schedule.attention, TRILLION - 1) == "dense"
    assert value_at(schedule.attention, TRILLION) == "indexer"
    assert value_at(schedule.attention, schedule.total_tokens) == "sparse"
    assert value_at(schedule.sequence_length, TRILLION) == 65536
    assert (run.bias_speed, run.balance_weight, run.fim_rate) == (1e-3, 1e-4, 0.1)


def test_every_batch_of_the_report_runs_is_whole_sequences_of_its_stage():
    for schedule in (FLASH.schedule, PRO.schedule):
        for stage in (*schedule.batch_tokens, *schedule.sequence_length):
            assert tokens_per_step_at(schedule, stage.start) == value_at(schedule.batch_tokens, stage.start)


def test_mtp_weight_falls_when_the_decay_starts():
    schedule = small()
    assert [mtp_weight_at(schedule, t) for t in (0, 2399, 2400, 9999)] == [0.3, 0.3, 0.1, 0.1]
    step = steps_until(schedule, schedule.decay_start)
    rates = [float(learning_rate(schedule)(step + i)) for i in (0, 1)]
    assert rates[0] == 1.0 > rates[1]


def test_batch_size_counts_sequences_of_the_current_length():
    schedule = small()
    assert [batch_size_at(schedule, t) for t in (0, 399, 400, 2399, 2400)] == [2, 2, 4, 4, 2]
    assert batch_size_at(small(sequence_length=(Stage(0, 64),)), 0) == 1


def test_steps_and_tokens_agree_with_a_walk_through_the_run():
    schedule = small(batch_tokens=(Stage(0, 30), Stage(410, 70)), sequence_length=(Stage(0, 10), Stage(1001, 35)))
    seen, trail = 0, [0]
    while seen < schedule.total_tokens:
        seen += tokens_per_step_at(schedule, seen)
        trail.append(seen)
    assert [tokens_at(schedule, step) for step in range(len(trail))] == trail
    for tokens in range(0, trail[-1], 7):
        assert steps_until(schedule, tokens) == next(i for i, seen in enumerate(trail) if seen >= tokens)


def test_a_batch_ramp_rises_evenly_and_ends_at_its_last_value():
    assert batch_ramp(8, 32, 300, 3) == (Stage(0, 8), Stage(100, 16), Stage(200, 24), Stage(300, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": ()}, "batch_tokens must have stages"),
        ({"sequence_length": (Stage(5, 10),)}, "sequence_length must have stages that start at token 0"),
        ({"batch_tokens": (Stage(0, 8), Stage(9, 8), Stage(9, 8))}, "then rise"),
        ({"batch_tokens": (Stage(0, 0),)}, "must be positive"),
        ({"decay_start": 5000}, "decay_start 5000"),
    ],
)
def test_a_schedule_that_cannot_be_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_warm_up_longer_than_the_run_says_so():
    with pytest.raises(ValueError, match="Lower warmup_steps"):
        learning_rate(small(warmup_steps=10_000))
    with pytest.raises(ValueError, match="fall from a positive peak"):
        warmup_constant_cosine(1e-4, 1e-3, 1, 2, 3)
