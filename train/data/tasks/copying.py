"""Copying: symbols scattered in filler, to be repeated in order; and a segment that comes twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from train.data.tasks.task import MARK, Chance, Task, TaskError, TaskRow, scattered


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying (Mamba, arXiv 2312.00752): the symbols between filler, then all of them without it.

    Attributes:
        n_copied: symbols of a row, drawn with repetition.
        n_symbols: words to draw from.
    """

    n_copied: int = 8
    n_symbols: int = 16

    @property
    def chance(self) -> Chance:
        """One of the symbols; one of the row's, which may be the right one or equal to it."""
        return Chance(1 / self.n_symbols, 1 / self.n_copied + (1 - 1 / self.n_copied) / self.n_symbols)

    @property
    def pools(self) -> tuple[int, ...]:
        """Symbols."""
        return (self.n_symbols,)

    @property
    def least_length(self) -> int:
        """The symbols twice and the mark between."""
        return 2 * self.n_copied + 1

    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """Symbols anywhere before MARK and the copy, which end the row."""
        symbols = rng.choice(self.words(0), self.n_copied)
        begin = length - self.n_copied
        places = scattered(rng, self.n_copied, 1, begin - 1)
        tokens = self.fillers(rng, length)
        tokens[places], tokens[begin - 1], tokens[begin:] = symbols, MARK, symbols
        answers = begin + np.arange(self.n_copied)
        return TaskRow(tokens, answers, answers - places, places)


@dataclass(frozen=True)
class Induction(Task):
    """A random segment that comes twice, with filler between (Olsson et al., arXiv 2209.11895).

    Attributes:
        segment: tokens of the segment, all different; all but the first of its second copy are answers.
        n_symbols: words to draw from.
        min_gap: tokens between the copies, at least.
    """

    segment: int = field(default=16, metadata={"least": 2})
    n_symbols: int = 64
    min_gap: int = field(default=0, metadata={"least": 0})

    def __post_init__(self) -> None:
        """Refuses a segment longer than there are symbols."""
        super().__post_init__()
        if self.segment > self.n_symbols:
            raise TaskError(f"segment is {self.segment}: n_symbols must be as many, for they are all different")

    @property
    def chance(self) -> Chance:
        """One of the symbols."""
        return Chance(1 / self.n_symbols, 1 / self.segment)

    @property
    def pools(self) -> tuple[int, ...]:
        """Symbols."""
        return (self.n_symbols,)

    @property
    def least_length(self) -> int:
        """Both copies and the gap."""
        return 2 * self.segment + self.min_gap

    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """The segment at the beginning, and again anywhere behind the gap."""
        symbols = self.draw(rng, 0, self.segment)
        again = int(rng.integers(self.segment + self.min_gap, length - self.segment + 1))
        tokens = self.fillers(rng, length)
        tokens[: self.segment], tokens[again : again + self.segment] = symbols, symbols
        places = np.arange(1, self.segment)
        return TaskRow(tokens, again + places, np.full(len(places), again), places - 1)
