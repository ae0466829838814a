"""Finding the best of scores that lie in VMEM on a TPU: by counting, and collecting their positions by products.

See `tpu.py`, which says how, and `tpu_few.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
QUERIES = 8  # per step of the grid: one vector register holds 128 scores of each
CHUNKS = 16  # of 128 scores of each query that a counting pass takes at once
UNSEEN = -(1 << 31)  # in place of the score of an entry that a query may not see


class Lies(NamedTuple):
    """Whose scores the eight places of a row of 128 lanes have: a query's each, or all those of one, 128 apart."""

    one_query: bool

    @property
    def row(self) -> int:
        """Entries of a query in a row."""
        return LANES * (QUERIES if self.one_query else 1)

    def position(self, row: Any, place: Any, lane: Any) -> Any:
        """The entry whose score lies there."""
        return (row * QUERIES + place if self.one_query else row) * LANES + lane


OWN = Lies(False)


def forget(start, stop, scores_ref):
    """Fills the groups start <= i < stop of 128 rows with `UNSEEN`; returns the blocks of CHUNKS rows that they are."""

    def one(i, _):
        scores_ref[chunks(i * CHUNKS, CHUNKS)] = jnp.full((CHUNKS * QUERIES, LANES), UNSEEN, jnp.int32)
        return _

    blocks = start * (LANES // CHUNKS), stop * (LANES // CHUNKS)
    jax.lax.fori_loop(*blocks, one, 0)
    return blocks


def limits(scores_ref, start, stop, k, lies):
    """Of each query the k-th largest score, and the position below which entries with just that score are taken.

    Args:
        scores_ref: ordered scores.
        start: first block of CHUNKS rows of 128 entries.
        stop: one past the last.
        k: how many are chosen.
        lies: whose scores the places of a row are.
    """
    beyond = stop * (CHUNKS * lies.row)

    def count(reaches):
        def one(i, total):
            scores = scores_ref[chunks(i * CHUNKS, CHUNKS)].reshape(CHUNKS, QUERIES, LANES)
            row, place, lane = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(3))
            index = lies.position(i * CHUNKS + row, place, lane)
            return total + reaches(scores, index).astype(jnp.int32).sum(0)

        total = jax.lax.fori_loop(start, stop, one, jnp.zeros((QUERIES, LANES), jnp.int32))
        return jnp.broadcast_to(total.sum((0, 1) if lies.one_query else 1, keepdims=True), total.shape)

    full = functools.partial(jnp.full, (QUERIES, LANES), dtype=jnp.int32)
    visible = count(lambda score, index: score > UNSEEN)
    # At least k entries reach `low` (all visible ones where they are fewer), fewer than k reach `high`.
    low, high, reach, above = _bisect(
        lambda mid: count(lambda score, index: score >= mid), k, full(UNSEEN + 1), full((1 << 31) - 1), visible
    )
    ties = jnp.where(reach > k, k - above, 0)
    # At least `ties` of the tied entries lie below `end`: bisection over -end, so that more are found as it sinks.
    end, *_ = _bisect(
        lambda mid: count(lambda score, index: (score == low) & (index < -mid)), ties, -full(beyond),
        full(0), jnp.where(reach > k, reach - above, 0),
    )  # fmt: skip
    return low, jnp.where(reach > k, -end, beyond)


def _bisect(count, wanted, low, high, reach):
    """The largest `low` with count(low) >= wanted, or any whose count is just that; all [QUERIES, 128].

    Returns:
        low; high, the smallest number known to have less; their counts.
    """

    def unfinished(state):
        low, high, reach, _ = state
        return jnp.max(jnp.where((reach > wanted) & (high - 1 > low), 1, 0)) > 0

    def halve(state):
        low, high, reach, above = state
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = count(middle)
        up = found >= wanted
        pick = lambda a, b: jnp.where(up, a, b)  # noqa: E731
        return pick(middle, low), pick(high, middle), pick(found, reach), pick(above, found)

    return jax.lax.while_loop(unfinished, halve, (low, high, reach, jnp.zeros_like(low)))


def collect_chosen(t, taken, start, stop, scores_ref, limits_ref, out_ref, lies):
    """Write the positions of the chosen entries in place t of the groups start <= i < stop.

    `taken` of its query's have been written before; returns how many are then.
    """
    query = 0 if lies.one_query else t
    least, end = limits_ref[0, pl.ds(t, 1)], limits_ref[1, pl.ds(t, 1)]
    square = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)  # noqa: E731
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)
    until = (square(0) >= square(1)).astype(jnp.float32).astype(jnp.bfloat16)

    def one(group, taken):
        scores = scores_ref[pl.ds(group * LANES * QUERIES + t, LANES, stride=QUERIES), :]
        index = lies.position(group * LANES + square(0), t, square(1))
        chosen = (scores > least) | ((scores == least) & (index < end))
        chosen = chosen.astype(jnp.float32).astype(jnp.bfloat16)  # [row, place]
        of_row = product(chosen, ones, (((1,), (0,)), ((), ())))  # how many, the same in every column
        after = product(until, of_row.astype(jnp.bfloat16), (((1,), (0,)), ((), ()))).astype(jnp.int32) + taken
        before = after - of_row.astype(jnp.int32)

        def write(i, _):
            number = i * LANES + square(1)  # [row, slot]: the slot's number in the output
            holds = (before <= number) & (number < after)
            total = lambda x: jnp.where(holds, x, 0).sum(0, keepdims=True)  # noqa: E731
            row, rank, found = total(square(0)), total(number - before), total(1)
            held = holds.astype(jnp.float32).astype(jnp.bfloat16)
            places = product(chosen, held, (((0,), (0,)), ((), ())))  # [place, slot] of the slot's row
            reached = product(until, places.astype(jnp.bfloat16), (((1,), (0,)), ((), ()))).astype(jnp.int32)
            place = (reached <= rank).astype(jnp.int32).sum(0, keepdims=True)
            at = 0, 0, i, pl.ds(query, 1)
            out_ref[at] = jnp.where(found > 0, lies.position(group * LANES + row, t, place), out_ref[at])
            return _

        total = jnp.max(after)
        jax.lax.fori_loop(jax.lax.div(taken, LANES), reaching(total, LANES), write, 0)
        return total

    return jax.lax.fori_loop(start, stop, one, taken)


def ordered(scores, bf16):
    """Float32, rounded to BF16 if asked, as int32 of the same order; both zeros become 0."""
    bits = pltpu.bitcast(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    if bf16:  # to nearest, ties to even
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def reaching(count, size):
    """Pieces of `size` that hold `count`."""
    return jax.lax.div(count + (size - 1), size)


def chunks(i, count=1):
    """Where the scores of entries 128 i .. 128 (i + count) lie: for each 128 of them a row for each query."""
    return pl.ds(pl.multiple_of(i * QUERIES, QUERIES), count * QUERIES)
