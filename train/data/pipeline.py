"""From token files to batches: shuffle, fill in the middle, pack, shard, resume, for ever."""

from __future__ import annotations

import functools
import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from train.data.batches import Batch, RowBatches
from train.data.packing import PACKINGS, Piece
from train.data.retrieval import RecallTask
from train.data.tokens import TokenStore

_MIXTURE_PARTS = 1 << 20


@dataclass(frozen=True)
class BatchConfig:
    """What the batches of one training stage look like.

    Attributes:
        seq_len: tokens of a row.
        batch_size: rows of a batch, over all processes together.
        seed: decides the order of documents, the holes of fill-in-the-middle, and the recall documents.
        packing: `concat` (one stream cut into rows, no padding) or `first_fit` (documents kept whole where they fit).
        align: documents begin at multiples of this.
        fim_rate: share of documents rearranged for fill-in-the-middle (the report: 0.1).
        recall: the long-range recall task to mix in; its documents fill whole rows.
        mixture: share of rows that are recall documents, in [0, 1).
        start: where this stage begins in the stream of tokens: the `offset` at which the stage before it ended.
        shuffle_rows: rows are drawn in random order from consecutive stretches of so many. Neighbouring rows belong to
            one document; a batch of them teaches far less than a batch from everywhere. 1 keeps the order.
    """

    seq_len: int
    batch_size: int
    seed: int = 0
    packing: Literal["concat", "first_fit"] = "concat"
    align: int = 1
    fim_rate: float = 0.0
    recall: RecallTask | None = None
    mixture: float = 0.0
    start: int = 0
    shuffle_rows: int = 1

    def __post_init__(self) -> None:
        """Refuses values that cannot work; says which."""
        if self.packing not in PACKINGS:
            raise UserError(f"packing {self.packing!r} is not one of {', '.join(PACKINGS)}")
        if min(self.seq_len, self.batch_size, self.align, self.shuffle_rows) < 1 or self.start < 0:
            raise UserError("seq_len, batch_size, align and shuffle_rows must be at least 1, start at least 0")
        if not 0 <= self.fim_rate <= 1 or not 0 <= self.mixture < 1:
            raise UserError(f"fim_rate {self.fim_rate} must lie in [0, 1] and mixture {self.mixture} in [0, 1)")
        if self.mixture and self.recall is None:
            raise UserError("mixture > 0 needs a recall task")


class Rows:
    """Every row of a stage by its number: the whole truth about the order of the data."""

    def __init__(self, store: TokenStore, config: BatchConfig):
        """Plans the rows over the training documents of `store`."""
        self.store, self.config = store, config
        fim = (FIM_BEGIN, FIM_HOLE, FIM_END) if config.fim_rate else ()
        self._fim_ids = [store.tokenizer.special_id(token) for token in fim]
        packing = PACKINGS[config.packing]
        self._packing = packing(self._lengths, config.seq_len, config.seed, config.start, config.align)
        self._mixed_parts = round(config.mixture * _MIXTURE_PARTS)

    def row(self, index: int) -> Batch:
        """Row `index` as a batch entry without the batch axis."""
        before = self._recall_rows(index)
        if self.config.recall and self._recall_rows(index + 1) > before:
            return self._recall_row(before)
        row = empty_rows((self.config.seq_len,), self.store.tokenizer.pad_id)
        if self.store.answers is not None:
            row["loss_mask"] = np.zeros(self.config.seq_len, np.int32)
        for segment, piece in enumerate(self._packing.row(self._place(index - before)), 1):
            put(row, piece.column, segment, self._tokens(piece), self._answers(piece))
        return row

    def offset(self, rows: int) -> int:
        """Place in the stream of tokens after so many rows: the `start` of a stage that goes on from there."""
        stretch = self.config.shuffle_rows
        text_rows = -(-(rows - self._recall_rows(rows)) // stretch) * stretch  # a stretch begun is not returned to
        return self.config.start + text_rows * self.config.seq_len

    def _place(self, number: int) -> int:
        """Which row of the packing is the `number`-th text row."""
        stretch, within = divmod(number, self.config.shuffle_rows)
        return stretch * self.config.shuffle_rows + int(self._order(stretch)[within])

    @functools.lru_cache(maxsize=3)  # noqa: B019 (lives as long as the run)
    def _order(self, stretch: int) -> np.ndarray:
        rng = np.random.default_rng([self.config.seed, self.config.start, 3, stretch])
        return rng.permutation(self.config.shuffle_rows)

    def _recall_rows(self, index: int) -> int:
        """How many of the first `index` rows are recall documents: evenly spread, exact, without randomness."""
        return index * self._mixed_parts // _MIXTURE_PARTS

    def _recall_row(self, number: int) -> Batch:
        assert self.config.recall is not None
        seed = (self.config.seed, self.config.start, number)  # with the start, so that no stage repeats another's
        document = self.config.recall.document(self.store, self.config.seq_len, seed)
        row = empty_rows((self.config.seq_len,), self.store.tokenizer.pad_id)
        put(row, 0, 1, document.tokens)
        return row

    def _lengths(self, epoch: int) -> np.ndarray:
        return self.store.lengths[self.store.train_documents] + len(self._fim_ids) * self._has_hole(epoch)

    @functools.lru_cache(maxsize=3)  # noqa: B019 (lives as long as the run)
    def _has_hole(self, epoch: int) -> np.ndarray:
        chosen = np.random.default_rng([self.config.seed, epoch, 1]).random(len(self.store.train_documents))
        return chosen < self.config.fim_rate

    def _tokens(self, piece: Piece) -> np.ndarray:
        document = self.store.document(self.store.train_documents[piece.document])
        if self._has_hole(piece.epoch)[piece.document]:
            rng = np.random.default_rng([self.config.seed, piece.epoch, 2, piece.document])
            document = fill_in_the_middle(document, rng, *self._fim_ids)
        return document[piece.begin : piece.end]

    def _answers(self, piece: Piece) -> np.ndarray | None:
        answers = self.store.answers_of(self.store.train_documents[piece.document])
        return None if answers is None else answers[piece.begin : piece.end]


class TrainBatches(RowBatches):
    """The batches of a training stage over a corpus."""

    def __init__(self, store: TokenStore, config: BatchConfig, own: Sequence[int] | None = None):
        """See `RowBatches`."""
        self.rows = Rows(store, config)
        identity = {"data": store.identity, "stage": asdict(config)}
        super().__init__(self.rows, config.batch_size, identity, own)

    @property
    def offset(self) -> int:
        """Where a stage that follows now begins: its `start`."""
        return self.rows.offset(self.step * self.rows.config.batch_size)


def heldout_batches(
    store: TokenStore, seq_len: int, batch_size: int, *, documents: int | None = None
) -> Iterator[Batch]:
    """The text of the (first `documents`) held-out documents, each token predicted exactly once.

    A document longer than a row is cut; each further piece repeats the last token of the piece before it, so that the
    next-token targets within the segments are all tokens but BOS, once. Divide the summed loss by
    `store.heldout_size(documents)` (see `bits_per_byte`). All batches are full [batch_size, seq_len]; the rest is
    padding.
    """
    pieces = [
        (i, slice(begin, begin + seq_len))
        for i in store.heldout_documents[:documents]
        for begin in range(0, max(1, int(store.lengths[i]) - 1), seq_len - 1)
    ]
    for first in range(0, len(pieces), batch_size):
        batch = empty_rows((batch_size, seq_len), store.tokenizer.pad_id)
        if store.answers is not None:
            batch["loss_mask"] = np.zeros((batch_size, seq_len), np.int32)
        for place, (document, piece) in enumerate(pieces[first : first + batch_size]):
            answers = store.answers_of(document)
            row = {name: array[place] for name, array in batch.items()}
            put(row, 0, 1, store.document(document)[piece], None if answers is None else answers[piece])
        yield batch


def documents_within(store: TokenStore, seq_len: int, rows: int) -> int:
    """How many of the first held-out documents fill no more than so many rows of `heldout_batches`; at least one."""
    targets = np.maximum(store.lengths[store.heldout_documents] - 1, 1)
    filled = np.cumsum(-(-targets // (seq_len - 1)))
    return max(1, int(np.searchsorted(filled, rows, side="right")))


def empty_rows(shape: tuple[int, ...], pad_id: int) -> Batch:
    """Rows of padding: `pad_id`, segment 0, position 0."""
    zeros = np.zeros(shape, np.int32)
    return {"tokens": np.full(shape, pad_id, np.int32), "segment_ids": zeros, "positions": zeros.copy()}


def put(row: Batch, column: int, segment: int, tokens: np.ndarray, answers: np.ndarray | None = None) -> None:
    """Writes a piece of a document into a row, in place; `answers` are the tokens that are learned, if not all are."""
    place = slice(column, column + len(tokens))
    row["tokens"][place], row["segment_ids"][place] = tokens, segment
    row["positions"][place] = np.arange(len(tokens))
    if answers is not None:
        row["loss_mask"][place] = answers


def fill_in_the_middle(document: np.ndarray, rng: np.random.Generator, begin: int, hole: int, end: int) -> np.ndarray:
    """BOS text EOS -> BOS <begin> prefix <hole> suffix <end> middle EOS (prefix, suffix, middle), cut at two places."""
    text = document[1:-1]
    first, second = np.sort(rng.integers(0, len(text) + 1, 2))
    parts = [document[:1], [begin], text[:first], [hole], text[second:], [end], text[first:second], document[-1:]]
    return np.concatenate([np.asarray(part, document.dtype) for part in parts])


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed natural-log loss over a text of `n_bytes` -> bits for each byte of it."""
    return nats / math.log(2) / n_bytes


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` needs for the text, in bits per byte: the line that a language model must get under."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
