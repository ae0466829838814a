"""Which tokens of which document stand in row r: an endless, seeded sequence of rows with random access.

The place of every token is a function of (seed, row) alone, so that a run resumes from a number, on any number of
processes, and a new stage with another sequence length begins where the last one ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dsv4_jax.errors import UserError


class Piece(NamedTuple):
    """Tokens [begin, end) of a document in an epoch, standing in a row from `column` on."""

    epoch: int
    document: int
    begin: int
    end: int
    column: int


_AT_ONCE = 1 << 16

Lengths = Callable[[int], np.ndarray]
"""Epoch -> number of tokens of every document in it, int64 [documents]."""


class ConcatThenSplit:
    """Documents in shuffled order one after another, cut into rows of equal length: nothing is lost, nothing padded.

    With `align` > 1 each document begins at a multiple of it, so that blocks of that size never straddle two documents.
    """

    def __init__(self, lengths: Lengths, row_length: int, seed: int, start: int = 0, align: int = 1):
        """Row 0 begins at place `start` of the endless stream of tokens (padding of `align` included)."""
        if align > 1 and (row_length % align or start % align):
            raise UserError(f"align {align} must divide the row length {row_length} and the start {start}")
        self.row_length, self.start = row_length, start
        self._lengths, self._seed, self._align = lengths, seed, align
        self._epoch_ends: list[int] = []

    def row(self, index: int) -> Iterator[Piece]:
        """The pieces of a row, from left to right."""
        first = self.start + index * self.row_length
        place = first
        while place < first + self.row_length:
            epoch = self._epoch_at(place)
            order, starts, lengths = self._plan(epoch)
            local = place - (self._epoch_ends[epoch - 1] if epoch else 0)
            slot = int(np.searchsorted(starts, local, side="right")) - 1
            begin, column = local - int(starts[slot]), place - first
            end = min(int(lengths[slot]), begin + self.row_length - column)
            if begin < end:
                yield Piece(epoch, int(order[slot]), begin, end, column)
            place += min(int(starts[slot + 1]) - local, self.row_length - column)

    def _epoch_at(self, place: int) -> int:
        while not self._epoch_ends or self._epoch_ends[-1] <= place:
            starts = self._plan(len(self._epoch_ends))[1]
            self._epoch_ends.append((self._epoch_ends[-1] if self._epoch_ends else 0) + int(starts[-1]))
        return int(np.searchsorted(self._epoch_ends, place, side="right"))

    @functools.lru_cache(maxsize=3)  # noqa: B019 (lives as long as the run)
    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of documents, where each begins within the epoch (and the end), and their lengths in that order."""
        order, lengths = shuffled(self._lengths(epoch), self._seed, epoch)
        return order, np.concatenate([[0], np.cumsum(_round_up(lengths, self._align))]), lengths


class FirstFit:
    """Whole documents put into the first of some open rows that has room; longer ones are cut first. Rows are padded.

    Documents keep their context where they fit into a row (fine-tuning); `ConcatThenSplit` wastes nothing.
    """

    OPEN_ROWS = 32

    def __init__(self, lengths: Lengths, row_length: int, seed: int, start: int = 0, align: int = 1):
        """Row 0 is the one after `start` places (rows of `row_length`, padding included)."""
        if align > 1 and row_length % align:
            raise UserError(f"align {align} must divide the row length {row_length}")
        self.row_length, self.start = row_length, start
        self._lengths, self._seed, self._align = lengths, seed, align
        self._epoch_ends: list[int] = []

    def row(self, index: int) -> Iterator[Piece]:
        """The pieces of a row, from left to right."""
        index += -(-self.start // self.row_length)
        while not self._epoch_ends or self._epoch_ends[-1] <= index:
            starts = self._plan(len(self._epoch_ends))[1]
            self._epoch_ends.append((self._epoch_ends[-1] if self._epoch_ends else 0) + len(starts) - 1)
        epoch = int(np.searchsorted(self._epoch_ends, index, side="right"))
        pieces, starts = self._plan(epoch)
        row = index - (self._epoch_ends[epoch - 1] if epoch else 0)
        return (Piece(epoch, *piece) for piece in pieces[starts[row] : starts[row + 1]].tolist())

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document, begin, end and column of all pieces [pieces, 4], row by row, and the piece each row begins with."""
        document, begin, end = _cut(*shuffled(self._lengths(epoch), self._seed, epoch), self.row_length)
        sizes = _round_up(end - begin, self._align)
        rows = _first_fit(sizes, self.row_length, self.OPEN_ROWS)
        by_row = np.argsort(rows, kind="stable")
        sizes, starts = sizes[by_row], np.concatenate([[0], np.cumsum(np.bincount(rows))])
        before = np.cumsum(sizes) - sizes
        column = before - np.repeat(before[starts[:-1]], np.diff(starts))
        return np.stack([document[by_row], begin[by_row], end[by_row], column], 1), starts


def _first_fit(sizes: np.ndarray, row_length: int, open_rows: int) -> np.ndarray:
    """The row of each piece: the first of the open ones with room, else a new one, for which the oldest is closed.

    The rooms of the open rows are bit fields of one integer, the oldest lowest, each with a free bit above: one
    subtraction compares a size with all of them. No step of this loop may cost much, there is one for each piece.
    """
    width = row_length.bit_length() + 1
    ones = sum(1 << i * width for i in range(open_rows))
    free = ones << (width - 1)
    rooms, oldest, count = 0, 0, 0
    rows = np.empty(len(sizes), np.int64)
    for start in range(0, len(sizes), _AT_ONCE):
        found = []
        for size in sizes[start : start + _AT_ONCE].tolist():
            fits = ((rooms | free) - size * ones) & free
            if fits:
                place = (fits & -fits).bit_length() - width
            else:
                if count == open_rows:
                    rooms, oldest, count = rooms >> width, oldest + 1, count - 1
                place = count * width
                rooms, count = rooms + (row_length << place), count + 1
            rooms -= size << place
            found.append(oldest + place // width)
        rows[start : start + _AT_ONCE] = found
    return rows


PACKINGS = {"concat": ConcatThenSplit, "first_fit": FirstFit}


def shuffled(lengths: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in the order of an epoch, and their lengths in that order; empty ones left out."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(lengths))
    order = order[lengths[order] > 0]
    if not len(order):
        raise UserError("there are no documents to train on")
    return order, lengths[order]


def _cut(order: np.ndarray, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, begin and end of pieces of at most `most` tokens, int64 [pieces] each."""
    counts = _round_up(lengths, most) // most
    document, first = np.repeat(order, counts), np.cumsum(counts) - counts
    begin = (np.arange(len(document)) - np.repeat(first, counts)) * most
    return document, begin, np.minimum(begin + most, np.repeat(lengths, counts))


def _round_up(value, multiple: int):
    return -(-value // multiple) * multiple
