"""What all tasks share: a row as a pure function of (seed, index), its vocabulary, and what guessing gives."""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from dsv4_jax.errors import UserError

BOS, ASK, SET, MARK = 0, 2, 3, 4  # 1 is EOS in every configuration
FIRST_WORD = 8
FILLERS = 16


class TaskError(UserError):
    """A task that cannot be made; the message names the option."""


class Chance(NamedTuple):
    """Accuracy of guessing: `blind` among all words that answers are drawn from, `shown` among those of the row."""

    blind: float
    shown: float

    @property
    def line(self) -> float:
        """What a picture draws: `shown`, unless the row shows one word only."""
        return self.shown if self.shown < 1 else self.blind


@dataclass(frozen=True)
class TaskRow:
    """One row. The answers are tokens of the row itself: each is to be predicted from the place before it.

    Attributes:
        tokens: int32 [S].
        answers: places of the answers, increasing, int64 [Q].
        distances: how far before each answer the same token stands that determines it, int64 [Q].
        needles: place of the first token of the statement that determines each answer, int64 [Q]. Modulo a compression
            ratio it is the needle's phase.
    """

    tokens: np.ndarray
    answers: np.ndarray
    distances: np.ndarray
    needles: np.ndarray

    def after(self, lead: np.ndarray) -> TaskRow:
        """The same row with `lead` before it."""
        tokens = np.concatenate([lead, self.tokens]).astype(np.int32)
        return TaskRow(tokens, self.answers + len(lead), self.distances, self.needles + len(lead))


@dataclass(frozen=True)
class Task(abc.ABC):
    """A family of rows. Every option is a number, so that recipes can name and change it.

    Attributes:
        offset: rows begin with 0 to offset - 1 filler tokens, drawn anew for each row: a random document offset.
    """

    offset: int = 1

    def __post_init__(self) -> None:
        """Refuses options below their least value."""
        for field in fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least", 1)
            if value < least:
                raise TaskError(f"{field.name} is {value}; at least {least} is needed")

    def row(self, length: int, seed: int, index: int, *, heldout: bool = False) -> TaskRow:
        """Row `index` of a seed, `length` tokens: the same whoever asks. Held-out rows have draws of their own.

        Raises:
            TaskError: when `length` cannot hold it.
        """
        self.check_length(length)
        rng = np.random.default_rng([0x7A5C, seed, int(heldout), index])
        lead = int(rng.integers(self.offset))
        return self.body(length - 1 - lead, rng).after(np.concatenate([[BOS], self.fillers(rng, lead)]))

    def check_length(self, length: int) -> None:
        """Raises TaskError when rows of `length` tokens cannot hold the task, whatever is drawn."""
        if length - self.offset < self.least_length:
            raise TaskError(f"needs rows of {self.least_length + self.offset} tokens, not {length}")

    @property
    @abc.abstractmethod
    def chance(self) -> Chance:
        """Accuracy of guessing."""

    @property
    @abc.abstractmethod
    def pools(self) -> tuple[int, ...]:
        """Sizes of the sets of words that statements are made of; no word is in two of them."""

    @property
    @abc.abstractmethod
    def least_length(self) -> int:
        """Tokens that `body` needs."""

    @abc.abstractmethod
    def body(self, length: int, rng: np.random.Generator) -> TaskRow:
        """A row of `length` tokens without BOS and offset."""

    @property
    def vocab_size(self) -> int:
        """Ids in use: special ones, fillers, words."""
        return FIRST_WORD + FILLERS + sum(self.pools)

    def words(self, pool: int) -> np.ndarray:
        """The ids of one of `pools`."""
        first = FIRST_WORD + FILLERS + sum(self.pools[:pool])
        return np.arange(first, first + self.pools[pool])

    def draw(self, rng: np.random.Generator, pool: int, count: int) -> np.ndarray:
        """`count` different words of a pool."""
        return rng.choice(self.words(pool), count, replace=False)

    def fillers(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Tokens that mean nothing."""
        return rng.integers(FIRST_WORD, FIRST_WORD + FILLERS, count)


def scattered(rng: np.random.Generator, count: int, size: int, room: int) -> np.ndarray:
    """Places of `count` pieces of `size` tokens within `room`, increasing, not overlapping, all arrangements alike."""
    free = room - count * size
    return np.sort(rng.choice(free + count, count, replace=False)) + np.arange(count) * (size - 1)
