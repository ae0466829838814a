"""Prompts' chunks over a cache: kernels of rows get the entries laid out, and give what XLA gives over the pages."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels import indexer_topk, laid_out, platforms
from dsv4_jax.kernels.indexer_topk import EXACT, PagedOperands, gpu_paged, index_topk
from dsv4_jax.kernels.indexer_topk import gpu as gpu_index
from dsv4_jax.kernels.indexer_topk import paged as paged_index
from dsv4_jax.kernels.indexer_topk import tpu as tpu_index
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart, InWords
from dsv4_jax.kernels.sparse_attention import gather_attention, gpu, paged, range_attention, tpu, tpu_range
from dsv4_jax.quantization.storage import Fp4, Fp8WithRope

BLOCK, COLUMNS, SCALE = 8, 5, 0.05
SEEN = np.array([37, 0, 12])  # entries of each sequence


def cache(storage, pool=ByPart, seed=0):
    """Pages of three sequences, blocks in any order; whatever lies behind a sequence's entries is NaN."""
    rng = np.random.default_rng(seed)
    batch, blocks = len(SEEN), len(SEEN) * COLUMNS
    kind = pool(storage, BLOCK)
    store = jax.tree.map(lambda x: jnp.full_like(x, jnp.array(-1).astype(x.dtype)), kind.zeros(2, blocks))
    tables = jnp.asarray(rng.permutation(blocks).reshape(batch, COLUMNS), jnp.int32)
    pages = Pages(store, jnp.int32(1), tables, kind)
    index = np.arange(COLUMNS * BLOCK)
    index = jnp.asarray(np.where(index < SEEN[:, None], index, -1), jnp.int32)
    return pages.write(index, jnp.asarray(rng.normal(size=(*index.shape, storage.width)), jnp.bfloat16))


def bounds(length):
    """Up to where each query sees, [B, S]: the last queries of a sequence see all of it."""
    return jnp.asarray(np.maximum(SEEN[:, None] - np.arange(length)[::-1] // 2, 0), jnp.int32)


def drawn(*shape, seed=1, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def interpreted(backend):
    return SimpleNamespace(forward=partial(backend.forward, interpret=pltpu.InterpretParams()))


def close(found, wanted):
    """To the rounding of BF16 weights and outputs; a query that sees nothing gives zeros and -inf."""
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sequences", [1, 2, 3])
@pytest.mark.parametrize("tile", [BLOCK, 3 * BLOCK, 100 * BLOCK])
def test_entries_are_laid_out_for_a_few_sequences_at_a_time_with_zeros_behind_them(monkeypatch, sequences, tile):
    """As far as kernels read: where tiles are whole ones of a kernel's, what no tile wrote is whatever was there."""
    monkeypatch.setattr(laid_out, "NUMBERS", sequences * COLUMNS * BLOCK * 128)
    monkeypatch.setattr(laid_out, "TILE", tile)
    monkeypatch.setattr(laid_out, "WHOLE", BLOCK)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    pages, shapes = cache(Fp8WithRope(128, 64)), []

    def apply(rows, queries, extra):
        shapes.append(rows.shape)
        return {"rows": rows, "sum": queries.sum((1, 2)) + extra}

    queries, extra = drawn(3, 2, 1, 128), drawn(3, 128)
    found = jax.jit(partial(laid_out.over_rows, apply))(pages, jnp.asarray(SEEN), queries, extra)
    everything = jnp.arange(pages.capacity)[None].repeat(3, 0)
    behind = np.asarray(everything)[..., None] >= SEEN[:, None, None]
    wanted = np.where(behind, 0, np.asarray(pages.read_entries(everything, jnp.bfloat16), np.float32))
    rows = np.asarray(found["rows"], np.float32)
    for first in range(0, len(SEEN), len(rows) if sequences == 3 else sequences):
        group = slice(first, first + sequences)
        written = max(-(-SEEN[group].max() // BLOCK) * BLOCK, 1)  # at least: a tile may be larger
        np.testing.assert_array_equal(rows[group, :written], wanted[group, :written])
    assert np.isnan(rows).any() == (sequences < 3 and tile < 100 * BLOCK)  # nothing is filled by the capacity
    np.testing.assert_array_equal(found["sum"], queries.sum((1, 2)) + extra)
    assert shapes[0][0] == {1: 1, 2: 2, 3: 3}[sequences]


@pytest.mark.parametrize("pool", [ByPart, InWords])
def test_attention_over_what_is_laid_out_is_attention_over_the_pages(pool):
    pages, length = cache(Fp8WithRope(512, 64), pool), 9
    q, hi = drawn(3, length, 4, 512), bounds(length)
    rng = np.random.default_rng(2)
    order = np.argsort(rng.random((3, length, pages.capacity)), -1)[..., :6]
    indices = jnp.asarray(np.where(order < np.asarray(hi)[..., None], order, -1), jnp.int32)
    close(
        jax.jit(partial(paged._gather_over_rows, interpreted(tpu), SCALE))(q, pages, indices),
        paged._gather_attention(q, pages, indices, SCALE),
    )
    close(
        jax.jit(partial(paged._range_over_rows, interpreted(tpu_range), SCALE))(q, pages, hi),
        paged._range_attention(q, pages, hi, SCALE),
    )


@pytest.mark.parametrize("pool", [ByPart, InWords])
def test_the_best_of_what_is_laid_out_are_the_best_of_the_pages(pool, monkeypatch):
    """Whatever is behind what was laid out: keys that nobody sees are read, and their scores left out."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    for name, size in {"NUMBERS": COLUMNS * BLOCK * 128, "TILE": BLOCK, "WHOLE": BLOCK}.items():
        monkeypatch.setattr(laid_out, name, size)
    pages, length = cache(Fp4(128), pool), 9
    operands, hi = (drawn(3, length, 16, 128), pages, drawn(3, length, 16, dtype=jnp.float32)), bounds(length)
    kernel = partial(tpu_index.index_topk, interpret=pltpu.InterpretParams())
    found = np.asarray(jax.jit(partial(indexer_topk._over_rows, kernel, 6, EXACT))(*operands, hi))
    wanted = np.asarray(paged_index.index_topk(*operands, hi, 6))
    last = np.iinfo(np.int32).max  # by position, the unused ones at the end
    np.testing.assert_array_equal(found, _by_position(wanted, last))


def _by_position(choice, last):
    ordered = np.sort(np.where(choice < 0, last, choice), -1)
    return np.where(ordered == last, -1, ordered)


def kernels(platform, length, width=512, pool=ByPart):
    """Names of the kernels that attention and the search over a cache are traced with."""
    pages, keys = cache(Fp8WithRope(width, 64), pool), cache(Fp4(128), pool)
    q, queries = (jax.ShapeDtypeStruct((3, length, 64, width), jnp.bfloat16) for width in (width, 128))
    weights = jax.ShapeDtypeStruct((3, length, 64), jnp.float32)
    numbers = jax.ShapeDtypeStruct((3, length), jnp.int32)

    def everything(q, queries, weights, hi, choice):
        found = index_topk(PagedOperands(queries, keys, weights), jnp.zeros_like(hi), hi, 4)
        return found, gather_attention(q, pages, choice, SCALE), range_attention(q, pages, hi, hi, SCALE)

    with platforms.compiling_for(platform):
        choice = jax.ShapeDtypeStruct((3, length, 4), jnp.int32)
        text = str(jax.make_jaxpr(everything)(q, queries, weights, numbers, choice))
    names = "paged_index_scores", "index_scores", "index_topk", "index_topk_few", "gather_attention", "range_attention"
    return {name for name in names if f"{name}\n" in text}


def test_chunks_of_prompts_take_the_kernels_of_rows(monkeypatch):
    rows = {"index_topk", "gather_attention", "range_attention"}
    assert kernels("tpu", laid_out.MANY, pool=InWords) == rows
    assert kernels("tpu", laid_out.MANY - 1, pool=InWords) == {"index_topk"}
    assert kernels("tpu", 8, pool=InWords) == {"index_topk_few"}  # attention has its own of pages, for 32 in a block
    assert not kernels("cpu", laid_out.MANY)
    for module in (gpu, gpu_index, gpu_paged):
        monkeypatch.setattr(module, "is_hopper", lambda: True)
    assert kernels("cuda", laid_out.MANY) == {"index_scores", "gather_attention", "range_attention"}
    assert kernels("cuda", laid_out.MANY - 1) == {"gather_attention", "range_attention"}  # these read the pages
