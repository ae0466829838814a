"""The indexer over a cache's packed keys on Hopper: interpreted against a sort, PTX by thread, compiled for both GPUs.

Scores of drawn operands are small multiples of a quarter, exact in any order of sums: the choice must be a sort's.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from drawing import few
from hopper import CALL, arrays, bf16, compile_for, int32, sorted_choice, spilled
from hypothesis import given
from hypothesis import strategies as st
from ptx import Machine

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import (
    PagedOperands,
    Search,
    gpu,
    gpu_keys,
    gpu_paged,
    gpu_paged_scores,
    index_topk,
    paged,
)
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart, InWords
from dsv4_jax.quantization.storage import Fp4, Plain

STORAGE = Fp4(gpu_paged.WIDTH)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(gpu_paged_scores, "PROGRAMS", 3)


def drawn(seed, seen, columns, length=1, heads=64, per_block=32, bits=255):
    """Operands whose sequence b sees `seen[b]` keys, or a few less; blocks are in any order, and sequences share some.

    Of the keys' bytes only `bits` are drawn. What a table has behind the last block that is seen holds no numbers.
    """
    rng = np.random.default_rng(seed)
    blocks = 2 * columns + 1
    draw = lambda *shape, most=2: rng.integers(-most, most + 1, shape)  # noqa: E731
    packed = rng.integers(0, 256, (2, blocks, per_block, gpu_paged.WIDTH // 2)) & bits
    scales = rng.integers(126, 129, (2, blocks, per_block, 4))
    scales[:, -1] = 255
    tables = np.stack([rng.permutation(blocks - 1)[:columns] for _ in seen])
    tables[np.arange(columns) >= -(-np.asarray(seen) // per_block)[:, None]] = blocks - 1
    store = {"packed": jnp.asarray(packed, jnp.uint8), "scales": jnp.asarray(scales, jnp.uint8)}
    pages = Pages(store, jnp.int32(1), jnp.asarray(tables, jnp.int32), ByPart(STORAGE, per_block))
    queries = jnp.asarray(draw(len(seen), length, heads, gpu_paged.WIDTH), jnp.bfloat16)
    weights = jnp.asarray(draw(len(seen), length, heads), jnp.float32)
    hi = np.maximum(np.asarray(seen)[:, None] - np.arange(length)[::-1], 0)
    return PagedOperands(queries, pages, weights), jnp.asarray(hi, jnp.int32)


def scores_of(operands):
    everything = jnp.arange(operands.pages.capacity)[None].repeat(len(operands.queries), 0)
    keys = operands.pages.read_entries(everything, jnp.float32)
    queries, keys, weights = (np.asarray(x, np.float64) for x in (operands.queries, keys, operands.weights))
    products = np.maximum(np.einsum("bthd,bid->bthi", queries, keys), 0)
    return np.einsum("bth,bthi->bti", weights, products)


def check(operands, hi, k, interpreter):
    found = gpu_paged.index_topk(*operands, hi, k, interpret=interpreter)
    np.testing.assert_array_equal(found, sorted_choice(scores_of(operands), np.zeros_like(hi), np.asarray(hi), k))
    np.testing.assert_array_equal(found, positions(paged.index_topk(*operands, hi, k)))


def positions(choice):
    """A choice by position, then -1."""
    last = np.iinfo(np.int32).max
    choice = np.sort(np.where(np.asarray(choice) < 0, last, choice))
    return np.where(choice == last, -1, choice)


def test_sequences_of_any_length_with_blocks_in_any_order(interpreter):
    """One sees nothing, one less than is chosen, one ends inside a block, one fills its table."""
    check(*drawn(0, [0, 7, 77, 160], 5), 20, interpreter)


def test_more_tiles_than_slots_and_many_equal_scores(interpreter):
    """Keys of zeros and halves, through one program and back to the first slots; the table is no whole tile."""
    check(*drawn(1, [800, 20], 25, bits=0x11), 100, interpreter)


@pytest.mark.slow
@few(4)
@given(
    seen=st.lists(st.integers(0, 256), min_size=1, max_size=4), length=st.integers(1, 4), k=st.integers(1, 99),
    heads=st.sampled_from([8, 64]), per_block=st.sampled_from(gpu_paged.BLOCKS), programs=st.integers(1, 9),
    bits=st.sampled_from([0, 0x11, 255]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sequences(seen, length, k, heads, per_block, programs, bits, seed, interpreter):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_paged_scores, "PROGRAMS", programs)
        check(*drawn(seed, seen, 256 // per_block, length, heads, per_block, bits), k, interpreter)


@pytest.mark.slow
def test_chunks_of_sequences_and_groups_of_keys_make_no_difference(interpreter, monkeypatch):
    monkeypatch.setattr(gpu_paged, "SCORES", 2 * 2 * 768)
    monkeypatch.setattr(gpu, "MOST", 256)
    check(*drawn(2, [650, 3, 500], 24, length=2), 16, interpreter)


@pytest.mark.slow
def test_scores_are_rounded_to_bf16_as_elsewhere(interpreter):
    operands, hi = drawn(3, [250, 100], 8)
    operands = operands._replace(weights=jnp.abs(operands.weights))  # scores lie near each other
    elsewhere = lambda search: positions(paged.index_topk(*operands, hi, 40, search))  # noqa: E731
    found = gpu_paged.index_topk(*operands, hi, 40, Search(bf16=True), interpreter)
    np.testing.assert_array_equal(found, elsewhere(Search(bf16=True)))
    assert (elsewhere(Search(bf16=True)) != elsewhere(Search())).any()


@pytest.mark.parametrize("per_block", gpu_paged.BLOCKS)
def test_threads_copy_the_blocks_that_a_table_names(per_block):
    """A tile's columns begin at 4; all from 5 on are column 5. Words of scales are written by each thread of a key."""
    rng, blocks = np.random.default_rng(0), 64 // per_block
    packed, scales = (rng.integers(0, 256, (7, per_block, size), np.uint8) for size in (64, 4))
    table = np.asarray([0, 0, 0, 0, 3, 1, 99, 99], np.int32)
    for wanted in (1, 0):
        numbers = 2, 4, 5, wanted  # the layer's blocks begin at 2
        machine = Machine([packed, scales, table], 64 * 68, [None, None, None, 0, 64 * 64, Machine.thread, *numbers])
        machine.run(gpu_keys.fetch_ptx(per_block))
        assert (machine.written[: 64 * 64] == wanted).all() and (machine.written[64 * 64 :] == 4 * wanted).all()
        read = 2 + table[np.minimum(4 + np.arange(blocks), 5)]
        copied = np.concatenate([packed[read].reshape(-1), scales[read].reshape(-1)])
        np.testing.assert_array_equal(machine.shared, copied * wanted)


def test_threads_undo_their_numbers_exactly():
    """As the left operand of a product: 16 rows a warp, 8 columns at a time, two neighbours a register."""
    layout = gpu_keys.NUMBERS.layout.to_mgpu()
    assert [size for size in layout.registers_shape((64, 128)) if size > 1] == [16, 2]  # eight, row + 8
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (64, 64), np.uint8)
    scales = rng.integers(3, 250, (64, 4), np.uint8)  # subnormal numbers would be zero on this CPU
    scales[::9, 1] = 255
    shared = np.concatenate([packed.reshape(-1), scales.reshape(-1)])
    count = gpu_keys.OPERANDS
    machine = Machine([], shared, [*[0] * count, 0, packed.size, Machine.thread]).run(gpu_keys.undo_ptx(0))
    assert machine.bank_conflicts == 0
    pairs = np.stack([machine.registers[f"${i}"] for i in range(count)], 1).astype(np.uint32)
    numbers = pairs.view(ml_dtypes.bfloat16).reshape(4, 8, 4, 16, 2, 2)  # warp, row, quad | eight, row + 8, pair
    operand = numbers.transpose(0, 4, 1, 3, 2, 5).reshape(64, 128)
    stored = {"packed": jnp.asarray(packed), "scales": jnp.asarray(scales)}
    wanted = gpu_keys.reordered(STORAGE.decode(stored, jnp.bfloat16))
    bits = lambda x: np.where(np.isnan(np.asarray(x)), 0x7FC0, np.asarray(x).view(np.uint16))  # noqa: E731
    np.testing.assert_array_equal(bits(operand), bits(wanted))


def test_decoding_takes_the_kernels_on_hopper_for_what_they_can_read(monkeypatch):
    operands, hi = drawn(0, [100, 20], 5)

    def kernels(operands, hi=hi, k=4):
        with platforms.compiling_for("cuda"):
            text = str(jax.make_jaxpr(lambda *x: index_topk(*x, k))(operands, jnp.zeros_like(hi), hi))
        return [name for name in ("paged_index_scores", "index_best") if name in text]

    def stored(pool):
        return operands._replace(pages=replace(operands.pages, store=pool.zeros(2, 11), pool=pool))

    assert not kernels(operands)  # here is no GPU
    monkeypatch.setattr(gpu_paged, "is_hopper", lambda: True)
    assert kernels(operands) == ["paged_index_scores", "index_best"]
    assert kernels(stored(ByPart(STORAGE, 64)))
    with platforms.partitioned_by_the_compiler():
        assert not kernels(operands)
    assert not kernels(operands._replace(queries=operands.queries.astype(jnp.float32)))
    assert not kernels(*drawn(0, [100], 5, length=gpu_paged.FEW + 1))
    assert not kernels(*drawn(0, [100], 5, heads=12))
    assert not kernels(stored(ByPart(Plain(gpu_paged.WIDTH, "bfloat16"), 32)))
    assert not kernels(stored(InWords(STORAGE, 32)))
    assert not kernels(stored(ByPart(STORAGE, 8)))


@pytest.mark.aot
@pytest.mark.parametrize("chip", [pytest.param("h100", marks=pytest.mark.slow), "h200"])
@pytest.mark.parametrize(("batch", "length", "columns", "k", "kernels"),
                         [(1, 1, 8192, 512, 3), (8, 4, 8192, 1024, 3), (8, 2, 512, 1024, 2)])  # fmt: skip
def test_the_kernels_compile_for_hopper(chip, batch, length, columns, k, kernels, monkeypatch, capfd):
    """Nothing is spilled. No pool is copied and no table looked up outside: temporary memory is little but scores."""
    monkeypatch.undo()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")  # says what is spilled, of kernels not compiled before
    pool = ByPart(STORAGE, 32)
    pages = Pages(jax.eval_shape(lambda: pool.zeros(21, batch * columns)), int32(), int32(batch, columns), pool)
    weights = jax.ShapeDtypeStruct((batch, length, 64), jnp.float32)
    given = bf16(batch, length, 64, 128), pages, weights, int32(batch, length)
    program = compile_for(chip, lambda *x: gpu_paged.index_topk(*x, k), *arrays(chip, *given))
    assert program.as_text().count(CALL) == kernels
    scores = 4 * batch * length * 32 * columns
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * scores + (1 << 20)
    assert max(spilled(capfd.readouterr()), default=0) == 0
