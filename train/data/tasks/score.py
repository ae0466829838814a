"""Right answers, counted: over all questions, by distance, by the needle's phase, and beyond every window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv4_jax.config import DeepseekV4Config


def window_reach(config: DeepseekV4Config) -> int:
    """The largest distance that windows alone can bridge, every layer handing on what the one below it saw.

    A window of W tokens looks W - 1 back; L layers carry a value L (W - 1) tokens on, to the place before the answer.
    """
    return config.num_hidden_layers * (config.sliding_window - 1) + 1


@dataclass
class TaskScore:
    """Collects exact-match answers over batches of `rows.evaluation_batches`.

    Attributes:
        period: of the phases, a compression ratio.
    """

    period: int
    correct: list[np.ndarray] = field(default_factory=list)
    distances: list[np.ndarray] = field(default_factory=list)
    needles: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: dict[str, np.ndarray], predicted: np.ndarray) -> None:
        """`predicted` [B, S]: at each place the most likely next token."""
        rows, places = np.nonzero(batch["answers"])
        self.correct.append(np.asarray(predicted)[rows, places - 1] == batch["tokens"][rows, places])
        self.distances.append(batch["distances"][rows, places])
        self.needles.append(batch["needles"][rows, places])

    @property
    def accuracy(self) -> float:
        """Share of the questions answered with the right token."""
        return float(np.concatenate(self.correct).mean())

    def beyond(self, distance: int) -> float | None:
        """Accuracy for distances larger than this; None when there is no such question."""
        return self._mean(np.concatenate(self.distances) > distance)

    def by_distance(self, edges: Sequence[int]) -> dict[int, float]:
        """Accuracy for distances from each edge up to the next, by the lower edge; empty bins are absent."""
        bins = np.digitize(np.concatenate(self.distances), edges) - 1
        return self._groups(bins, edges)

    def by_phase(self, beyond: int = 0) -> dict[int, float]:
        """Accuracy by (place of the needle) mod `period`, of the questions beyond a distance.

        Give the reach of the windows: what they answer never went through a compressor.
        """
        far = np.concatenate(self.distances) > beyond
        return self._groups(np.where(far, np.concatenate(self.needles) % self.period, -1), range(self.period))

    def _groups(self, group: np.ndarray, names: Sequence[int]) -> dict[int, float]:
        means = {name: self._mean(group == i) for i, name in enumerate(names)}
        return {name: mean for name, mean in means.items() if mean is not None}

    def _mean(self, chosen: np.ndarray) -> float | None:
        return float(np.concatenate(self.correct)[chosen].mean()) if chosen.any() else None


def distance_edges(window: int, far: int, length: int) -> list[int]:
    """Lower edges of distance bins: within one window, not yet far, and doubling from there on."""
    edges = [0, window, far + 1]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return edges
