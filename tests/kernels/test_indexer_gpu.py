"""The indexer's kernels for Hopper: interpreted against a full sort, PTX thread by thread, compiled for both GPUs.

Scores of drawn operands are small integers, exact in any order of sums: the choice must be that of a sort.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import few
from hopper import CALL, arrays, bf16, compile_for, int32, sorted_choice, spilled
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import Machine

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import (
    IndexOperands,
    Search,
    gpu,
    gpu_best,
    gpu_best_ptx,
    gpu_scores,
    index_topk,
    xla,
)


def drawn(rng, batch, length, entries, heads=64, width=64, levels=2):
    """Operands with many equal scores, and bounds of any length, among them empty ones."""
    draw = lambda *shape, dtype=jnp.bfloat16: jnp.asarray(rng.integers(-levels, levels + 1, shape), dtype)  # noqa: E731
    queries, keys = draw(batch, length, heads, width), draw(batch, entries, width)
    lo, hi = np.sort(rng.integers(0, entries + 1, (2, batch, length)), axis=0)
    lo[:, -1] = hi[:, -1]
    operands = IndexOperands(queries, keys, draw(batch, length, heads, dtype=jnp.float32))
    return operands, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


def scores_of(operands):
    queries, keys, weights = (np.asarray(x, np.float64) for x in operands)
    return np.einsum("bth,bthi->bti", weights, np.maximum(np.einsum("bthd,bid->bthi", queries, keys), 0))


def check(operands, lo, hi, k, interpreter):
    found = gpu.index_topk(operands, lo, hi, k, interpret=interpreter)
    np.testing.assert_array_equal(found, sorted_choice(scores_of(operands), lo, hi, k))


def test_the_best_entries_are_chosen_and_of_equals_the_first(interpreter):
    check(*drawn(np.random.default_rng(0), 1, 5, 200), 30, interpreter)


@pytest.mark.slow
@few(3)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 9), entries=st.integers(1, 700), heads=st.sampled_from([32, 64]),
    width=st.sampled_from([64, 128]), k=st.integers(1, 300), levels=st.sampled_from([0, 1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_rows_of_queries_and_entries(batch, length, entries, heads, width, k, levels, seed, interpreter):
    case = drawn(np.random.default_rng(seed), batch, length, entries, heads, width, levels)
    check(*case, k, interpreter)


@pytest.mark.slow
def test_chunks_parts_and_groups_of_entries_make_no_difference(interpreter, monkeypatch):
    """Two chunks of two groups of queries, entries in two parts, chosen through groups of 16 and again of 16."""
    for name, number in {"SCORES": 8 * 1024, "PART": 4, "MOST": 256}.items():
        monkeypatch.setattr(gpu, name, number)
    check(*drawn(np.random.default_rng(1), 1, 13, 1000), 16, interpreter)
    check(*drawn(np.random.default_rng(2), 1, 4, 5000), 16, interpreter)


def test_scores_are_those_of_the_heads_added_up(interpreter):
    """Normal operands; float32 sums of 64 heads in another order: 1e-6 of the largest."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    operands = IndexOperands(draw(2, 4, 64, 128), draw(2, 256, 128), draw(2, 4, 64).astype(jnp.float32))
    first = jnp.asarray([[[0], [1]], [[1], [2]]], jnp.int32)  # two parts; the second row needs only the second tile
    found = np.asarray(gpu_scores.scores(operands, first, jnp.minimum(first + 1, 2), interpreter), np.float64)
    wanted = scores_of(operands)
    for row, seen in ((0, slice(0, 256)), (1, slice(128, 256))):
        np.testing.assert_allclose(found[row, :, seen], wanted[row, :, seen], rtol=0, atol=1e-6 * wanted.max())


def test_scores_are_rounded_to_bf16_as_elsewhere(interpreter):
    operands, lo, hi = drawn(np.random.default_rng(4), 1, 4, 256, levels=9)
    operands = operands._replace(weights=jnp.abs(operands.weights))  # scores lie near each other
    lo, hi, search = jnp.zeros_like(lo), jnp.full_like(hi, 256), Search(bf16=True)
    wanted = np.sort(xla.index_topk(operands, lo, hi, 60, search))
    np.testing.assert_array_equal(gpu.index_topk(operands, lo, hi, 60, search, interpreter), wanted)
    assert (wanted != np.sort(xla.index_topk(operands, lo, hi, 60))).any()


def numbers_of_every_size(rng, count):
    parts = [10.0 ** rng.uniform(-37, 37, count // 3), -(10.0 ** rng.uniform(-37, 37, count // 3))]
    rest = np.tile([0.0, -0.0, -np.inf, 1.0], count)[: count - 2 * (count // 3)]
    numbers = np.concatenate([*parts, rest]).astype(np.float32)
    rng.shuffle(numbers)
    return numbers


@pytest.mark.parametrize("k", [1, 90, 171, 250, 512])
def test_numbers_of_any_size_and_sign_are_in_order(k, interpreter):
    """171 positive ones and, with 1.0, equal ones at the border; both zeros are equal; -inf is never chosen."""
    rng = np.random.default_rng(5)
    numbers = np.stack([numbers_of_every_size(rng, 512), np.full(512, 2.0, np.float32), rng.normal(size=512)])
    numbers = numbers.astype(np.float32)
    lo, hi = np.asarray([0, 17, 100], np.int32), np.asarray([512, 500, 100], np.int32)
    found = gpu_best.best(jnp.asarray(numbers), jnp.asarray(lo), jnp.asarray(hi), k, interpreter)
    np.testing.assert_array_equal(found, sorted_choice(numbers, lo, hi, k))


@given(
    tops=st.integers(1, 40), count=st.integers(1, 300), k=st.integers(1, 40), seed=st.integers(0, 99),
    size=st.sampled_from([2, 16]),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_the_groups_with_the_best_numbers_hold_them_all(tops, count, k, seed, size):
    """Of equal groups the first are enough: what `gpu.places` rests on."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, tops, (1, count * size)).astype(float)
    bounds = np.zeros(1, int), np.full(1, count * size)
    groups = sorted_choice(numbers.reshape(1, count, size).max(-1), bounds[0], bounds[1] // size, k)[0]
    chosen = sorted_choice(numbers, *bounds, k)[0]
    assert set(chosen // size) <= set(groups.tolist())


@pytest.mark.parametrize("levels", [0, 1, 4, 10**6, 0x7F800000 - 1])
@pytest.mark.parametrize("seen", [0.01, 0.5, 1])
@pytest.mark.parametrize(("count", "k"), [(256, 90), (512, 512), (4352, 500), (16_384, 1024)])
def test_each_thread_writes_the_places_of_the_chosen(levels, seen, count, k):
    """Every place once, in rising order; of the numbers that equal the least only as many as there is room for."""
    rng = np.random.default_rng(7)
    numbers = rng.integers(-levels, levels + 1, count).astype(np.int32)
    numbers[rng.random(count) >= seen] = gpu_best_ptx.UNSEEN
    tallied, chosen = 4 * count, 4 * (count + gpu_best_ptx.TALLY)
    tally, places = np.zeros(4 * gpu_best_ptx.TALLY, np.uint8), np.full(4 * k, 255, np.uint8)
    shared = np.concatenate([numbers.view(np.uint8), tally, places])
    machine = Machine([], shared, [Machine.thread, 0, tallied, chosen])
    machine.run(gpu_best_ptx.choose_ptx(count, k))
    taken = np.sort(np.argsort(-numbers.astype(float), kind="stable")[: min(k, (numbers > gpu_best_ptx.UNSEEN).sum())])
    np.testing.assert_array_equal(shared[chosen:].view(np.int32)[: len(taken)], taken)
    assert (shared[chosen + 4 * len(taken) :] == 255).all()
    assert (machine.written[chosen : chosen + 4 * len(taken)] == 1).all()
    assert machine.bank_conflicts <= 4 * 32  # no number's: counts of a digit are read in twice the time


@given(length=st.integers(1, 9), parts=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_parts_cover_the_tiles_that_queries_see(length, parts, seed):
    bounds = np.sort(np.random.default_rng(seed).integers(0, 20 * gpu.TILE, (2, 1, length, 4)), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PROGRAMS", parts * length)
        patch.setattr(gpu, "PART", 1)
        whole = gpu.tiles_seen(*jnp.asarray(bounds, jnp.int32))
        first, end = (np.asarray(x) for x in gpu.parts_of(*whole, 20 * gpu.TILE))
    for t in range(length):
        tiles = [i for a, b in zip(first[:, 0, t], end[:, 0, t], strict=True) for i in range(a, b)]
        seen = {i // gpu.TILE for lo, hi in bounds[:, 0, t].T for i in range(lo, hi)}
        assert tiles == (list(range(min(seen), max(seen) + 1)) if seen else [])


def test_the_indexer_takes_the_kernels_on_hopper_and_no_gradient_passes_them(monkeypatch):
    operands, lo, hi = drawn(np.random.default_rng(0), 1, 8, 256)

    def kernels(operands, k=4):
        use = lambda operands: (index_topk(operands, lo, hi, k)[..., :4] * operands.weights[..., :4]).sum()  # noqa: E731
        with platforms.compiling_for("cuda"):
            text = str(jax.make_jaxpr(jax.grad(use))(operands))
        return [name for name in ("index_scores", "index_best") if name in text]

    assert not kernels(operands)  # here is no GPU
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    assert kernels(operands) == ["index_scores", "index_best"]
    with platforms.partitioned_by_the_compiler():
        assert not kernels(operands)
    assert not kernels(operands, k=gpu.MOST_CHOSEN + 1)
    wide = IndexOperands(*(x.astype(jnp.float32) for x in operands))
    assert not kernels(wide)
    assert not kernels(drawn(np.random.default_rng(0), 1, 8, 256, heads=12)[0])
    assert not kernels(drawn(np.random.default_rng(0), 1, 8, 256, width=32)[0])


@pytest.mark.aot
@pytest.mark.parametrize("chip", [pytest.param("h100", marks=pytest.mark.slow), "h200"])
@pytest.mark.parametrize(("entries", "k", "kernels"), [(16_384, 512, 2), (16_384, 300, 2), (262_144, 1024, 3)])
def test_the_kernels_compile_for_hopper(chip, entries, k, kernels, monkeypatch, capfd):
    """Nothing is spilled. Of 1,024 queries' scores, 64 MiB or 1 GiB, a chunk's are there, and little more."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")  # says what is spilled, of kernels not compiled before
    weights = jax.ShapeDtypeStruct((1, 1024, 64), jnp.float32)
    given = IndexOperands(bf16(1, 1024, 64, 128), bf16(1, entries, 128), weights), int32(1, 1024), int32(1, 1024)
    program = compile_for(chip, lambda *x: gpu.index_topk(*x, k), *arrays(chip, *given))
    assert program.as_text().count(CALL) == kernels
    assert program.memory_analysis().temp_size_in_bytes < 96 << 20
    assert max(spilled(capfd.readouterr()), default=0) == 0
