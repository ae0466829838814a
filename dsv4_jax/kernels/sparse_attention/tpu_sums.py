"""Gradients of rows that queries chose, added up on a TPU in the order of queries: equal inputs give equal bits.

A kernel that visits its rows by `tpu_fetch.each_tile` makes gradients [TILE, K] of a tile of the rows that a query
chose. `Sums` are those of all rows, in VMEM, to which the gradients are added at once: nothing of the size
queries x k x K leaves the chip. Where they do not fit, the gradients leave as `Rows` for a few queries at a time, and
XLA's scatter adds them up.

Both have the same methods. Inside a kernel `refs` are the targets, the result and then `memory()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.chunks import join, split
from dsv4_jax.kernels.sparse_attention import tpu_fetch as fetch

SUM_BYTES = 40 << 20  # of VMEM: 20,000 entries of 512 columns, 80,000 keys of 128
TOGETHER = 8  # rows whose sums are loaded, added to and stored together
STEP = 64  # rows in one block of instructions
ROWS_QUERIES = 64  # of a sequence, whose gradients, [k, K] float32 each, are in HBM at once where sums do not fit


def add_up(
    part: Callable[..., Any], operands: Any, indices: jax.Array, rows: jax.Array, columns: int
) -> tuple[Any, jax.Array]:
    """What `part` gives for all queries, and the gradient of the rows.

    Args:
        part: gives for `sums`, indices, operands and rows, of some queries of each sequence, arrays of these queries
            and `sums.result`, from a kernel that calls the methods of `sums`. Sequences may come in parts, beside
            another.
        operands: arrays [B, S, ...].
        indices: int32 [B, S, k], -1 is unused. No row occurs twice in a query's choice.
        rows: [B, T, K].
        columns: of the gradients that the kernel makes, whole lanes, at least K.

    Returns:
        Arrays [B, S, ...], and a gradient [B, T, K] in the rows' dtype.
    """
    (batch, count, _), choices = rows.shape, indices.shape[-1]
    sums = Sums(count, columns, parts=1 + batch % 2)
    if choices % fetch.TILE == 0 and sums.rows * columns * 4 <= SUM_BYTES:
        return _at_once(sums, part, operands, indices, rows)
    return _few_at_a_time(Rows(choices, columns), part, operands, indices, rows)


def _at_once(sums: Sums, part, operands, indices, rows):
    (batch, length), (count, width) = indices.shape[:2], rows.shape[1:]

    def in_parts(x, fill=0):
        pad = (0, 0), (0, -length % (sums.parts * fetch.QUERIES)), *((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, pad, constant_values=fill).reshape(batch * sums.parts, -1, *x.shape[2:])

    padded = jnp.pad(rows, ((0, 0), (0, sums.rows - count), (0, 0)))
    found, total = part(sums, in_parts(indices, -1), *map(in_parts, operands), padded)
    total = total.reshape(batch, sums.parts, sums.rows, sums.columns).sum(1)[:, :count, :width]
    return [x.reshape(batch, -1, *x.shape[2:])[:, :length] for x in found], total.astype(rows.dtype)


def _few_at_a_time(sums: Rows, part, operands, indices, rows):
    def one(total, args):
        indices, operands = args
        found, gradients = part(sums, indices, *operands, rows)
        gradients = gradients[:, : indices.shape[1], : indices.shape[2], : rows.shape[2]]
        add = jax.vmap(lambda total, index, more: total.at[index].add(more, mode="drop"))
        return add(total, jnp.where(indices >= 0, indices, rows.shape[1]), gradients), found

    parts = split(indices, ROWS_QUERIES, fill=-1), split(operands, ROWS_QUERIES)
    total, found = jax.lax.scan(one, jnp.zeros(rows.shape, jnp.float32), parts)
    return join(found, indices.shape[1]), total.astype(rows.dtype)


@dataclass(frozen=True)
class Sums:
    """Gradients of all rows of a sequence, in VMEM until the last query.

    Args:
        count: T, rows of a sequence.
        columns: numbers of a row, whole lanes.
        parts: in so many parts a sequence's queries are summed beside another, for chips with two cores.
    """

    count: int
    columns: int
    parts: int

    compiler = replace(fetch.COMPILER, dimension_semantics=("parallel", "arbitrary"))  # one query after another

    @property
    def rows(self) -> int:
        """Rows of a sequence, and some more: the last one is chosen where a choice is unused."""
        return self.count + 8 - self.count % 8

    @property
    def planes(self) -> int:
        """A row of a sum is so many rows of 128 numbers, one behind the other."""
        return self.columns // fetch.LANES

    def targets(self, indices: jax.Array) -> jax.Array:
        """Where the sums of chosen rows begin, as `tpu_fetch.rows_to_fetch` has its numbers."""
        return fetch.rows_to_fetch(indices, self.rows, together=len(indices))[0] * self.planes

    def result(self, batch: int, slots: int) -> jax.ShapeDtypeStruct:
        """The sums of each sequence, or of each of its parts."""
        return jax.ShapeDtypeStruct((batch, self.rows * self.planes, fetch.LANES), jnp.float32)

    def memory(self) -> list[Any]:
        """For the sums, the gradients of a tile, and a DMA."""
        rows = [self.rows * self.planes, fetch.TILE * self.planes]
        return [*(pltpu.VMEM((n, fetch.LANES), jnp.float32) for n in rows), pltpu.SemaphoreType.DMA(())]

    def begin(self, refs) -> None:
        """Before QUERIES queries."""
        _, _, sums, _, _ = refs
        step = 8 * self.planes

        def clear(i, _):
            sums[pl.ds(pl.multiple_of(i * step, step), step)] = jnp.zeros((step, fetch.LANES), jnp.float32)

        pl.when(pl.program_id(1) == 0)(lambda: jax.lax.fori_loop(0, self.rows // 8, clear, None))

    def before(self, t, refs) -> None:
        """Before query t."""

    def add(self, t, i, gradients, refs) -> None:
        """The gradients [TILE, K] of tile i of query t.

        Rows are loaded and stored in the order of their instructions, and of a query's choice each is another one: a
        few sums are loaded before the first of them is stored, which need not wait for each other.
        """
        targets, _, sums, waiting, _ = refs
        for plane in range(self.planes):
            lanes = slice(plane * fetch.LANES, (plane + 1) * fetch.LANES)
            waiting[pl.ds(plane, fetch.TILE, stride=self.planes)] = gradients[:, lanes]
        step, together = min(STEP, fetch.TILE), min(TOGETHER, fetch.TILE)
        first = t * (targets.shape[-1] // fetch.QUERIES) + i * fetch.TILE

        def some(n, _):
            for group in range(0, step, together):
                places = [n * step + group + j for j in range(together)]
                at = [pl.multiple_of(targets[0, 0, 0, first + place], self.planes) for place in places]
                more = [waiting[pl.ds(place * self.planes, self.planes)] for place in places]
                added = [sums[pl.ds(row, self.planes)] + x for row, x in zip(at, more, strict=True)]
                for row, x in zip(at, added, strict=True):
                    sums[pl.ds(row, self.planes)] = x

        jax.lax.fori_loop(0, fetch.TILE // step, some, None)

    def behind(self, t, refs) -> None:
        """Behind query t."""

    def end(self, refs) -> None:
        """Behind QUERIES queries."""
        _, result, sums, _, copied = refs

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _():
            copy = pltpu.make_async_copy(sums, result.at[pl.program_id(0)], copied)
            copy.start()
            copy.wait()


@dataclass(frozen=True)
class Rows:
    """Gradients of the rows that each query chose, [B, S, k, K] in HBM. Those of a query leave while the next computes.

    Args:
        choices: k.
        columns: K, whole lanes.
    """

    choices: int
    columns: int

    compiler = fetch.COMPILER
    parts = 1

    @property
    def places(self) -> int:
        """Places of a query's choices, whole tiles."""
        return fetch.tiles_of(self.choices) * fetch.TILE

    def targets(self, indices: jax.Array) -> jax.Array:
        """Not used."""
        return fetch.rows_to_fetch(indices, 1)[0]

    def result(self, batch: int, slots: int) -> jax.ShapeDtypeStruct:
        """Gradients of the rows that each of `slots` queries chose."""
        return jax.ShapeDtypeStruct((batch, slots, self.places, self.columns), jnp.float32)

    def memory(self) -> list[Any]:
        """For the gradients of two queries."""
        return [pltpu.VMEM((2, self.places, self.columns), jnp.float32), pltpu.SemaphoreType.DMA((2,))]

    def begin(self, refs) -> None:
        """Before QUERIES queries."""

    def before(self, t, refs) -> None:
        """Before query t: there must be room for its gradients."""
        pl.when(t >= 2)(self._leaving(t - 2, refs).wait)

    def add(self, t, i, gradients, refs) -> None:
        """The gradients [TILE, K] of tile i of query t."""
        refs[2][t % 2, pl.ds(pl.multiple_of(i * fetch.TILE, fetch.TILE), fetch.TILE)] = gradients

    def behind(self, t, refs) -> None:
        """Behind query t: its gradients leave."""
        self._leaving(t, refs).start()

    def end(self, refs) -> None:
        """Behind QUERIES queries."""
        for t in (fetch.QUERIES - 2, fetch.QUERIES - 1):
            self._leaving(t, refs).wait()

    def _leaving(self, t, refs):
        _, result, leaving, left = refs
        query = result.at[pl.program_id(0), pl.program_id(1) * fetch.QUERIES + t]
        return pltpu.make_async_copy(leaving.at[t % 2], query, left.at[t % 2])
