"""The TPU kernels that read a cache's entries: what they undo bit for bit, and what they attend, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import few
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart, InWords
from dsv4_jax.kernels.sparse_attention import (
    gather_attention,
    range_attention,
    reference,
    tpu_pages,
    tpu_pages_range,
    tpu_words,
)
from dsv4_jax.kernels.sparse_attention.tpu_words import BF16, FP8
from dsv4_jax.quantization.storage import Fp8WithRope, Plain

SCALE, LAYERS, BLOCKS = 0.05, 2, 8
# Relative to the largest value. BF16: outputs and weights are rounded to 8 bits, in another order than the reference.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
NAN = np.uint32(0xFFFFFFFF)  # in every format and part of it


@pytest.fixture
def small_tiles(monkeypatch):
    """A few entries per tile and loop step, so that few of them already need several of both, and padding."""
    monkeypatch.setattr(tpu_pages, "TILE", 8)
    monkeypatch.setattr(tpu_pages, "UNROLL", 4)
    monkeypatch.setattr(tpu_pages_range, "TILE", 16)


def close(name, found, wanted, dtype):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(found), finite, err_msg=name)
    largest = np.abs(wanted[finite]).max(initial=1e-6)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) <= TOLERANCE[dtype] * largest, name


def cache(rng, storage, per_block, batch, columns, shared):
    """Pages with all entries written, in blocks in no order; the rest of the pool is NaN."""
    pool = InWords(storage, per_block)
    blocks = rng.permutation(BLOCKS)
    tables = np.stack([blocks[:columns], blocks[-columns:]][:batch])
    if shared:
        tables[:, 0] = blocks[0]
    store = jax.tree.map(lambda x: jnp.full_like(x, NAN), pool.zeros(LAYERS, BLOCKS))
    pages = Pages(store, jnp.int32(1), jnp.asarray(tables, jnp.int32), pool)
    count = columns * per_block
    entries = jnp.asarray(rng.normal(size=(batch, count, 512)) * np.exp(rng.normal(size=(batch, count, 1))), "float32")
    index = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return pages.write(index, entries)


def choices(rng, batch, length, entries, count):
    """Some of `count` distinct entries in no order, unused ones among them; the last query of a sequence has none."""
    order = np.argsort(rng.random((batch, length, entries)), -1)[..., :count]
    order = np.pad(order, ((0, 0), (0, 0), (0, count - order.shape[-1])), constant_values=-1)
    unused = rng.random(order.shape) < rng.choice([0, 0.3, 0.9])
    unused[0, -1] = True
    return jnp.asarray(np.where(unused, -1, order), jnp.int32)


def stated(q, pages, indices):
    """The reference over the stored entries, in float32."""
    known = jnp.broadcast_to(jnp.arange(pages.capacity), (q.shape[0], pages.capacity))
    entries = pages.read_entries(known, jnp.float32)
    return reference.gather_attention(q.astype(jnp.float32), entries, indices, SCALE)


def check(q, pages, indices, interpret):
    found = tpu_pages.forward_pages(q, pages, indices, SCALE, interpret)
    assert found[0].dtype == q.dtype and found[0].shape == q.shape and found[1].shape == q.shape[:3]
    for name, a, b in zip(("out", "lse"), found, stated(q, pages, indices), strict=True):
        close(name, a, b, str(q.dtype))
    nothing = np.asarray((indices < 0).all(-1))
    assert not np.asarray(found[0], np.float32)[nothing].any()
    return found


@pytest.mark.usefixtures("small_tiles")
@few(4)
@given(
    storage=st.sampled_from([FP8, BF16]),
    per_block=st.sampled_from([1, 4, 32]),
    batch=st.integers(1, 2),
    length=st.integers(1, 2),
    heads=st.sampled_from([1, 8]),
    count=st.integers(1, 21),
    shared=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_chosen_entries_of_a_cache(storage, per_block, batch, length, heads, count, shared, dtype, seed):
    """Blocks shared by sequences, tables in no order, choices of any number, queries without any."""
    rng = np.random.default_rng(seed)
    pages = cache(rng, storage, per_block, batch, 3, shared)
    q = jnp.asarray(rng.normal(size=(batch, length, heads, 512)), dtype)
    check(q, pages, choices(rng, batch, length, pages.capacity, count), pltpu.InterpretParams())


@pytest.mark.usefixtures("small_tiles")
def test_no_races_and_equal_bits(capsys):
    rng = np.random.default_rng(1)
    pages = cache(rng, FP8, 32, 2, 3, True)
    q = jnp.asarray(rng.normal(size=(2, 2, 8, 512)), jnp.float32)
    indices = choices(rng, 2, 2, pages.capacity, 19)
    first, again = (check(q, pages, indices, pltpu.InterpretParams(detect_races=looking)) for looking in (True, False))
    assert "RACE DETECTED" not in capsys.readouterr().out
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("storage", "length", "dtype", "races"),
    [(FP8, 1, "float32", True), (FP8, 2, "bfloat16", False), (BF16, 2, "float32", False)],
)
def test_all_entries_of_sequences_of_all_lengths(storage, length, dtype, races, capsys):
    """Blocks of one entry; the last tile reaches beyond a sequence's blocks. What nobody has written is NaN."""
    rng, capacity = np.random.default_rng(length), 40
    pool, lengths = InWords(storage, 1), np.array([37, 0, 5])
    store = jax.tree.map(lambda x: jnp.full_like(x, NAN), pool.zeros(LAYERS, 3 * capacity))
    tables = jnp.arange(3 * capacity, dtype=jnp.int32).reshape(3, capacity)
    pages = Pages(store, jnp.int32(1), tables, pool, own_blocks=True)
    index = np.where(np.arange(capacity) < lengths[:, None], np.arange(capacity), -1)
    pages = pages.write(jnp.asarray(index, jnp.int32), jnp.asarray(rng.normal(size=(3, capacity, 512)), jnp.float32))
    q = jnp.asarray(rng.normal(size=(3, length, 4, 512)), dtype)
    hi = jnp.asarray(np.maximum(lengths[:, None] - np.arange(length)[::-1], 0), jnp.int32)
    assert tpu_pages_range.supports_pages(q, pages)
    found = tpu_pages_range.forward_pages(q, pages, hi, SCALE, pltpu.InterpretParams(detect_races=races))
    assert "RACE DETECTED" not in capsys.readouterr().out
    entries = jnp.nan_to_num(pages.read_entries(jnp.broadcast_to(jnp.arange(capacity), (3, capacity)), jnp.float32))
    wanted = reference.range_attention(q.astype(jnp.float32), entries, jnp.zeros_like(hi), hi, SCALE)
    for name, a, b in zip(("out", "lse"), found, wanted, strict=True):
        close(name, a, b, dtype)


def undone(storage, stored):
    """Entries [n] as the kernel undoes them, with the numbers put back into their order."""
    pool, count = InWords(storage, 32), len(next(iter(stored.values())))
    tables = jnp.arange(-(-count // 32), dtype=jnp.int32)[None]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    encoded = {name: jnp.asarray(x)[None] for name, x in stored.items()}
    store = pool.write(pool.zeros(1, tables.shape[1]), encoded, jnp.int32(0), index // 32, index % 32)
    pages = Pages(store, jnp.int32(0), tables, pool)
    rows, part = tpu_words.places(pages, index)
    first, second = tpu_words.rows_of(pages)[rows[:, 0], 0]
    planes = jax.jit(lambda *rows: tpu_words.numbers(*rows, storage))(first, second, part.reshape(-1, 1))
    return tpu_words.from_planes(jnp.concatenate(planes, axis=1), storage)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_fp8_number_with_every_scale_is_undone_to_the_bit(dtype):
    """The two codes of NaN are left out: only the scale says so in a cache. Byte 0 of a scale reads as zero on TPUs."""
    numbers = np.setdiff1d(np.arange(256), [127, 255]).astype(np.uint8)
    rng = np.random.default_rng(0)
    values = np.stack([np.roll(numbers, i)[np.arange(448) % 254] for i in range(1, 256)])
    scales = (np.arange(1, 256)[:, None] + np.arange(7) * 37 - 1) % 255 + 1
    rope = rng.integers(0, 1 << 15, (255, 64)) % 0x7F80 | rng.integers(0, 2, (255, 64)) << 15
    stored = {"values": values, "scales": scales.astype(np.uint8), "rope": rope.astype(np.uint16)}
    wanted = FP8.decode({name: jnp.asarray(x) for name, x in stored.items()}, dtype)
    found = undone(FP8, stored).astype(dtype)
    bits = lambda x: np.asarray(x).view(np.uint16 if dtype == "bfloat16" else np.uint32)  # noqa: E731
    finite = np.isfinite(np.asarray(wanted, np.float32))
    np.testing.assert_array_equal(np.isnan(np.asarray(found)), np.isnan(np.asarray(wanted)))
    np.testing.assert_array_equal(bits(found)[finite], bits(wanted)[finite])


def test_bf16_entries_are_undone_to_the_bit():
    values = np.random.default_rng(0).integers(0, 0x7F80, (64, 512)).astype(np.uint16)
    found = undone(BF16, {"values": values}).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), values)


@pytest.mark.parametrize("storage", [FP8, BF16])
def test_queries_come_back_from_the_order_of_planes(storage):
    x = jnp.arange(1024.0).reshape(2, 512)
    np.testing.assert_array_equal(tpu_words.from_planes(tpu_words.as_planes(x, storage), storage), x)


def taken(q, pages, platform="tpu", attend=gather_attention):
    """Whether a program for `platform` has a kernel."""
    number = jnp.zeros(q.shape[:2], jnp.int32)
    args = (jnp.zeros((*q.shape[:2], 4), jnp.int32),) if attend is gather_attention else (number, number)
    with platforms.compiling_for(platform):
        traced = jax.jit(lambda q, pages: attend(q, pages, *args, SCALE)).trace(q, pages)
        return "tpu_custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_only_programs_for_tpus_with_entries_that_fit_have_the_kernels(monkeypatch):
    q = jnp.zeros((2, 1, 8, 512), jnp.bfloat16)

    def pages(pool, blocks=BLOCKS, columns=3, **options):
        return Pages(pool.zeros(1, blocks), jnp.int32(0), jnp.zeros((2, columns), jnp.int32), pool, **options)

    fitting, owned = pages(InWords(FP8, 32)), {"own_blocks": True, "blocks": 16, "columns": 8}
    attended = lambda pages, *platform: taken(q, pages, *platform, attend=range_attention)  # noqa: E731
    assert attended(pages(InWords(FP8, 1), **owned)) and attended(pages(InWords(BF16, 1), **owned))
    assert not attended(pages(InWords(FP8, 1), **owned), "cpu")
    assert not attended(pages(InWords(FP8, 1), **owned | {"own_blocks": False}))
    assert not attended(pages(InWords(FP8, 32), **owned)) and not attended(pages(ByPart(FP8, 1), **owned))
    assert not attended(pages(InWords(FP8, 1), own_blocks=True, blocks=24, columns=12))
    assert taken(q, fitting) and taken(q, pages(InWords(BF16, 32))) and taken(q, pages(InWords(FP8, 1)))
    assert not taken(q, fitting, "cpu")
    others = ByPart(FP8, 32), InWords(Fp8WithRope(512, 128), 32), InWords(Plain(512, "float32"), 32)
    assert not any(taken(q, pages(pool)) for pool in others)
    assert not taken(q, pages(InWords(FP8, 1), blocks=7))  # its rows are in no whole tiles
    assert not taken(jnp.zeros((2, tpu_pages.FEW_QUERIES + 1, 8, 512), jnp.bfloat16), fitting)
    monkeypatch.setenv("DSV4_KERNELS", "xla")
    assert not taken(q, fitting)
