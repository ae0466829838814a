"""What the indexer's loss takes over chosen entries, on Hopper: interpreted against float64, compiled for both GPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from drawing import few
from hopper import CALL, arrays, bf16, close, compile_for, int32, spilled, unswizzled
from hypothesis import given
from hypothesis import strategies as st
from ptx import Machine

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import IndexOperands, gpu_loss
from dsv4_jax.kernels.sparse_attention import gpu_fetch

SCALE = 0.05
# Relative to the largest value. Products of BF16 numbers and their sums are float32. In gradients of queries and keys
# one factor is rounded to BF16: `hopper.TOLERANCE`.
IN_FLOAT32 = 2e-6
cases = dict(batch=st.integers(1, 2), length=st.integers(1, 3), entries=st.integers(1, 200), seed=st.integers(0, 99))


class Case(NamedTuple):
    operands: IndexOperands
    q: jax.Array
    entries: jax.Array
    lse: jax.Array
    choice: jax.Array
    d_scores: jax.Array


def drawn(seed, batch, length, entries, k, heads=64, width=128):
    """Distinct entries, unused places anywhere among them, and the first of several queries chooses nothing."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape, dtype=jnp.bfloat16: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    operands = IndexOperands(
        draw(batch, length, 64, 128), draw(batch, entries, 128), draw(batch, length, 64, dtype=jnp.float32)
    )
    choice = np.argsort(rng.random((batch, length, entries + k)), -1)[..., :k]
    unused = (choice >= entries) | (rng.random(choice.shape) < 0.1)
    unused[:, : length > 1] = True
    q, rows = draw(batch, length, heads, width), draw(batch, entries, width)
    lse, d_scores = draw(batch, length, heads, dtype=jnp.float32) + 3, draw(batch, length, k, dtype=jnp.float32)
    return Case(operands, q, rows, lse, jnp.asarray(np.where(unused, -1, choice), jnp.int32), d_scores)


def wide(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


def stated(case):
    """Mass, scores and the gradients of the scores in float64."""
    (queries, keys, weights), q, entries, lse, d_scores = *(wide(*case.operands),), *wide(*case[1:4], case.d_scores)
    at = np.arange(len(q))[:, None, None], np.maximum(case.choice, 0)
    seen = np.asarray(case.choice) >= 0
    mass = np.exp(SCALE * np.einsum("bshd,bskd->bshk", q, entries[at]) - lse[..., None]).sum(2)
    products = np.einsum("bshd,bskd->bshk", queries, keys[at])
    scores = np.einsum("bsh,bshk->bsk", weights, np.maximum(products, 0))
    d_scores = np.where(seen, d_scores, 0)[:, :, None]
    passed = np.where(products > 0, weights[..., None] * d_scores, 0)
    d_keys = np.zeros_like(keys)
    np.add.at(d_keys, at, np.einsum("bshk,bshd->bskd", passed, queries))
    d_queries = np.einsum("bshk,bskd->bshd", passed, keys[at])
    d_weights = (np.maximum(products, 0) * d_scores).sum(-1)
    return np.where(seen, mass, 0), np.where(seen, scores, 0), (d_queries, d_keys, d_weights)


def check_forward(case, interpreter):
    found = gpu_loss.forward(*case[:5], SCALE, interpreter)
    for name, a, b in zip(("mass", "scores"), found, stated(case)[:2], strict=True):
        close(name, a, b, IN_FLOAT32)
        assert not np.asarray(a)[case.choice < 0].any()


def check_backward(case, interpreter):
    found = gpu_loss.backward(case.operands, case.choice, case.d_scores, interpreter)
    d_queries, d_keys, d_weights = stated(case)[2]
    close("d_queries", found[0], d_queries)
    close("d_keys", found[1], d_keys)
    close("d_weights", found[2], d_weights, IN_FLOAT32)
    assert [x.dtype for x in found] == [x.dtype for x in case.operands]
    return found


def test_mass_and_scores_of_chosen_entries(interpreter):
    check_forward(drawn(0, 1, 2, 150, 100), interpreter)


def test_tiles_come_in_pieces_that_pass_through_the_slots_many_times(interpreter):
    """Ten tiles of 128 heads: twenty pieces of 256 columns through three slots."""
    check_forward(drawn(1, 2, 1, 900, 600, heads=128, width=512), interpreter)


def test_gradients_of_more_tiles_than_there_are_slots(interpreter):
    check_backward(drawn(3, 1, 1, 500, 450), interpreter)


def test_gradients_over_chunks_of_queries_are_equal_bits_for_equal_inputs(interpreter, monkeypatch):
    """Keys are chosen by queries of both chunks."""
    monkeypatch.setattr(gpu_loss, "BACKWARD_QUERIES", 1)
    case = drawn(2, 2, 2, 30, 40)
    case = case._replace(choice=drawn(2, 4, 1, 30, 40).choice.reshape(2, 2, 40))  # of every query
    for a, b in zip(*(check_backward(case, interpreter) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
@few(3)
@given(**cases, k=st.integers(1, 300), heads=st.sampled_from([64, 128, 192]), width=st.sampled_from([128, 256, 384]))
def test_mass_and_scores_of_any_shape(batch, length, entries, seed, k, heads, width, interpreter):
    check_forward(drawn(seed, batch, length, entries, k, heads, width), interpreter)


@pytest.mark.slow
@few(3)
@given(**cases, k=st.sampled_from([1, 64, 130, 500]))
def test_gradients_of_any_shape(batch, length, entries, seed, k, interpreter):
    """In chunks of two queries, of which the last one may not be full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_loss, "BACKWARD_QUERIES", 2)
        check_backward(drawn(seed, batch, length, entries, k), interpreter)


@pytest.mark.parametrize(("width", "later"), [(128, 6), (256, 1)])
def test_each_thread_copies_its_bytes_of_a_whole_tile(width, later):
    rng = np.random.default_rng(width)
    rows = rng.normal(size=(50, width)).astype(ml_dtypes.bfloat16)
    index = rng.integers(-10, 50, 64).astype(np.int32)
    text = gpu_fetch.plain_ptx(width, sides=1, later=later)
    machine = Machine([index, rows], 128 * width, [0, None, Machine.thread, None]).run(text)
    assert (machine.written == 1).all()
    wanted = np.where(index[:, None] < 0, 0, rows[index])
    np.testing.assert_array_equal(unswizzled(machine.shared, width, sides=1), wanted)
    assert f"cp.async.commit_group;\ncp.async.wait_group {later};" in text


def test_only_what_the_kernels_can_multiply_and_only_on_hopper(monkeypatch):
    operands = IndexOperands(bf16(1, 8, 64, 128), bf16(1, 99, 128), jax.ShapeDtypeStruct((1, 8, 64), jnp.float32))
    q, entries = bf16(1, 8, 128, 512), bf16(1, 99, 512)
    assert not gpu_loss.supports(operands, q, entries)  # here is no GPU
    with platforms.compiling_for("cuda"):
        assert not gpu_loss.supports(operands, q, entries)  # of which kind is not said
    monkeypatch.setattr(gpu_loss, "is_hopper", lambda: True)
    assert gpu_loss.supports(operands, q, entries)
    assert gpu_loss.supports(operands, bf16(1, 8, 64, 384), bf16(1, 99, 384))
    assert not gpu_loss.supports(operands, bf16(1, 8, 16, 512), entries)
    assert not gpu_loss.supports(operands, bf16(1, 8, 64, 576), bf16(1, 99, 576))
    assert not gpu_loss.supports(operands, q, jax.ShapeDtypeStruct(entries.shape, jnp.float32))
    assert not gpu_loss.supports(operands._replace(queries=bf16(1, 8, 32, 128)), q, entries)
    narrow = operands._replace(queries=bf16(1, 8, 64, 64), keys=bf16(1, 99, 64))
    assert not gpu_loss.supports(narrow, q, entries)


@pytest.mark.aot
@pytest.mark.parametrize("chip", [pytest.param("h100", marks=pytest.mark.slow), "h200"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (128, 1024)], ids=["v4-flash", "v4-pro"])
def test_the_kernels_compile_for_hopper(chip, heads, k, monkeypatch, capfd):
    """Nothing is spilled. There are an index of pieces beside results, or rows of gradients and their sums."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")  # says what is spilled, of kernels not compiled before
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    operands = IndexOperands(bf16(1, 4096, 64, 128), bf16(1, 16_384, 128), float32(1, 4096, 64))
    given = bf16(1, 4096, heads, 512), bf16(1, 16_384, 512), float32(1, 4096, heads), int32(1, 4096, k)
    operands, *given, d_scores = arrays(chip, operands, *given, float32(1, 4096, k))
    programs = [
        (compile_for(chip, lambda *x: gpu_loss.forward(*x, SCALE), operands, *given), 3 * 4 * 4096 * k),
        (compile_for(chip, gpu_loss.backward, operands, given[-1], d_scores), 2.5 * 4 * 128 * 256 * k),
    ]
    for program, memory in programs:
        assert program.as_text().count(CALL) == 2
        assert program.memory_analysis().temp_size_in_bytes < memory
    printed = capfd.readouterr()
    assert max(spilled(printed), default=0) == 0
    assert "serialized" not in printed.out + printed.err  # ptxas about products that cannot overlap
