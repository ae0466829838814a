"""Multi-query associative recall: key-value pairs, then every key again, to be followed by its value.

Source: Zoology (arXiv 2312.04927), which asks at power-law gaps. Extended here: `min_gap` keeps the questions away from
the pairs, beyond a window; `spacing` puts filler between pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from train.data.tasks.task import BOS, Chance, Task, TaskError, TaskRow


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Multi-query associative recall.

    Attributes:
        n_pairs: pairs of a row, different keys and different values, each asked once.
        n_keys, n_values: words to draw from.
        spacing: tokens from one key to the next; 2 is Zoology's, without filler between pairs.
        min_gap: tokens between the last pair and the first place of a question.
        power: slot j after that is taken with a probability proportional to j ** (power - 1), Zoology's law; 1 is even.
    """

    n_pairs: int = 8
    n_keys: int = 64
    n_values: int = 64
    spacing: int = field(default=2, metadata={"least": 2})
    min_gap: int = field(default=0, metadata={"least": 0})
    power: float = field(default=0.01, metadata={"least": 0})

    def __post_init__(self) -> None:
        """Refuses more pairs than words."""
        super().__post_init__()
        if self.n_pairs > min(self.n_keys, self.n_values):
            raise TaskError(
                f"n_pairs is {self.n_pairs}: n_keys and n_values must be as many, for they are all different"
            )

    @property
    def chance(self) -> Chance:
        """One of the values."""
        return Chance(1 / self.n_values, 1 / self.n_pairs)

    @property
    def pools(self) -> tuple[int, ...]:
        """Keys, values."""
        return self.n_keys, self.n_values

    @property
    def least_length(self) -> int:
        """Pairs, gap and one slot for each question."""
        return self.spacing * self.n_pairs + self.min_gap + 2 * self.n_pairs

    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """Pairs at the beginning, questions in slots of two tokens behind them, filler elsewhere."""
        pairs = np.stack([self.draw(rng, 0, self.n_pairs), self.draw(rng, 1, self.n_pairs)], 1)
        stated = self.spacing * np.arange(self.n_pairs)
        begin = self.spacing * self.n_pairs + self.min_gap
        slots = (length - begin) // 2
        weights = np.arange(1, slots + 1) ** (self.power - 1.0)
        asked = begin + 2 * rng.choice(slots, self.n_pairs, replace=False, p=weights / weights.sum())
        tokens = self.fillers(rng, length)
        for places in (stated, asked):
            tokens[places], tokens[places + 1] = pairs.T
        order = np.argsort(asked)
        return TaskRow(tokens, asked[order] + 1, (asked - stated)[order], stated[order])

    def retold(self, length: int, seed: int, index: int, ways: int) -> tuple[np.ndarray, int]:
        """One statement in other words: the same pairs in other orders, among other filler, then one question.

        Args:
            length: tokens of a row; the last one is the key that is asked for.
            seed: of the statements.
            index: of the statement.
            ways: how often it is told.

        Returns:
            Rows int32 [ways, length], and the value that must follow each of them.

        Raises:
            TaskError: when `length` cannot hold it.
        """
        self.check_length(length)
        rng = np.random.default_rng([0x7E11, seed, index])
        pairs = np.stack([self.draw(rng, 0, self.n_pairs), self.draw(rng, 1, self.n_pairs)], 1)
        rows = self.fillers(rng, ways * length).reshape(ways, length).astype(np.int32)
        stated = 1 + self.spacing * np.arange(self.n_pairs)
        for row in rows:
            row[stated], row[stated + 1] = rng.permutation(pairs).T
        rows[:, 0], rows[:, -1] = BOS, pairs[0, 0]
        return rows, int(pairs[0, 1])
