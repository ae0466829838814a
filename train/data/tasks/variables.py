"""Variable tracking: chains of assignments in filler; which names hold a given value?

After RULER (arXiv 2404.06654): `X1 = value`, `X2 = X1`, ... scattered over the row, several chains mixed; at the end a
value is asked and all names of its chain follow, in the order of their assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from train.data.tasks.task import ASK, SET, Chance, Task, TaskError, TaskRow, scattered


@dataclass(frozen=True)
class VariableTracking(Task):
    """Variable tracking.

    Attributes:
        n_chains: chains, each with a value of its own; one is asked.
        hops: assignments from name to name in a chain, behind the first from a value.
        n_names, n_values: words to draw from.
    """

    n_chains: int = 2
    hops: int = field(default=2, metadata={"least": 0})
    n_names: int = 64
    n_values: int = 64

    def __post_init__(self) -> None:
        """Refuses more names and chains than words."""
        super().__post_init__()
        if self._assignments > self.n_names or self.n_chains > self.n_values:
            raise TaskError(
                f"{self.n_chains} chains of {self.hops + 1} names need n_names={self._assignments} and "
                f"n_values={self.n_chains} at least, for all are different"
            )

    @property
    def _assignments(self) -> int:
        return self.n_chains * (self.hops + 1)

    @property
    def chance(self) -> Chance:
        """One of the names."""
        return Chance(1 / self.n_names, 1 / self._assignments)

    @property
    def pools(self) -> tuple[int, ...]:
        """Names, values."""
        return self.n_names, self.n_values

    @property
    def least_length(self) -> int:
        """Assignments `name SET source`, and the question with its answers."""
        return 3 * self._assignments + 2 + self.hops + 1

    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """Assignments anywhere, each chain's in order, before `ASK value name name ...`."""
        size = self.hops + 1
        names = self.draw(rng, 0, self._assignments).reshape(self.n_chains, size)
        values = self.draw(rng, 1, self.n_chains)
        begin = length - 2 - size
        places = scattered(rng, self._assignments, 3, begin)
        turns = rng.permutation(np.repeat(np.arange(self.n_chains), size))
        sources = np.concatenate([values[:, None], names[:, :-1]], 1)
        tokens = self.fillers(rng, length)
        for chain in range(self.n_chains):
            own = places[turns == chain]
            tokens[own], tokens[own + 1], tokens[own + 2] = names[chain], SET, sources[chain]
        asked = int(rng.integers(self.n_chains))
        tokens[begin:] = [ASK, values[asked], *names[asked]]
        answers, stated = begin + 2 + np.arange(size), places[turns == asked]
        return TaskRow(tokens, answers, answers - stated, stated)
