"""The report's pretraining runs as recipes: its schedule, counted in tokens, becomes stages of steps."""

from __future__ import annotations

from train.losses import LossWeights
from train.optimizer import OptimizerConfig
from train.recipe import Cadence, DataChoice, LearningRate, ModelChoice, Recipe, Stage
from train.schedule import PretrainingRun, Schedule, batch_size_at, steps_until, value_at
from train.step import Kind, Precision

KINDS: dict[str, Kind] = {"dense": "dense", "indexer": "indexer_warmup", "sparse": "sparse"}


def recipe_of(run: PretrainingRun, name: str, about: str) -> Recipe:
    """The recipe of a run of the report; bring its text with `--data`."""
    schedule, steps = run.schedule, steps_until(run.schedule, run.schedule.total_tokens)
    before, decayed = schedule.mtp_weights
    return Recipe(
        name=name,
        about=about,
        model=ModelChoice(run.preset),
        data=DataChoice(tokenizer="deepseek", fim_rate=run.fim_rate),
        stages=stages_of(schedule),
        optimizer=OptimizerConfig(newton_schulz_dtype="bfloat16"),
        learning_rate=LearningRate(
            schedule.peak, schedule.floor, schedule.warmup_steps, steps_until(schedule, schedule.decay_start) / steps
        ),
        losses=LossWeights(mtp=before, mtp_decayed=decayed, balance=run.balance_weight, bias_speed=run.bias_speed),
        precision=Precision(compute="bfloat16", remat="block"),
        cadence=Cadence(checkpoint_every=250, eval_every=1000, recall_rows=0),
    )


def stages_of(schedule: Schedule) -> tuple[Stage, ...]:
    """One stage for each stretch between two changes of batch, sequence length or attention."""
    changes = {phase.start for part in (schedule.batch_tokens, schedule.sequence_length) for phase in part}
    changes |= {phase.start for phase in schedule.attention}
    bounds = [*sorted(start for start in changes if start < schedule.total_tokens), schedule.total_tokens]
    return tuple(_stage(schedule, a, b) for a, b in zip(bounds, bounds[1:], strict=False))


def _stage(schedule: Schedule, start: int, end: int) -> Stage:
    """The steps that begin in tokens [start, end)."""
    attention, length = value_at(schedule.attention, start), value_at(schedule.sequence_length, start)
    steps, rows = steps_until(schedule, end) - steps_until(schedule, start), batch_size_at(schedule, start)
    return Stage(f"{attention}-{length // 1024}k-{rows}", KINDS[attention], steps, length, rows)
