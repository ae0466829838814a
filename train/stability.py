"""Watching a long run: steps that are not finite, loss spikes, and how long anticipatory routing lasts (report 4.2.3).

Every decision is a function of the metrics of the steps so far, which are the same on all processes, and what it
depends on goes into each checkpoint: a resumed run decides as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsv4_jax.errors import UserError

# A sample's median absolute deviation, times this, estimates the standard deviation of a normal distribution.
NORMAL_MAD = 1.4826
# Losses that hardly vary would make every tremor a spike: deviations below this share of the loss count as this much.
SMALLEST_DEVIATION = 0.01


class UnstableError(UserError):
    """Training cannot go on: too many steps in a row were not finite."""


@dataclass(frozen=True)
class Stability:
    """What counts as a loss spike, and what is done about it. The numbers are ours: the report names none.

    Attributes:
        skipped_in_a_row: the run stops after so many steps in a row whose loss, gradients or updates are not finite.
        spike_threshold: a loss is high when it exceeds the median of the last losses by so many robust standard
            deviations. 0 looks for no spikes.
        spike_window: how many losses are the last ones; nothing is judged before there are so many in a stage.
        spike_steps: so many high losses in a row are a spike.
        rollback_steps: a spike undoes at least so many steps before its first: back to the newest checkpoint there.
        anticipatory_steps: steps of anticipatory routing after a rollback; 0 rolls back only.
        anticipatory_delay: by how many steps the parameters that choose the experts are older than those that compute.
    """

    skipped_in_a_row: int = 10
    spike_threshold: float = 10.0
    spike_window: int = 64
    spike_steps: int = 2
    rollback_steps: int = 10
    anticipatory_steps: int = 200
    anticipatory_delay: int = 4


@dataclass(frozen=True)
class Spike:
    """A loss spike: its first step, the step at which it was certain, its loss there, and what was usual before."""

    first: int
    step: int
    loss: float
    usual: float

    def __str__(self) -> str:
        """In words."""
        return f"loss spike at step {self.first:,}: {self.loss:.4g} at step {self.step:,}, usual was {self.usual:.4g}"


class SpikeDetector:
    """Median and median absolute deviation of the last losses, and how many losses in a row were far above.

    High losses enter the window too: a few hardly move a median, and many are the new normal.
    """

    def __init__(self, settings: Stability):
        """Has seen nothing."""
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.spike_window)
        self.high = 0

    def observe(self, step: int, loss: float) -> Spike | None:
        """Takes the loss of a step; returns the spike once it is one. Losses that are not finite are left out."""
        if not self.settings.spike_threshold or not math.isfinite(loss):
            return None
        usual = float(np.median(self.losses)) if self.losses else loss
        self.high = self.high + 1 if self._is_high(loss, usual) else 0
        self.losses.append(loss)
        if self.high < self.settings.spike_steps:
            return None
        first, self.high = step - self.high + 1, 0
        return Spike(first, step, loss, usual)

    def forget(self) -> None:
        """Starts over: another stage has other losses."""
        self.losses.clear()
        self.high = 0

    def _is_high(self, loss: float, usual: float) -> bool:
        if len(self.losses) < self.settings.spike_window:
            return False
        deviation = NORMAL_MAD * float(np.median(np.abs(np.asarray(self.losses) - usual)))
        return loss - usual > self.settings.spike_threshold * max(deviation, SMALLEST_DEVIATION * abs(usual))


class Watch:
    """Looks at the metrics of each step, in order, and keeps what a run has to remember about its stability.

    Args:
        settings: of the recipe.
        say: where words go.
        newest: the step of the newest checkpoint, for the error that ends a run.
    """

    def __init__(
        self, settings: Stability, say: Callable[[str], None] = print, newest: Callable[[], int | None] = lambda: None
    ):
        """An undisturbed run."""
        self.settings, self.say, self.newest = settings, say, newest
        self.detector = SpikeDetector(settings)
        self.skipped = 0
        self.episode: dict[str, Any] | None = None  # {"after": step, "until": step, "spike": asdict(Spike)}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> Spike | None:
        """Takes the metrics of a finished step; returns a spike that was found.

        Raises:
            UnstableError: this was one step too many that was not finite.
        """
        loss = float(metrics["loss"])
        self._count_skipped(step, loss, metrics)
        if spike := self.detector.observe(step, loss):
            return spike
        if self.episode is not None:
            if step == self.episode["until"] and self.anticipates(step):
                self.say(f"step {step:,}: anticipatory routing ends, back to standard training")
            if step >= max(self.episode["until"], self.episode["spike"]["step"]):
                self.episode = None
        return None

    def anticipates(self, step: int) -> bool:
        """Whether the experts of this step are to be chosen by older parameters."""
        return self.episode is not None and self.episode["after"] < step <= self.episode["until"]

    def marks(self, step: int) -> dict[str, Any]:
        """What the log of this step says about a rollback and the mode."""
        if self.episode is None:
            return {}
        spike, is_first = self.episode["spike"], step == self.episode["after"] + 1
        undone = {"spike_step": spike["first"], "spike_loss": spike["loss"]} if is_first else {}
        return undone | ({"anticipatory": 1} if self.anticipates(step) else {})

    def begin_stage(self) -> None:
        """Call before the first step of a stage."""
        self.detector.forget()

    def rollback_target(self, spike: Spike, steps: Sequence[int]) -> int | None:
        """Which of the checkpoints `steps` to go back to, or None.

        A spike that comes back in spite of anticipatory routing goes back further than the last one did: replaying
        the same steps in the same mode would end in the same place. So the rollbacks come to an end.
        """
        limit = spike.first - self.settings.rollback_steps
        if self.episode is not None:
            limit = min(limit, self.episode["after"] - 1)
        return max((step for step in steps if step <= limit), default=None)

    def begin_episode(self, after: int, spike: Spike) -> None:
        """Anticipatory routing from step `after + 1` on; the episode is over when the place of the spike is passed."""
        self.episode = {"after": after, "until": after + self.settings.anticipatory_steps, "spike": asdict(spike)}

    def go_on(self, spike: Spike) -> None:
        """After a spike that no checkpoint lies far enough before: training goes on, and learns what is usual now."""
        self.detector.forget()
        if self.episode is None:
            self.begin_episode(spike.step + 1, spike)

    def get_state(self) -> dict[str, Any]:
        """JSON."""
        detector = self.detector
        counts = {"high": detector.high, "skipped": self.skipped}
        return {"losses": list(detector.losses), **counts, "episode": self.episode}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `get_state`; an empty one is a new run's."""
        self.detector.forget()
        self.detector.losses.extend(state.get("losses", ()))
        self.detector.high, self.skipped = state.get("high", 0), state.get("skipped", 0)
        self.episode = state.get("episode")

    def _count_skipped(self, step: int, loss: float, metrics: Mapping[str, Any]) -> None:
        if not float(metrics["skipped"]):
            self.skipped = 0
            return
        self.skipped += 1
        found = f"loss {loss:g}, gradient norm {float(metrics['grad_norm']):g}"
        sizes = {name: float(value) for name, value in metrics.items() if name.startswith("update_rms_")}
        found += "".join(f", {name} {size:g}" for name, size in sizes.items() if not math.isfinite(size))
        limit = self.settings.skipped_in_a_row
        if self.skipped < limit:
            self.say(
                f"step {step:,} was skipped, it is not finite ({found}): parameters and optimizer stay as they were "
                f"({self.skipped} in a row; the run stops at {limit})"
            )
            return
        newest = self.newest()
        raise UnstableError(
            f"step {step:,} was the last of {limit} in a row that were not finite ({found}), and none of them changed "
            f"the parameters. The last good checkpoint is {'none' if newest is None else f'step {newest:,}'}. Look at "
            f"the text of steps {step - limit + 1:,} to {step:,} and at learning_rate.peak, or raise "
            "stability.skipped_in_a_row"
        )
