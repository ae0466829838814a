"""Attention over ranges on Hopper: interpreted against the reference, PTX thread by thread, compiled for both GPUs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from drawing import few
from hopper import CALL, arrays, bf16, close, compile_for, int32, spilled, unswizzled
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import Machine

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart
from dsv4_jax.kernels.sparse_attention import bands, gpu, gpu_fetch, gpu_range, paged, reference
from dsv4_jax.kernels.sparse_attention import range_attention as attend_range
from dsv4_jax.kernels.sparse_attention import window_attention as attend_window
from dsv4_jax.kernels.sparse_attention.entries import window_band, window_bounds
from dsv4_jax.quantization.storage import Fp8WithRope, Plain

SCALE = 0.1
DENSE = bands.Band(512)


def operands(rng, batch, length, entries, width=128, heads=64):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    return draw(batch, length, heads, width), draw(batch, entries, width)


def random_bounds(rng, batch, length, entries):
    """Ranges of every length; the last query of a row sees nothing."""
    bounds = np.sort(rng.integers(0, entries + 1, (batch, length, 2)), -1)
    bounds[:, -1, 1] = bounds[:, -1, 0]
    return jnp.asarray(bounds, jnp.int32)


def stated(q, entries, bounds):
    """Of the reference, in float32."""
    return reference.range_attention(
        *(x.astype(jnp.float32) for x in (q, entries)), *jnp.moveaxis(bounds, -1, 0), SCALE
    )


def check_forward(q, entries, bounds, band, interpreter):
    found = gpu_range.forward(q, entries, bounds, SCALE, band, interpreter)
    for name, a, b in zip(("out", "lse"), found, stated(q, entries, bounds), strict=True):
        close(name, a, b)
    empty = np.asarray(bounds[..., 0] >= bounds[..., 1])
    assert not np.asarray(found[0], np.float32)[empty].any()


def check_gradients(rng, q, entries, bounds, band, interpreter):
    (out, lse), pull = jax.vjp(lambda *x: stated(*x, bounds), q, entries)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16)
    d_lse = jnp.where(jnp.isfinite(lse), jnp.asarray(rng.normal(size=lse.shape), jnp.float32), 0.0)
    wanted = pull((d_out.astype(jnp.float32), d_lse))
    saved = out.astype(q.dtype), lse, d_out, d_lse
    found = gpu_range.backward(q, entries, bounds, *saved, SCALE, band, interpreter)
    for name, a, b in zip(("d_q", "d_entries"), found, wanted, strict=True):
        close(name, a, b)
    return found


@pytest.mark.slow
@few(3)
@given(
    batch=st.integers(1, 2),
    length=st.integers(2, 3),
    entries=st.integers(1, 300),
    processors=st.sampled_from([1, 12]),
    heads=st.sampled_from([24, 64]),
    seed=st.integers(0, 99),
)
def test_ranges_whole_and_in_parts(batch, length, entries, processors, heads, seed, interpreter):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PROCESSORS", processors)
        q, keys = operands(rng, batch, length, entries, heads=heads)
        check_forward(q, keys, random_bounds(rng, batch, length, entries), DENSE, interpreter)


@pytest.mark.slow
@few(3)
@given(
    batch=st.integers(1, 2),
    length=st.integers(2, 12),
    entries=st.integers(1, 140),
    processors=st.sampled_from([1, 12]),
    heads=st.sampled_from([24, 64]),
    seed=st.integers(0, 99),
)
def test_gradients_of_ranges(batch, length, entries, processors, heads, seed, interpreter):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PROCESSORS", processors)
        q, keys = operands(rng, batch, length, entries, heads=heads)
        check_gradients(rng, q, keys, random_bounds(rng, batch, length, entries), DENSE, interpreter)


@pytest.mark.slow
def test_gradients_over_two_groups_of_heads_are_equal_bits_for_equal_inputs(interpreter, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", 2)
    first, again = (
        check_gradients(np.random.default_rng(1), *operands(np.random.default_rng(0), 1, 3, 70, 256, heads=128),
                        jnp.asarray([[[0, 70], [3, 66], [5, 5]]]), DENSE, interpreter)
        for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    "positions", [None, pytest.param([2, 0, 1], marks=pytest.mark.slow)], ids=["documents", "behind earlier tokens"]
)
def test_a_window_is_a_range_that_documents_cut(positions, interpreter):
    ids, window = jnp.asarray([[0, 0, 1]]), 2
    positions = None if positions is None else jnp.asarray([positions])
    q, kv = operands(np.random.default_rng(2), 1, 3, 3 if positions is None else 3 + window)
    bounds = window_bounds(1, 3, ids, window, positions)
    check_forward(q, kv, bounds, window_band(window), interpreter)
    if positions is None:
        wide = (x.astype(jnp.float32) for x in (q, kv))
        same = reference.window_attention(*wide, ids, window, SCALE)
        for a, b in zip(stated(q, kv, bounds), same, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_windows_that_documents_cut(interpreter):
    rng, ids, window = np.random.default_rng(2), jnp.asarray([[0, 0, 0, 1, 1, 2]]), 4
    q, kv = operands(rng, 1, 6, 6)
    check_gradients(rng, q, kv, window_bounds(1, 6, ids, window, None), window_band(window), interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [Plain(128, "bfloat16"), Fp8WithRope(128, 64)], ids=["bf16", "fp8"])
def test_all_entries_of_a_cache_as_they_are_stored(storage, interpreter, monkeypatch):
    """What a block holds behind a sequence's entries is not read: here NaN."""
    monkeypatch.setattr(gpu, "PROCESSORS", 4)
    q, entries = operands(np.random.default_rng(1), 2, 1, 160)
    nan = lambda x: jnp.full_like(x, jnp.iinfo(x.dtype).max)  # noqa: E731
    store = {name: nan(x) for name, x in storage.zeros((2, 11, 32)).items()}
    tables = jnp.asarray([[3, 0, 4, 9, 1], [10, 2, 6, 5, 7]], jnp.int32)
    hi = jnp.asarray([[150], [0]], jnp.int32)
    pages = Pages(store, jnp.int32(1), tables, ByPart(storage, 32))
    index = jnp.arange(160, dtype=jnp.int32)
    pages = pages.write(jnp.where(index < hi, index, -1), entries)
    found = gpu_range.forward_pages(q, pages, hi, SCALE, interpreter)
    for name, a, b in zip(("out", "lse"), found, paged._range_attention(q, pages, hi, SCALE), strict=True):
        close(name, a, b)


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_each_thread_copies_its_bytes_of_a_run(stored, width):
    rng = np.random.default_rng(width)
    rows = jnp.asarray(rng.normal(size=(72, width)), jnp.bfloat16)
    storage, blocks, per_block = Fp8WithRope(width, 64), np.asarray([48, 0, 60, 12, 24, 36], np.int32), 12
    first, end = 7, 66
    if stored == "bf16":
        contents, text = [np.asarray(rows)], gpu_fetch.plain_ptx(width, per_block)
    else:
        encoded = storage.encode(rows)
        contents = [np.asarray(encoded[name]) for name in ("values", "scales", "rope")]
        rows, text = storage.decode(encoded, jnp.bfloat16), gpu_fetch.fp8_ptx(width - 64, per_block)
    operands = [0, None, Machine.thread, *(None,) * len(contents), first, end]
    machine = Machine([blocks, *contents], 128 * width, operands).run(text)
    entry = np.minimum(np.arange(first, first + 64), end)
    wanted = np.asarray(rows)[blocks[entry // per_block] + entry % per_block]
    wanted = np.where((entry < end)[:, None], wanted, np.zeros((), ml_dtypes.bfloat16))
    assert (machine.written == 1).all()
    np.testing.assert_array_equal(unswizzled(machine.shared, width), wanted)


@given(parts=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_parts_are_whole_tiles_that_follow_one_another(parts, seed):
    bounds = np.sort(np.random.default_rng(seed).integers(0, 1000, (1, 5, 2)), -1)
    run = gpu_range._runs(jnp.asarray(bounds, jnp.int32), parts, jnp.zeros(1, jnp.int32), 1000)
    for (lo, hi), first, end in zip(
        bounds[0], run.first.reshape(5, parts).tolist(), run.end.reshape(5, parts).tolist(), strict=True
    ):
        seen = [i for a, b in zip(first, end, strict=True) for i in range(a, b)]
        assert seen == list(range(lo, hi))
        assert all((b - a) % 64 == 0 for a, b in zip(first, end, strict=True) if a < b < hi)


@given(entries=st.integers(1, 300), length=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_every_query_that_sees_a_tile_is_visited(entries, length, seed):
    bounds = random_bounds(np.random.default_rng(seed), 2, length, entries)
    first, visits = (np.asarray(x) for x in gpu_range.queries_seeing(bounds, entries))
    assert first.shape == (2, -(-entries // 64))
    for b, tile, t in np.ndindex(*first.shape, length):
        lo, hi = np.asarray(bounds[b, t])
        sees = max(lo, 64 * tile) < min(hi, 64 * tile + 64)
        assert not sees or first[b, tile] <= t < first[b, tile] + visits[b, tile]
    assert (first + visits <= length).all() and (visits >= 0).all()


def test_windows_and_ranges_take_the_kernels_on_hopper(monkeypatch):
    q, kv, hi = jnp.zeros((1, 8, 64, 128), jnp.bfloat16), jnp.zeros((1, 8, 128), jnp.bfloat16), jnp.ones((1, 8), int)
    pool = ByPart(Plain(128, "bfloat16"), 8)
    pages = Pages(pool.zeros(1, 4), jnp.int32(0), jnp.zeros((1, 1), int), pool)

    def kernels(branch, *given):
        with platforms.compiling_for("cuda"):
            text = str(jax.make_jaxpr(branch)(*given))
        return [name for name in ("", "_d_queries", "_d_entries") if f"range_attention{name}\n" in text]

    window = lambda q, kv: attend_window(q, kv, None, 4, SCALE)[0].astype(jnp.float32).sum()  # noqa: E731
    dense = lambda q, kv: attend_range(q, kv, 0 * hi, hi, SCALE)[0].astype(jnp.float32).sum()  # noqa: E731
    cached = lambda q, pages: attend_range(q, pages, 0 * hi, hi, SCALE)  # noqa: E731
    assert not kernels(window, q, kv) and not kernels(cached, q, pages)  # here is no GPU
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    assert kernels(cached, q, pages) == [""]
    for branch in (window, dense):
        assert kernels(branch, q, kv) == [""]
        assert kernels(jax.grad(branch, (0, 1)), q, kv) == ["", "_d_queries", "_d_entries"]
    with platforms.partitioned_by_the_compiler():
        assert not kernels(window, q, kv) and not kernels(dense, q, kv)
    assert not kernels(window, q.astype(jnp.float32), kv.astype(jnp.float32))


@pytest.mark.aot
@pytest.mark.parametrize("chip", [pytest.param("h100", marks=pytest.mark.slow), "h200"])
@pytest.mark.parametrize(("length", "heads"), [(256, 128), (1, 64)], ids=["prefill", "decode"])
@pytest.mark.parametrize("band", [window_band(128), DENSE], ids=["window", "dense"])
def test_the_kernels_compile_for_hopper(chip, length, heads, band, monkeypatch, capfd):
    """Little is spilled, and beside its results a program holds the parts of outputs or gradients, and little more."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")  # says what is spilled, of kernels not compiled before
    lse = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    *given, lse = arrays(chip, bf16(1, length, heads, 512), bf16(1, 4096, 512), int32(1, length, 2), lse)
    program = compile_for(chip, lambda *x: gpu_range.forward(*x, SCALE, band), *given)
    assert program.as_text().count(CALL) == 1
    assert program.memory_analysis().temp_size_in_bytes < 16 << 20
    assert max(spilled(capfd.readouterr()), default=0) <= 64
    program = compile_for(chip, lambda *x: gpu_range.backward(*x, SCALE, band), *given, given[0], lse, given[0], lse)
    assert program.as_text().count(CALL) == 2
    assert program.memory_analysis().temp_size_in_bytes < 48 << 20
    assert max(spilled(capfd.readouterr()), default=0) <= 512


@pytest.mark.aot
@pytest.mark.parametrize("storage", [Plain(512, "bfloat16"), Fp8WithRope(512, 64)], ids=["bf16", "fp8"])
def test_entries_of_a_cache_are_read_where_they_lie(storage):
    """No copy of the pool: the program needs little memory beside its arguments, that of the parts of outputs."""
    pool = jax.eval_shape(lambda: storage.zeros((2, 4096, 32)))
    pages = Pages(pool, int32(), int32(8, 512), ByPart(storage, 32))
    q, pages, hi = arrays("h200", bf16(8, 1, 128, 512), pages, int32(8, 1))
    program = compile_for("h200", lambda *x: gpu_range.forward_pages(*x, SCALE), q, pages, hi)
    memory = program.memory_analysis()
    assert program.as_text().count(CALL) == 1
    assert 8 * memory.temp_size_in_bytes < memory.argument_size_in_bytes
