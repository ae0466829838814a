"""The indexer's TPU kernel: interpreted on a CPU against a full sort, and compiled for TPUs that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import IndexOperands, PagedOperands, Search, index_topk, tpu, tpu_few, xla
from dsv4_jax.kernels.indexer_topk.operands import EXACT
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import InWords
from dsv4_jax.quantization.storage import Fp4
from sharding.targets import parse_target


def drawn(rng, batch, length, entries, heads, width, levels, dtype=jnp.float32):
    """Operands whose scores are exact in any order of sums: small integers, or +-1 and halves; and bounds."""
    draw = lambda *shape: rng.integers(-levels, levels + 1, shape)  # noqa: E731
    queries, keys, weights = draw(batch, length, heads, width), draw(batch, entries, width), draw(batch, length, heads)
    lo, hi = np.sort(rng.integers(0, entries + 1, (2, batch, length)), axis=0)
    made = IndexOperands(jnp.asarray(queries, dtype), jnp.asarray(keys, dtype), jnp.asarray(weights, jnp.float32))
    return made, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


def sorted_choice(operands, lo, hi, k):
    """The chosen entries by position, then -1: a stable sort of float64 scores."""
    queries, keys, weights = (np.asarray(x, np.float64) for x in operands)
    scores = np.einsum("bth,bthi->bti", weights, np.maximum(np.einsum("bthd,bid->bthi", queries, keys), 0))
    choice = np.full((*lo.shape, min(k, keys.shape[1])), -1)
    for b, t in np.ndindex(lo.shape):
        visible = np.arange(lo[b, t], hi[b, t])
        best = np.sort(visible[np.argsort(-scores[b, t, visible], kind="stable")][:k])
        choice[b, t, : len(best)] = best
    return choice


def chosen(operands, lo, hi, k, interpret=True, search=EXACT):
    run = jax.jit(lambda operands, lo, hi: tpu.index_topk(operands, lo, hi, k, search, interpret))
    return np.asarray(run(operands, lo, hi))


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 11), entries=st.integers(1, 3000), heads=st.integers(1, 20),
    width=st.sampled_from([3, 128]), k=st.integers(1, 300), levels=st.sampled_from([0, 1, 9]),
    dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_entries_are_chosen_and_of_equals_the_first(
    batch, length, entries, heads, width, k, levels, dtype, seed
):
    case = drawn(np.random.default_rng(seed), batch, length, entries, heads, width, levels, dtype)
    np.testing.assert_array_equal(chosen(*case, k), sorted_choice(*case, k))


def test_groups_of_entries_follow_one_another():
    operands, lo, hi = drawn(np.random.default_rng(0), 1, 3, 2 * tpu.GROUP + 700, 1, 4, 2)
    lo, hi = jnp.asarray([[0, 5, tpu.GROUP + 3]]), jnp.asarray([[2 * tpu.GROUP + 700, 2 * tpu.GROUP, 2 * tpu.GROUP]])
    np.testing.assert_array_equal(chosen(operands, lo, hi, 300), sorted_choice(operands, lo, hi, 300))


def test_scores_of_any_size_and_sign_are_in_order():
    rng = np.random.default_rng(1)
    keys = np.concatenate([10.0 ** rng.uniform(-37, 37, 200), -(10.0 ** rng.uniform(-37, 37, 200)), [0.0, -0.0, 0.0]])
    rng.shuffle(keys)
    queries = jnp.asarray([[[[1.0], [-1.0]]]])  # relu(x) - relu(-x) is x
    operands = IndexOperands(queries, jnp.asarray(keys[None, :, None], jnp.float32), jnp.asarray([[[1.0, -1.0]]]))
    bounds = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), len(keys), jnp.int32)
    for k in (150, 201):  # 201: all positive ones and the first of the zeros
        np.testing.assert_array_equal(chosen(operands, *bounds, k), sorted_choice(operands, *bounds, k))


def test_scores_are_rounded_to_bf16_as_elsewhere():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.integers(-80, 81, shape), jnp.float32)  # noqa: E731
    operands = IndexOperands(draw(1, 8, 3, 8), draw(1, 1000, 8), draw(1, 8, 3))
    bounds, search = (jnp.zeros((1, 8), jnp.int32), jnp.full((1, 8), 1000, jnp.int32)), Search(bf16=True)
    wanted = np.sort(xla.index_topk(operands, *bounds, 200, search))
    np.testing.assert_array_equal(chosen(operands, *bounds, 200, search=search), wanted)
    assert (wanted != np.sort(xla.index_topk(operands, *bounds, 200))).any()


def test_nothing_is_read_before_it_is_there():
    operands, lo, hi = drawn(np.random.default_rng(2), 1, 2, 1100, 1, 3, 2)
    lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, 1100)
    found = chosen(operands, lo, hi, 5, pltpu.InterpretParams(detect_races=True))
    np.testing.assert_array_equal(found, sorted_choice(operands, lo, hi, 5))


def by_position(choice):
    last = np.iinfo(np.int32).max
    ordered = np.sort(np.where(choice < 0, last, choice), -1)
    return np.where(ordered == last, -1, ordered)


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 3), entries=st.integers(1, 4000), heads=st.integers(1, 20),
    width=st.sampled_from([3, 128]), k=st.integers(1, 300), levels=st.sampled_from([0, 1, 9]),
    dtype=st.sampled_from(["float32", "bfloat16"]), races=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_few_queries_choose_the_same(batch, length, entries, heads, width, k, levels, dtype, races, seed):
    """Entries that are chosen come by place; their set is a sort's."""
    case = drawn(np.random.default_rng(seed), batch, length, entries, heads, width, levels, dtype)
    interpret = pltpu.InterpretParams(detect_races=True) if races else True
    run = jax.jit(lambda operands, lo, hi: tpu_few.index_topk(operands, lo, hi, k, EXACT, interpret))
    np.testing.assert_array_equal(by_position(np.asarray(run(*case))), sorted_choice(*case, k))


def test_few_queries_choose_across_groups_and_of_scores_rounded_to_bf16():
    operands, _, hi = drawn(np.random.default_rng(0), 1, 2, tpu_few.GROUP + 700, 1, 4, 2)
    lo, hi = jnp.asarray([[5, tpu_few.GROUP - 3]]), jnp.full_like(hi, tpu_few.GROUP + 700)
    run = jax.jit(lambda *case: tpu_few.index_topk(*case, 300, interpret=True))
    np.testing.assert_array_equal(by_position(np.asarray(run(operands, lo, hi))), sorted_choice(operands, lo, hi, 300))
    draw = lambda *shape: jnp.asarray(np.random.default_rng(3).integers(-80, 81, shape), jnp.float32)  # noqa: E731
    operands, search = IndexOperands(draw(1, 1, 3, 8), draw(1, 1000, 8), draw(1, 1, 3)), Search(bf16=True)
    bounds = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 1000, jnp.int32)
    found = tpu_few.index_topk(operands, *bounds, 200, search, True)
    np.testing.assert_array_equal(
        by_position(np.asarray(found)), np.sort(xla.index_topk(operands, *bounds, 200, search))
    )


def abstract(entries, length=64, sharding=None, dtype=jnp.bfloat16):
    """Operands and bounds of V4's indexer."""
    make = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    bound = make(1, length, dtype=jnp.int32)
    queries, keys = make(1, length, 64, 128, dtype=dtype), make(1, entries, 128, dtype=dtype)
    return IndexOperands(queries, keys, make(1, length, 64, dtype=jnp.float32)), bound, bound


def test_a_program_for_tpus_holds_the_kernel_and_no_gradient_passes_it(monkeypatch):
    def lowered(platform, dtype):
        use = lambda operands, lo, hi: (index_topk(operands, lo, hi, 4) * operands.weights[..., :4]).sum()  # noqa: E731
        with platforms.compiling_for(platform):
            traced = jax.jit(jax.grad(use)).trace(*abstract(256, 8, dtype=dtype))
            return traced.lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu", jnp.bfloat16).count("tpu_custom_call") == 1
    assert "tpu_custom_call" not in lowered("cpu", jnp.bfloat16)
    assert "tpu_custom_call" not in lowered("tpu", jnp.float16)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("entries", "k"), [(16_384, 512), (262_144, 1024)])
def test_the_kernel_compiles_for_every_tpu_and_the_scores_never_leave_the_chip(target, entries, k):
    machine = jax.sharding.SingleDeviceSharding(parse_target(target).devices()[0])
    args = abstract(entries, 1024, machine)
    with platforms.compiling_for("tpu"):
        compiled = jax.jit(lambda operands, lo, hi: index_topk(operands, lo, hi, k)).lower(*args).compile()
    assert "index_topk" in compiled.as_text()
    # Scores of 1,024 queries would be 64 MiB for 16,384 entries and 1 GiB for 262,144.
    assert compiled.memory_analysis().temp_size_in_bytes < 16 << 20


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_decoding_searches_packed_keys_with_the_kernel(target):
    """Of two sequences with a million tokens: their keys, 64 MiB each, are laid out (on v5p a part in VMEM)."""
    here, sequences, entries = jax.sharding.SingleDeviceSharding(parse_target(target).devices()[0]), 2, 1 << 18
    pool = InWords(Fp4(128), 32)
    tables = jnp.zeros((sequences, entries // 32), jnp.int32)
    pages = jax.eval_shape(lambda: Pages(pool.zeros(2, tables.size), jnp.int32(0), tables, pool))
    queries = jax.ShapeDtypeStruct((sequences, 1, 64, 128), jnp.bfloat16)
    operands = PagedOperands(queries, pages, jax.ShapeDtypeStruct((sequences, 1, 64), jnp.float32))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), operands)
    hi = jax.ShapeDtypeStruct((sequences, 1), jnp.int32, sharding=here)
    with platforms.compiling_for("tpu"):
        compiled = jax.jit(lambda operands, hi: index_topk(operands, hi, hi, 512)).lower(args, hi).compile()
    assert "index_topk_few" in compiled.as_text()
    needed = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{target}: {needed:.0f} MiB")
    assert needed < 224
