"""The kernel benchmark checks what it times: on small sizes every operation passes, and wrong results end it."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from support import TINY

from tests.benchmarks import kernels
from tests.benchmarks.kernel_operations import operations
from tests.benchmarks.kernels import WrongResult, measure, timed

CONTEXT, QUERIES, ROWS = 512, 4, 2
MADE = list(operations(TINY, CONTEXT, QUERIES, ROWS, "float32"))


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(kernels, "SECONDS", 0.0)


def test_every_operation_is_checked_against_float64():
    for operation in MADE:
        assert timed(operation, operation.run, "float32")[1] <= operation.tolerance["float32"]


@pytest.mark.parametrize("spoil", [jnp.zeros_like, lambda x: x * 1.01 + 1, lambda x: x * jnp.nan])
def test_a_wrong_result_ends_the_benchmark(spoil):
    attention = MADE[0]
    wrong = replace(attention, run=lambda *operands: tuple(spoil(x) for x in attention.run(*operands)))
    with pytest.raises(WrongResult, match="sparse, prefill"):
        measure(wrong, CONTEXT, "float32", baselines=False)


def test_a_wrong_choice_ends_the_benchmark():
    index = next(x for x in MADE if x.name.startswith("index scores and top-k, prefill"))
    first = jnp.broadcast_to(jnp.arange(TINY.index_topk), (1, QUERIES, TINY.index_topk))
    with pytest.raises(WrongResult, match="error"):
        measure(replace(index, run=lambda *_: first), CONTEXT, "float32", baselines=False)
