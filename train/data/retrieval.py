"""Long-range recall: statements `set name value` far behind the window, asked for again after real text.

A model without compressed attention cannot do better than guess; loss on ordinary text hardly shows the difference.
After multi-query associative recall (Zoology, arXiv 2312.04927), with natural text between the pairs and the questions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import Tokenizer
from train.data.tokens import TokenStore

_STATEMENT = 4  # verb, name, value, line end: the name right before the value, so that one induction step answers
_LOWER, _UPPER = b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class RecallDocument:
    """One document of the task.

    Attributes:
        tokens: BOS, pairs, text, questions, (text, questions, ...), EOS, int32 [length].
        answers: places of the values that must be predicted (from the place before), int64 [questions].
        distances: how far back the same value last stood, int64 [questions].
    """

    tokens: np.ndarray
    answers: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class RecallTask:
    """A family of recall documents.

    Attributes:
        n_pairs: names, each with a value of its own, stated at the beginning; every round asks all of them.
        min_distance: each question comes at least this many tokens after the last statement of its pair; take the
            window or more.
        rounds: times that all pairs are asked; None: as often as `min_distance` lets fit, which trains fastest.
        n_names, n_values: ordinary single tokens to draw from. Pairings are drawn anew for each document.
        phase: tokens of text before the first statement; None: 0 to 3 at random, so that statements fall on every
            residue of a compression ratio of 4.
    """

    n_pairs: int = 8
    min_distance: int = 256
    rounds: int | None = None
    n_names: int = 64
    n_values: int = 64
    phase: int | None = None

    def document(
        self, store: TokenStore, length: int, seed: Sequence[int], *, from_heldout: bool = False
    ) -> RecallDocument:
        """The document of a seed, exactly `length` tokens; its text is taken from one side of the corpus.

        Raises:
            UserError: when `length` cannot hold one round, or the vocabulary has too few plain words.
        """
        rng = np.random.default_rng([0x5EED, *seed])
        words = Words.of(store.tokenizer, self.n_names, self.n_values)
        names, values = (self._draw(rng, pool) for pool in (words.names, words.values))
        lead = int(rng.integers(0, 4)) if self.phase is None else self.phase
        gaps = self._gaps(rng, length - lead)
        text = np.split(_text(store, rng, lead + sum(gaps), names, from_heldout), np.cumsum([lead, *gaps[:-1]]))
        writer = _Writer(store.tokenizer.bos_id, text[0])
        writer.state(words, names, values, range(self.n_pairs))
        for filler in text[1:]:
            writer.append(filler)
            writer.state(words, names, values, rng.permutation(self.n_pairs))
        return writer.finish(store.tokenizer.eos_id, self.n_pairs)

    def chance(self, tokenizer: Tokenizer) -> dict[str, float]:
        """Accuracy of guessing: `blind` among all values, `shown` among the values of the document."""
        words = Words.of(tokenizer, self.n_names, self.n_values)
        return {"blind": 1 / len(words.values), "shown": 1 / self.n_pairs}

    def _draw(self, rng: np.random.Generator, pool: np.ndarray) -> np.ndarray:
        if len(pool) < self.n_pairs:
            raise UserError(f"{self.n_pairs} pairs need as many single-token words; this vocabulary offers {len(pool)}")
        return rng.choice(pool, self.n_pairs, replace=False)

    def _gaps(self, rng: np.random.Generator, length: int) -> list[int]:
        """Tokens of text before each round: at least `min_distance`, the rest shared out at random."""
        block = _STATEMENT * self.n_pairs
        room = length - 2 - block
        rounds = self.rounds or room // (self.min_distance + block)
        spare = room - rounds * (self.min_distance + block)
        if rounds < 1 or spare < 0:
            needed = 5 + block + (self.rounds or 1) * (self.min_distance + block)
            raise UserError(
                f"{self.n_pairs} pairs asked after {self.min_distance} tokens need a row of {needed} tokens"
            )
        return (self.min_distance + rng.multinomial(spare, [1 / rounds] * rounds)).tolist()


@dataclass(frozen=True)
class Words:
    """Single tokens that statements are made of: names and values (with their leading blank), verb, line end."""

    names: np.ndarray
    values: np.ndarray
    verb: int
    line_end: int

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(tokenizer: Tokenizer, n_names: int, n_values: int) -> Words:
        """Whole lower-case words spread evenly over the vocabulary; letters and capitals where there are few."""
        known = {piece: i for i, piece in enumerate(tokenizer.pieces)}
        words = (p for p in tokenizer.pieces if re.fullmatch(rb"[a-z]{3,10}", p))
        whole = [known[b" " + p] for p in words if b" " + p in known]  # word parts are tokens in one of two ways only
        names, values, verb = whole[::2], whole[1::2], known.get(b"set", known[b"="])
        if min(len(names), len(values)) < min(n_names, n_values, 16):
            names, values = ([known[bytes([c])] for c in letters] for letters in (_LOWER, _UPPER))
            verb = known[b"="]
        return Words(_spread(names, n_names), _spread(values, n_values), verb, known[b"\n"])


@dataclass
class RecallScore:
    """Collects exact-match answers over batches of `recall_batches`."""

    correct: list[np.ndarray] = field(default_factory=list)
    distances: list[np.ndarray] = field(default_factory=list)
    residues: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: dict[str, np.ndarray], predicted: np.ndarray) -> None:
        """`predicted` [B, S]: at each place the most likely next token."""
        rows, places = np.nonzero(batch["answers"])
        distances = batch["distances"][rows, places]
        self.correct.append(np.asarray(predicted)[rows, places - 1] == batch["tokens"][rows, places])
        self.distances.append(distances)
        self.residues.append((places - distances - 2) % 4)

    @property
    def accuracy(self) -> float:
        """Share of the questions answered with the right token."""
        return float(np.concatenate(self.correct).mean())

    def by_distance(self, edges: Sequence[int]) -> dict[int, float]:
        """Accuracy for distances from each edge up to the next, by the lower edge; empty bins are absent."""
        bins = np.digitize(np.concatenate(self.distances), edges) - 1
        return {edges[i]: self._mean(bins == i) for i in range(len(edges)) if (bins == i).any()}

    def by_phase(self) -> dict[int, float]:
        """Accuracy by (where the pair's last statement begins) mod 4: compression by 4 may favour some residues."""
        residues = np.concatenate(self.residues)
        return {i: self._mean(residues == i) for i in range(4) if (residues == i).any()}

    def _mean(self, chosen: np.ndarray) -> float:
        return float(np.concatenate(self.correct)[chosen].mean())


def recall_batches(
    store: TokenStore, task: RecallTask, seq_len: int, batch_size: int, rows: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Evaluation set of `rows` documents: batches as in training, of which the last can have fewer rows.

    Each has also `answers` (bool) and `distances` (int32, 0 elsewhere), [B, S].
    The text between comes from held-out documents, and no seed of a training run gives the same pairings.
    """
    for first in range(0, rows, batch_size):
        numbers = range(first, min(first + batch_size, rows))
        documents = [task.document(store, seq_len, (seed, 0, i, 1), from_heldout=True) for i in numbers]
        tokens = np.stack([document.tokens for document in documents])
        answers, distances = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
        for row, document in enumerate(documents):
            answers[row, document.answers], distances[row, document.answers] = True, document.distances
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens.shape).copy()
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
        yield {**batch, "answers": answers, "distances": distances}


class _Writer:
    """Appends tokens and remembers where each pair's value stands."""

    def __init__(self, bos_id: int, lead: np.ndarray):
        self.tokens = [bos_id, *lead.tolist()]
        self.stated: list[tuple[int, int]] = []

    def append(self, tokens: np.ndarray) -> None:
        self.tokens += tokens.tolist()

    def state(self, words: Words, names: np.ndarray, values: np.ndarray, pairs: Sequence[int] | np.ndarray) -> None:
        for pair in pairs:
            self.stated.append((int(pair), len(self.tokens) + 2))
            self.tokens += [words.verb, int(names[pair]), int(values[pair]), words.line_end]

    def finish(self, eos_id: int, n_pairs: int) -> RecallDocument:
        last = dict(self.stated[:n_pairs])
        answers, distances = [], []
        for pair, place in self.stated[n_pairs:]:
            answers.append(place)
            distances.append(place - last[pair])
            last[pair] = place
        return RecallDocument(np.array([*self.tokens, eos_id], np.int32), np.array(answers), np.array(distances))


def _text(store: TokenStore, rng: np.random.Generator, n: int, names: np.ndarray, from_heldout: bool) -> np.ndarray:
    """`n` tokens of running text from random places, without BOS and EOS and without the names of the document."""
    documents = store.heldout_documents if from_heldout else store.train_documents
    parts, have = [], 0
    while have < n:
        document = store.document(rng.choice(documents))[1:-1]
        part = document[int(rng.integers(0, max(1, len(document) - n))) :][: n - have]
        part = part[~np.isin(part, names)]
        parts.append(part.astype(np.int32))
        have += len(part)
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _spread(ids: Sequence[int], count: int) -> np.ndarray:
    return np.array(ids)[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)]
