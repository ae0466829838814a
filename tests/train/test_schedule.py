"""Schedules: what the report's runs do at each token, against numbers written by hand."""

import math

import jax
import numpy as np
import pytest

from train.schedule import (
    FLASH,
    PRO,
    Phase,
    Schedule,
    batch_ramp,
    batch_size_at,
    steps_until,
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
            "batch_tokens": (Phase(0, 20), Phase(400, 40)),
            "sequence_length": (Phase(0, 10), Phase(2400, 20)),
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
    assert (schedule.warmup_steps, schedule.peak, schedule.floor) == (2000, peak, floor)
    assert tokens_per_step_at(schedule, 2 * TRILLION) == pytest.approx(batch, rel=1e-3)
    lengths = [phase.value for phase in schedule.sequence_length]
    assert lengths == [4096, 16384, 65536, 1048576]
    assert value_at(schedule.attention, TRILLION - 1) == "dense"
    assert value_at(schedule.attention, TRILLION) == "indexer"
    assert value_at(schedule.attention, schedule.total_tokens) == "sparse"
    assert value_at(schedule.sequence_length, TRILLION) == 65536
    assert (run.bias_speed, run.balance_weight, run.fim_rate) == (1e-3, 1e-4, 0.1)


def test_every_batch_of_the_report_runs_is_whole_sequences_of_its_phase():
    for schedule in (FLASH.schedule, PRO.schedule):
        for phase in (*schedule.batch_tokens, *schedule.sequence_length):
            assert tokens_per_step_at(schedule, phase.start) == value_at(schedule.batch_tokens, phase.start)


def test_batch_size_counts_sequences_of_the_current_length():
    schedule = small()
    assert [batch_size_at(schedule, t) for t in (0, 399, 400, 2399, 2400)] == [2, 2, 4, 4, 2]
    assert batch_size_at(small(sequence_length=(Phase(0, 64),)), 0) == 1


def test_steps_agree_with_a_walk_through_the_run():
    schedule = small(batch_tokens=(Phase(0, 30), Phase(410, 70)), sequence_length=(Phase(0, 10), Phase(1001, 35)))
    seen, trail = 0, [0]
    while seen < schedule.total_tokens:
        seen += tokens_per_step_at(schedule, seen)
        trail.append(seen)
    for tokens in range(0, trail[-1], 7):
        assert steps_until(schedule, tokens) == next(i for i, seen in enumerate(trail) if seen >= tokens)


def test_a_batch_ramp_rises_evenly_and_ends_at_its_last_value():
    assert batch_ramp(8, 32, 300, 3) == (Phase(0, 8), Phase(100, 16), Phase(200, 24), Phase(300, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": ()}, "batch_tokens must have phases"),
        ({"sequence_length": (Phase(5, 10),)}, "sequence_length must have phases that start at token 0"),
        ({"batch_tokens": (Phase(0, 8), Phase(9, 8), Phase(9, 8))}, "then rise"),
        ({"batch_tokens": (Phase(0, 0),)}, "must be positive"),
        ({"decay_start": 5000}, "decay_start 5000"),
    ],
)
def test_a_schedule_that_cannot_be_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_warm_up_longer_than_the_run_says_so():
    with pytest.raises(ValueError, match="Lower warmup_steps"):
        warmup_constant_cosine(1e-3, 1e-4, 10_000, 20, 30)
    with pytest.raises(ValueError, match="fall from a positive peak"):
        warmup_constant_cosine(1e-4, 1e-3, 1, 2, 3)
