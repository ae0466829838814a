"""The indexer's FP4 products for Blackwell: interpreted against a sort, bytes by thread, compiled for a B200.

Scores of drawn operands are small multiples of a power of two, exact in any order of sums: the choice must be a sort's.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import arrays, bf16, int32, sorted_choice, spilled
from ptx import Machine
from test_gpu_blackwell import compiled
from test_indexer_gpu_paged import STORAGE, drawn

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import Search, gpu, gpu_blackwell, gpu_blackwell_keys, gpu_paged, index_topk
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart, InWords
from dsv4_jax.quantization.storage import Plain
from tests.sharding.devices import on_devices

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NUMBERS = np.concatenate([NUMBERS, -NUMBERS])  # of the codes
THREADS = 8  # of JAX: each warpgroup that waits keeps one


def case(seed, seen, columns, k, length=1, **options):
    """Operands as `drawn`, with queries of any FP4 numbers, where each query sees less than the one after it."""
    operands, hi = drawn(seed, seen, columns, length, **options)
    rng = np.random.default_rng(seed)
    packed, scales = rng.integers(0, 256, (*operands.queries.shape[:-1], 64)), rng.integers(125, 128, 4)
    queries = numbers_of(packed, np.broadcast_to(scales, (*packed.shape[:-1], 4)))
    return operands._replace(queries=jnp.asarray(queries, jnp.bfloat16)), hi, k


def numbers_of(packed, scales):
    """Bytes [.., 64] and their scales [.., 4] as float64 [.., 128]."""
    numbers = NUMBERS[np.stack([packed & 15, packed >> 4], -1)].reshape(*packed.shape[:-1], 128)
    factors = np.where(scales == 255, np.nan, np.exp2(scales - 127.0))
    return numbers * np.repeat(factors, 32, -1)


def sorted_best(operands, hi, k, rounded=False):
    pages = operands.pages
    blocks = int(pages.layer), np.asarray(pages.tables)
    stored = (np.asarray(pages.store[name])[blocks] for name in ("packed", "scales"))
    keys = numbers_of(*(x.reshape(len(x), -1, x.shape[-1]) for x in stored))
    queries, weights = (np.asarray(x, np.float64) for x in (operands.queries, operands.weights))
    products = np.maximum(np.einsum("bthd,bid->bthi", queries, keys), 0)
    scores = np.einsum("bth,bthi->bti", weights, products)
    scores = np.asarray(jnp.asarray(scores, jnp.bfloat16), np.float64) if rounded else scores
    return sorted_choice(scores, np.zeros_like(hi), np.asarray(hi), k)


def choices(parameters, patches, search, cases):
    """Of each case, by so many programs, and so many scores of a chunk."""
    from dsv4_jax.kernels.indexer_topk import gpu_blackwell_scores

    gpu_blackwell_scores.PROGRAMS, gpu_paged.SCORES = patches
    return [np.asarray(gpu_blackwell.index_topk(*x, hi, k, search, parameters)) for x, hi, k in map(made, cases)]


def made(given):
    args, options = given
    return case(*args, **options)


def check(parameters, *cases, programs=3, scores=gpu.SCORES, search=gpu_blackwell.EXACT):
    found = on_devices(THREADS, choices, parameters, (programs, scores), search, cases)
    for given, choice in zip(cases, found, strict=True):
        np.testing.assert_array_equal(choice, sorted_best(*made(given), search.bf16), err_msg=str(given))


def test_sequences_of_any_length_with_blocks_in_any_order(tensor_memory):
    """One sees nothing, one less than is chosen, one ends inside a block, one fills its table; one to four queries."""
    seen, columns, k = [0, 7, 77, 160, 140], 5, 20
    lengths = [((length, seen, columns, k, length), {}) for length in (1, 2, 3, 4)]
    check(tensor_memory, *lengths)


def test_more_tiles_than_slots_and_many_equal_scores(tensor_memory):
    """Keys of zeros and halves, through one program and back to the first slots, by either weigher."""
    check(tensor_memory, ((1, [1800, 150], 57, 100), {"bits": 0x11}), programs=1)


def test_prompts_in_groups_of_four_queries(tensor_memory):
    check(tensor_memory, ((2, [300, 6], 10, 30, 9), {}))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 2, 5, 9])
def test_any_sequences(programs, tensor_memory):
    rng = np.random.default_rng(programs)

    def any_case(seed):
        per_block, heads, bits = (int(rng.choice(x)) for x in (gpu_paged.BLOCKS, [32, 64], [0, 17, 255]))
        seen, k, length = rng.integers(0, 513, rng.integers(1, 5)), rng.integers(1, 99), rng.integers(1, 7)
        given = seed, seen.tolist(), 512 // per_block, int(k), int(length)
        return given, {"heads": heads, "per_block": per_block, "bits": bits}

    check(tensor_memory, *map(any_case, range(6)), programs=programs)


@pytest.mark.slow
def test_chunks_make_no_difference_and_scores_are_rounded_as_elsewhere(tensor_memory):
    given = ((3, [650, 3, 500], 24, 40, 6), {})
    check(tensor_memory, given, scores=4 * 768)
    check(tensor_memory, given, search=Search(bf16=True))


@pytest.mark.parametrize("per_block", [*gpu_paged.BLOCKS, gpu_blackwell_keys.TILE])
def test_threads_copy_bytes_to_where_tensor_cores_read_them(per_block):
    """A tile's columns begin at 4; all from the last one on are that. Each byte is written once, and none is changed.

    The swizzle xors bits 4 and 5 of an address with bits 7 and 8. Scales of row r are word r / 32 of line r % 32.
    """
    rng, blocks = np.random.default_rng(0), 128 // per_block
    packed, scales = (rng.integers(0, 256, (12, per_block, size), np.uint8) for size in (64, 4))
    table = np.concatenate([[0, 0, 0, 0], rng.permutation(10), [99]]).astype(np.int32)
    last = 4 + max(blocks - 2, 0)
    read = 2 + table[np.minimum(4 + np.arange(blocks), last)]  # the layer's blocks begin at 2
    operands = [None, None, None, 0, 8192, Machine.thread, 2, 4, last]
    machine = Machine([packed, scales, table], 8192 + 512, operands).run(gpu_blackwell_keys.fetch_ptx(per_block))
    assert (machine.written == 1).all()
    address = np.arange(8192)
    numbers = machine.shared[address ^ (address >> 7 & 3) << 4].reshape(128, 64)
    np.testing.assert_array_equal(numbers, packed[read].reshape(128, 64))
    lines = machine.shared[8192:].reshape(32, 4, 4)
    np.testing.assert_array_equal(lines.transpose(1, 0, 2).reshape(128, 4), scales[read].reshape(128, 4))


def added(addends, bits):
    """As an adder that cuts all addends off behind so many bits, counted from the first of the largest."""
    unit = np.exp2(np.floor(np.log2(np.abs(addends).max())) + 1 - bits)
    return np.trunc(addends / unit).sum() * unit


def test_what_adders_need_for_exact_sums_of_fp4_products():
    """Two steps of 64 products, onto the sum so far: 24 bits do while scales of blocks' products are 2^9 apart; 14 not.

    The largest sum of a block is 32 * 6 * 6, 4,608 quarters.
    """
    rng = np.random.default_rng(0)
    scales = np.exp2(np.asarray([9, 9, 0, 9])).repeat(32)
    drawn = NUMBERS[rng.integers(0, 16, (2, 200, 128))].prod(0)
    largest = np.full((1, 128), 36.0)
    largest[:, 64] = 0.25  # the smallest product, onto the largest sum
    wrong = []
    for products in np.concatenate([drawn, largest, -largest]) * scales:
        exact = products.sum()
        assert np.float32(exact) == exact
        step = lambda bits: added(np.append(products[64:], added(products[:64], bits)), bits)  # noqa: B023, E731
        assert step(24) == exact
        wrong.append(step(14) != exact)
    assert sum(wrong) > 100


def test_decoding_takes_the_kernels_on_blackwell_for_what_they_can_read(monkeypatch):
    operands, hi = drawn(0, [100, 20], 5)

    def kernels(operands, hi=hi, k=4):
        with platforms.compiling_for("cuda"):
            text = str(jax.make_jaxpr(lambda *x: index_topk(*x, k))(operands, jnp.zeros_like(hi), hi))
        return [name for name in ("fp4_index_scores", "index_best") if name in text]

    def stored(pool):
        return operands._replace(pages=replace(operands.pages, store=pool.zeros(2, 11), pool=pool))

    assert not kernels(operands)  # here is no GPU
    monkeypatch.setattr(gpu_blackwell, "is_blackwell", lambda: True)
    assert kernels(operands) == ["fp4_index_scores", "index_best"]
    assert kernels(*drawn(0, [100], 5, length=7))
    with platforms.partitioned_by_the_compiler():
        assert not kernels(operands)
    assert not kernels(operands._replace(queries=operands.queries.astype(jnp.float32)))
    assert not kernels(*drawn(0, [100], 5, heads=16))
    assert not kernels(*drawn(0, [3000], 100), k=gpu.MOST_CHOSEN + 1)
    assert not kernels(stored(ByPart(Plain(gpu_paged.WIDTH, "bfloat16"), 32)))
    assert not kernels(stored(InWords(STORAGE, 32)))
    assert not kernels(stored(ByPart(STORAGE, 8)))


def cached(batch, length, columns, k, per_block):
    pool = ByPart(STORAGE, per_block)
    pages = Pages(jax.eval_shape(lambda: pool.zeros(21, batch * columns)), int32(), int32(batch, columns), pool)
    weights = jax.ShapeDtypeStruct((batch, length, 64), jnp.float32)
    given = bf16(batch, length, 64, 128), pages, weights, int32(batch, length)
    return lambda *x: gpu_blackwell.index_topk(*x, k), arrays("b200", *given)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("batch", "length", "columns", "k", "per_block", "kernels"),
    [(1, 1, 8192, 512, 32, 3), (8, 4, 8192, 1024, 32, 3), (8, 2, 1024, 1024, 16, 2), (2, 512, 256, 1024, 64, 2)],
    ids=["decode", "four", "two", "prompt"],
)
def test_the_kernels_compile_for_blackwell(batch, length, columns, k, per_block, kernels):
    """Nothing is spilled, no pool is copied; products are of FP4 with a scale for each 32 numbers."""
    given = cached, batch, length, columns, k, per_block
    count, temporary, _, printed = on_devices(1, compiled, *given)
    assert count == kernels and "'fp4_index_scores_mosaic_gpu_kernel' for 'sm_100a'" in printed
    assert max(spilled(printed), default=0) == 0
    scores = min(4 * batch * length * per_block * columns, 4 * gpu.SCORES)
    assert temporary < 1.5 * scores + (8 << 20)
    products = re.findall(r"tcgen05\.mma\.cta_group::1\.kind::(\S+)", printed)
    parts = 2 if length > 2 else 1
    assert len(products) == 2 * parts and set(products) <= {f"mxf4{x}.block_scale.scale_vec::2X" for x in ("", "nvf4")}
    columns = 64 * min(length, 2)
    for half in (0, 1):  # of the 128 numbers; 32 bytes, and the second two of four scales
        kind = half << 30 | 1 << 27 | 1 << 23 | columns >> 3 << 17 | 1 << 10 | 1 << 7 | half << 5
        assert str(kind) in printed
    eight_rows = 512 // 16  # addresses are in units of 16 bytes
    swizzled = 4 << 61 - 32 | eight_rows
    assert set(re.findall(r"mov.b64 [ab]_desc, {[ab]_desc_low, (\d+)}", printed)) == {str(swizzled)}
    assert re.findall(r"add.s32 a_desc_low, \S+, (\d+)", printed) == ["0", "2"] * parts
