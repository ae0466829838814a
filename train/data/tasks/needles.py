"""A needle in a haystack: key-value pairs anywhere in filler; at the end some of the keys are asked.

After RULER (arXiv 2404.06654): one needle, one question is its single form; more needles its multi-key form; more
questions its multi-query form. Keys and values are single tokens, so that a needle has an exact phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data.tasks.task import ASK, Chance, Task, TaskError, TaskRow, scattered


@dataclass(frozen=True)
class Needles(Task):
    """Needles in a haystack.

    Attributes:
        n_needles: pairs hidden in the row, different keys and different values.
        n_questions: how many of them are asked, each once.
        n_keys, n_values: words to draw from.
    """

    n_needles: int = 1
    n_questions: int = 1
    n_keys: int = 64
    n_values: int = 64

    def __post_init__(self) -> None:
        """Refuses more needles than words, and more questions than needles."""
        super().__post_init__()
        if self.n_needles > min(self.n_keys, self.n_values):
            raise TaskError(f"n_needles is {self.n_needles}: n_keys and n_values must be as many")
        if self.n_questions > self.n_needles:
            raise TaskError(f"n_questions is {self.n_questions}, but there are {self.n_needles} needles")

    @property
    def chance(self) -> Chance:
        """One of the values."""
        return Chance(1 / self.n_values, 1 / self.n_needles)

    @property
    def pools(self) -> tuple[int, ...]:
        """Keys, values."""
        return self.n_keys, self.n_values

    @property
    def least_length(self) -> int:
        """Needles and questions."""
        return 2 * self.n_needles + 3 * self.n_questions

    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """Needles anywhere before the questions `ASK key value`, which end the row."""
        pairs = np.stack([self.draw(rng, 0, self.n_needles), self.draw(rng, 1, self.n_needles)], 1)
        begin = length - 3 * self.n_questions
        hidden = scattered(rng, self.n_needles, 2, begin)
        chosen = rng.permutation(self.n_needles)[: self.n_questions]
        asked = begin + 3 * np.arange(self.n_questions)
        tokens = self.fillers(rng, length)
        tokens[hidden], tokens[hidden + 1] = pairs.T
        tokens[asked], (tokens[asked + 1], tokens[asked + 2]) = ASK, pairs[chosen].T
        return TaskRow(tokens, asked + 2, asked + 1 - hidden[chosen], hidden[chosen])
