"""How the words of a block's entries fill whole rows of 128, which is what TPUs move and keep dense.

An entry is cut into pieces of 128, 64, 32, .. words, and pieces of one size lie side by side: 146 words into 128 and 32
(of which 18 are used), so that 32 entries take 32 rows and 8. Plain numbers, shared by the pools and by `dsv4 plan`.
"""

from __future__ import annotations

from typing import NamedTuple

WORD = 4  # bytes
LANES = 128  # words of a row
SUBLANES = 8  # the last but one dimension of a TPU's tiles: rows of a block come in eights
FEW_ROWS = 16  # with fewer a block is one long row, of any length


class Piece(NamedTuple):
    """`size` words of every entry from its word `start` on, side by side in the rows from `row` on."""

    start: int
    size: int
    row: int


def pieces_of(words: int, entries: int) -> list[Piece]:
    """How entries of `words` words are cut: into as few rows for `entries` of them as can be, then into few pieces."""
    ways = [_cut(words, entries, least) for least in (1, 2, 4, 8, 16, 32, 64, LANES)]
    return min(ways, key=lambda pieces: (_rows(pieces, entries), len(pieces)))


def rows_of(words: int, entries: int) -> int:
    """Rows of a block of `entries` entries of `words` words."""
    return _rows(pieces_of(words, entries), entries)


def words_of(nbytes: int) -> int:
    """Words that hold `nbytes` bytes."""
    return -(-nbytes // WORD)


def _cut(words: int, entries: int, least: int) -> list[Piece]:
    """Pieces of 128 words, then smaller ones down to `least`, where the last one may not be full."""
    start, row, pieces = 0, 0, []
    while start < words:
        size = LANES
        while size > least and start + size > -(-words // least) * least:
            size //= 2
        pieces.append(Piece(start, size, row))
        start, row = start + size, row - (-entries * size // LANES)
    return pieces


def _rows(pieces: list[Piece], entries: int) -> int:
    rows = sum(-(-entries * piece.size // LANES) for piece in pieces)
    return rows if rows < FEW_ROWS else -(-rows // SUBLANES) * SUBLANES
