"""What changes while a model trains, as data: learning rate, batch size, sequence length, attention, MTP weight.

The learning rate is an optax schedule of the step, because it acts inside the compiled step. Everything else is counted
in tokens, as the report counts; `train.recipes.report` makes stages of steps of it.
Source: DeepSeek-V4 report 4.2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import optax

T = TypeVar("T")

Attention = Literal["dense", "indexer", "sparse"]

BILLION = 10**9
TRILLION = 10**12


@dataclass(frozen=True)
class Phase(Generic[T]):
    """A value that holds from `start` tokens on, until the next one."""

    start: int
    value: T


@dataclass(frozen=True)
class Schedule:
    """A whole training run, counted in tokens.

    Attributes:
        total_tokens: the end of the run.
        warmup_steps: optimizer steps of linear warm-up.
        peak: learning rate from the end of the warm-up to the start of the decay.
        floor: learning rate at the end of the run, and after it.
        decay_start: tokens seen when the cosine tail starts and the MTP weight falls.
        batch_tokens: tokens in a batch, by phases.
        sequence_length: by phases.
        attention: "dense" over all visible entries, "indexer" (trains the indexer alone), or "sparse", by phases.
        mtp_weights: weight of the MTP loss before and from the start of the decay.
    """

    total_tokens: int
    warmup_steps: int
    peak: float
    floor: float
    decay_start: int
    batch_tokens: tuple[Phase[int], ...]
    sequence_length: tuple[Phase[int], ...]
    attention: tuple[Phase[Attention], ...] = (Phase(0, "sparse"),)
    mtp_weights: tuple[float, float] = (0.3, 0.1)

    def __post_init__(self) -> None:
        """Raises ValueError for phases or a decay that cannot be."""
        for name in ("batch_tokens", "sequence_length", "attention"):
            _check_phases(name, getattr(self, name))
        if not 0 <= self.decay_start < self.total_tokens:
            raise ValueError(f"decay_start {self.decay_start} must lie in the run's {self.total_tokens} tokens.")
        for phase in self.batch_tokens:
            if phase.value <= 0:
                raise ValueError(f"batch_tokens must be positive, but is {phase.value} from token {phase.start}.")


@dataclass(frozen=True)
class PretrainingRun:
    """A run of the report: its schedule and the weights of its losses. Its optimizer is the default OptimizerConfig.

    Attributes:
        preset: the model's preset.
        schedule: what changes during the run.
        bias_speed: step of the router biases.
        balance_weight: of the sequence-wise balance loss.
        fim_rate: share of documents turned into prefix-suffix-middle form.
    """

    preset: str
    schedule: Schedule
    bias_speed: float = 1e-3
    balance_weight: float = 1e-4
    fim_rate: float = 0.1


def warmup_constant_cosine(
    peak: float, floor: float, warmup_steps: int, decay_start: int, total_steps: int
) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear up to `peak`, constant, then a cosine down to `floor`.

    The first step already moves (peak / warmup_steps) and the last of the warm-up, step warmup_steps - 1, is at the
    peak. The rate is the floor from step `total_steps` on.

    Raises:
        ValueError: if the three phases overlap or a rate is out of order.
    """
    if not 0 <= warmup_steps <= decay_start < total_steps:
        raise ValueError(
            f"Warm-up must end before the decay starts, and the decay before the run ends, but they are at steps "
            f"{warmup_steps}, {decay_start} and {total_steps}. Lower warmup_steps or lengthen the run."
        )
    if not 0 <= floor <= peak or peak == 0:
        raise ValueError(f"The learning rate must fall from a positive peak to a floor, but got {peak} and {floor}.")
    constant = optax.constant_schedule(peak)
    cosine = optax.cosine_decay_schedule(peak, total_steps - decay_start, floor / peak)
    if warmup_steps < 2:
        return optax.join_schedules([constant, cosine], [decay_start])
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, constant, cosine], [warmup_steps, decay_start])


def value_at(phases: Sequence[Phase[T]], tokens_seen: int) -> T:
    """The value that holds once `tokens_seen` tokens have been trained on."""
    return next(phase.value for phase in reversed(phases) if phase.start <= tokens_seen)


def batch_size_at(schedule: Schedule, tokens_seen: int) -> int:
    """Sequences in the next batch: the tokens of the batch phase over the sequence length, at least one."""
    length = value_at(schedule.sequence_length, tokens_seen)
    return max(1, value_at(schedule.batch_tokens, tokens_seen) // length)


def tokens_per_step_at(schedule: Schedule, tokens_seen: int) -> int:
    """Tokens in the next batch: whole sequences."""
    return batch_size_at(schedule, tokens_seen) * value_at(schedule.sequence_length, tokens_seen)


def steps_until(schedule: Schedule, tokens: int) -> int:
    """Optimizer steps after which at least `tokens` tokens have been seen."""
    step = seen = 0
    while seen < tokens:
        count = _batches_until(seen, min(tokens, _next_change(schedule, seen, tokens)), schedule)
        step, seen = step + count, seen + count * tokens_per_step_at(schedule, seen)
    return step


def batch_ramp(first: int, last: int, tokens: int, pieces: int) -> tuple[Phase[int], ...]:
    """Batch phases in `pieces` equal steps from `first` to `last`, which holds from `tokens` on.

    Every batch size is a compiled train step of its own, so a ramp has few of them.
    """
    return tuple(Phase(tokens * i // pieces, first + (last - first) * i // pieces) for i in range(pieces + 1))


def _batches_until(seen: int, tokens: int, schedule: Schedule) -> int:
    return -(-(tokens - seen) // tokens_per_step_at(schedule, seen))


def _next_change(schedule: Schedule, seen: int, otherwise: int) -> int:
    starts = [s.start for s in (*schedule.batch_tokens, *schedule.sequence_length) if s.start > seen]
    return min(starts, default=otherwise)


def _check_phases(name: str, phases: Sequence[Phase[object]]) -> None:
    starts = [phase.start for phase in phases]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"{name} must have phases that start at token 0 and then rise, but they start at {starts}.")


def _report_schedule(tokens: int, batch: int, peak: float, floor: float) -> Schedule:
    """Both runs of the report; what it does not state is chosen here and said so.

    Stated: total tokens, final batch, warm-up, peak and floor, dense attention for the first 1T tokens, sparse
    attention from the 64K stage on, the order of lengths. Chosen: where the 16K and 1M stages and the decay start
    ("most of the training" is constant), the length of the indexer's stage, and the ramp (eight equal stages up to
    the final batch over 500B tokens).
    """
    return Schedule(
        total_tokens=tokens,
        warmup_steps=2000,
        peak=peak,
        floor=floor,
        decay_start=tokens * 8 // 10,
        batch_tokens=batch_ramp(batch // 8, batch, 500 * BILLION, 7),
        sequence_length=(
            Phase(0, 4096),
            Phase(500 * BILLION, 16384),
            Phase(TRILLION, 65536),
            Phase(tokens * 9 // 10, 1048576),
        ),
        attention=(Phase(0, "dense"), Phase(TRILLION, "indexer"), Phase(TRILLION + 10 * BILLION, "sparse")),
    )


# The report rounds its batches: 75.5M and 94.4M tokens are whole sequences of every stage.
FLASH = PretrainingRun("v4-flash", _report_schedule(32 * TRILLION, 18432 * 4096, 2.7e-4, 2.7e-5))
PRO = PretrainingRun("v4-pro", _report_schedule(33 * TRILLION, 23040 * 4096, 2.0e-4, 2.0e-5))
