"""Index scores over packed keys in a cache's pages, by the FP4 products of Blackwell (see `gpu_blackwell.py`).

128 keys are the rows of a product, the lanes of tensor memory; heads of one or two queries are its columns. Of four
warpgroups one copies keys, one starts products, and two take turns to weight a product's heads and add them up.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.indexer_topk.gpu_blackwell_keys import SCALES, SCALES_SHAPE, TILE, fetch, finish
from dsv4_jax.kernels.indexer_topk.gpu_blackwell_keys import numbers_in_shared_memory as numbers
from dsv4_jax.kernels.indexer_topk.gpu_paged import WIDTH
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention.gpu_tiles import load, over_rows
from dsv4_jax.quantization.storage import Fp4

PROGRAMS = 148  # processors of a B200
PAIR = 2  # queries of a product, at most: their heads fill its 128 columns
SLOTS, ASKED = 12, 8  # tiles of keys in shared memory, and how many of them are on their way together
WEIGHERS = 2  # warpgroups, each with a product's place in tensor memory; then come
ISSUER, FETCHER = WEIGHERS, WEIGHERS + 1
LAYOUT = plgpu.Layout.TCGEN05


class Stored(NamedTuple):
    """References to FP4 rows in global memory, found through a table of blocks."""

    packed: Any
    scales: Any


class Tiles(NamedTuple):
    """References to how tiles of keys are counted, one sequence after the other."""

    first: Any  # of each program: the sequence of its first tile
    seen: Any  # keys of a sequence that are wanted
    ends: Any  # tiles up to the end of a sequence

    def range(self, program: Any) -> tuple[Any, Any, Any]:
        """A program's first tile, one past its last one, and the first one's sequence."""
        begin, end = (_share(program + i, self.ends[self.ends.shape[0] - 1]) for i in (0, 1))
        return begin, end, self.first[program]

    def find(self, i: Any, b: Any) -> tuple[Any, Any]:
        """The sequence of tile i, which is b or a later one, and the tile's number there."""
        b = lax.while_loop(lambda b: self.ends[b] <= i, lambda b: b + 1, b)
        return b, i - self.ends[b] + lax.div(self.seen[b] + (TILE - 1), TILE)


class Scratch(NamedTuple):
    """What a program has besides its operands and results; `here` says what memory of which kind and size."""

    q: Any  # of a sequence, in shared memory; each product's in 128 rows
    q_scales: Any
    keys: Any
    key_scales: Any
    q_factors: Any  # from here on in tensor memory: scales of queries
    key_factors: Any  # of two tiles in turns
    products: Any  # of two in turns
    arrived: Any  # from here on barriers: a tile
    used: Any  # a tile
    multiplied: Any  # a product
    read: Any  # a product
    idle: Any  # all products so far

    @classmethod
    def here(cls, parts: int, columns: int, interpret: Any) -> Scratch:
        """For `parts` products of a tile, of so many columns."""
        scales = lambda tiles: plgpu.SMEM((tiles, *SCALES_SHAPE), jnp.float8_e8m0fnu)  # noqa: E731
        counts = SLOTS, SLOTS, WEIGHERS, WEIGHERS, 1
        barriers = [plgpu.Barrier(num_barriers=n, orders_tensor_core=True) for n in counts]
        factors = partial(plgpu.TMEM, dtype=jnp.float8_e8m0fnu, layout=plgpu.TMEMLayout.SCALES_LAYOUT)
        return cls(
            numbers(parts, interpret),
            scales(parts),
            numbers(SLOTS, interpret),
            scales(SLOTS),
            factors((TILE, parts * SCALES)),
            factors((TILE, 2 * SCALES)),
            plgpu.TMEM((TILE, WEIGHERS * columns), jnp.float32),
            *barriers,
        )


def scores(
    queries: jax.Array,
    weights: jax.Array,
    sequences: jax.Array,
    seen: jax.Array,
    pages: Pages,
    wide: int,
    interpret: Any,
) -> jax.Array:
    """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])` of the first keys of sequences, in whole tiles of 128.

    Args:
        queries: BF16 [B, S, Hi, 128] whose numbers `Fp4` stores exactly; S is 1, 2 or 4, Hi 32 or 64.
        weights: [B, S, Hi].
        sequences: whose keys each row's queries see, int32 [B].
        seen: how many keys are wanted, int32 [B].
        pages: the keys of all sequences.
        wide: columns of the result.
        interpret: see `gpu_blackwell.index_topk`.

    Returns:
        [B, S, wide] float32; nothing is written behind the tiles.
    """
    batch, length, heads, _ = queries.shape
    together, total = min(length, PAIR), pages.store["packed"].shape[1]
    parts, columns = length // together, together * heads
    q = queries.reshape(batch * parts, columns, WIDTH)
    q = Fp4(WIDTH).encode(jnp.pad(q, ((0, 0), (0, TILE - columns), (0, 0))))
    ends = jnp.cumsum(-(-seen // TILE), dtype=jnp.int32)
    first = jnp.searchsorted(ends, _share(jnp.arange(PROGRAMS), ends[-1]), side="right", method="compare_all")
    stored = (pages.store[name].reshape(-1, *pages.store[name].shape[2:]) for name in ("packed", "scales"))
    operands = (
        Stored(q["packed"], q["scales"]),
        jnp.arange(batch * parts, dtype=jnp.int32),
        Stored(*stored),
        pages.tables,
        pages.layer.reshape(1) * total,
        sequences,
        weights.astype(jnp.float32),
        Tiles(first.astype(jnp.int32), seen, ends),
    )
    leaves, tree = jax.tree.flatten(operands)
    return plgpu.kernel(
        partial(_scores, tree=tree, together=together, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((batch, length, wide), jnp.float32),
        grid=(PROGRAMS,),
        grid_names=("program",),
        num_threads=WEIGHERS + 2,
        thread_name="warpgroup",
        scratch_types=[*Scratch.here(parts, columns, interpret)],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="fp4_index_scores",
    )(*leaves)


def _share(program: Any, tiles: Any) -> Any:
    """The first tile of a program."""
    return lax.div(program * tiles, PROGRAMS)


def _scores(*refs, tree, together, interpret):
    """Some tiles of keys of some sequences, which may begin and end anywhere in one."""
    q, q_blocks, keys, tables, layer, sequences, weights, tiles = tree.unflatten(refs[: tree.num_leaves])
    out, *scratch = refs[tree.num_leaves :]
    here, me = Scratch(*scratch), lax.axis_index("warpgroup")
    mine = tiles.range(lax.axis_index("program"))

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(72, action="decrease")
        _fetch(mine, tiles, keys, tables, layer[0], sequences, here, interpret)

    @pl.when(me == ISSUER)
    def _():
        plgpu.set_max_registers(72, action="decrease")
        _multiply(mine, tiles, q, q_blocks, here, interpret)

    @pl.when(me < WEIGHERS)
    def _():
        plgpu.set_max_registers(184, action="increase")
        _weigh(mine, tiles, weights, out, me, together, here, interpret)


def _fetch(mine, tiles, keys, tables, layer, sequences, here, interpret):
    """All tiles into shared memory, several at a time, each as soon as there is room."""
    begin, end, b = mine
    count, per_block = end - begin, keys.packed.shape[1]

    def step(n, b):
        b, tile = tiles.find(jnp.minimum(begin + n, end - 1), b)
        slot = lax.rem(n, SLOTS)

        @pl.when(n < count)
        def _():
            pl.when(n >= SLOTS)(lambda: plgpu.barrier_wait(here.used.at[slot]))
            columns = tile * (TILE // per_block), lax.div(tiles.seen[b] - 1, per_block)
            to = here.keys.at[slot], here.key_scales.at[slot]
            fetch(keys, tables.at[sequences[b]], layer, columns, to, interpret)

        finish(ASKED, interpret)
        pl.when(n >= ASKED)(lambda: plgpu.barrier_arrive(here.arrived.at[lax.rem(n - ASKED, SLOTS)]))
        return b

    def until_used(n, _):
        plgpu.barrier_wait(here.used.at[lax.rem(n, SLOTS)])
        return _

    lax.fori_loop(0, jnp.where(count > 0, count + ASKED, 0), step, b)
    lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, until_used, None)


def _multiply(mine, tiles, q, q_blocks, here, interpret):
    """Starts all products, each as soon as its tile is there and its place in tensor memory is free."""
    begin, end, b = mine
    parts, columns = here.q.shape[0], here.products.shape[1] // WEIGHERS

    def load_queries(b):
        for part in range(parts):
            block = b * parts + part
            fetch(q, q_blocks, 0, (block, block), (here.q.at[part], here.q_scales.at[part]), interpret)
        finish(0, interpret)
        for part in range(parts):
            _scales(here.q_scales.at[part], _place(here.q_factors, part), interpret)

    def step(n, before):
        b, _ = tiles.find(begin + n, before)

        @pl.when(b != before)
        def _():
            plgpu.tcgen05_commit_arrive(here.idle.at[0])
            plgpu.barrier_wait(here.idle.at[0])

        pl.when((b != before) | (n == 0))(lambda: load_queries(b))
        slot, factors = lax.rem(n, SLOTS), _place(here.key_factors, lax.rem(n, 2))
        for part in range(parts):
            number = n * parts + part
            weigher = lax.rem(number, WEIGHERS)
            pl.when(number >= WEIGHERS)(lambda weigher=weigher: plgpu.barrier_wait(here.read.at[weigher]))
            if part == 0:
                # The products that read the place of these scales are those of two tiles before: they have ended.
                plgpu.barrier_wait(here.arrived.at[slot])
                _scales(here.key_scales.at[slot], factors, interpret)
            scales = {} if interpret else {"a_scale": factors, "b_scale": _place(here.q_factors, part)}
            plgpu.tcgen05_mma(
                _columns(here.products, weigher),
                here.keys.at[slot],
                here.q.at[part, pl.ds(0, columns)].T,
                here.multiplied.at[weigher],
                accumulate=False,
                **scales,
            )
        plgpu.tcgen05_commit_arrive(here.used.at[slot])
        return b

    lax.fori_loop(0, end - begin, step, b)


def _weigh(mine, tiles, weights, out, me, together, here, interpret):
    """Every second product's heads, relu and weight and sum: scores of a tile's 128 keys."""
    begin, end, b = mine
    parts, heads = here.q.shape[0], weights.shape[2]
    first = lax.rem(me, parts) * together  # query
    tiles_apart = WEIGHERS // parts

    def step(m, b):
        n = m * tiles_apart + lax.div(me, parts)
        b, tile = tiles.find(begin + n, b)
        rows = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        factors = [load(weights.at[b, first + t], LAYOUT.reduce(0), interpret) for t in range(together)]
        plgpu.barrier_wait(here.multiplied.at[me])
        place = _columns(here.products, me)
        products = [plgpu.async_load_tmem(place.at[:, pl.ds(t * heads, heads)]) for t in range(together)]
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(here.read.at[me])
        for t, x in enumerate(products):
            factor = plgpu.layout_cast(over_rows(factors[t], x), LAYOUT)
            out[b, first + t, rows] = (jnp.maximum(x, 0.0) * factor).sum(axis=1)
        return b

    count = lax.div(end - begin + (tiles_apart - 1) - lax.div(me, parts), tiles_apart)
    lax.fori_loop(0, count, step, b)


def _columns(products, weigher):
    """A weigher's place in tensor memory."""
    count = products.shape[1] // WEIGHERS
    return products.at[:, pl.ds(pl.multiple_of(weigher * count, count), count)]


def _place(factors, tile):
    """The place of a tile's scales in tensor memory."""
    return factors.at[:, pl.ds(tile * SCALES, SCALES)]


def _scales(here, factors, interpret):
    """A tile's scales into tensor memory, before the products that come after."""
    if not interpret:
        plgpu.async_copy_scales_to_tmem(here, factors)
