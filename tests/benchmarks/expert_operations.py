"""The experts' operations of `tests.benchmarks.kernels`: plain, packed, and with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels.grouped_matmul import grouped_matmul, make_groups, spread
from dsv4_jax.layers.experts import tile_rows
from dsv4_jax.quantization.packed import PackedFormat
from tests.benchmarks.operation import Draw, Operation, error, wide
from tests.kernels.packing import pack

EXPERTS = 8  # of one device in an expert-parallel group


def _expert_operands(config: DeepseekV4Config, tokens: int, draw: Draw) -> tuple[Any, ...]:
    """Tokens, weights, the experts of each token, and its rows."""
    inner, outer, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    ids = np.argsort(draw.rng.random((tokens, EXPERTS)), -1)[:, : min(k, EXPERTS)]
    groups = make_groups(jnp.asarray(ids, jnp.int32), EXPERTS, tile_rows(ids.size, EXPERTS))
    return draw(tokens, inner), draw(EXPERTS, inner, outer, scale=inner**-0.5), ids, groups


def experts(
    name: str, formats: tuple[PackedFormat | None, ...], config: DeepseekV4Config, tokens: int, draw: Draw
) -> Iterator[Operation]:
    """Products of `tokens` with weights as they are and in formats."""
    x, weights, ids, groups = _expert_operands(config, tokens, draw)
    rows, at = spread(x, groups), np.asarray(groups.row_of[0])
    run = lambda rows, weights: grouped_matmul(rows, weights, groups)  # noqa: E731
    for format in formats:
        held = pack(weights, format) if format else weights
        wanted = np.stack([wide(x[0]) @ wide(held[expert]) for expert in ids[0]])
        check = lambda found, wanted=wanted: error(found[at], wanted)  # noqa: E731
        flops = 2.0 * ids.size * held.shape[1] * held.shape[2]
        moved = float(x.dtype.itemsize * ids.size * sum(held.shape[1:]) + held.nbytes)
        kind = f" in {format.upper()}" if format else ""
        yield Operation(f"experts{kind}, {name}", (rows, held), run, flops, moved, check)


def expert_gradients(config: DeepseekV4Config, tokens: int, draw: Draw) -> Operation:
    """The same with both gradients."""
    x, weights, ids, groups = _expert_operands(config, tokens, draw)
    rows, at = spread(x, groups), np.asarray(groups.row_of[0])
    cotangent = draw(rows.shape[0], weights.shape[2])
    loss = lambda rows, weights: (grouped_matmul(rows, weights, groups) * cotangent).sum()  # noqa: E731
    back = np.stack([wide(cotangent[row]) @ wide(weights[ids[0, i]]).T for i, row in enumerate(at)])
    check = lambda found: error(found[0][at], back)  # noqa: E731
    flops = 6.0 * ids.size * weights.shape[1] * weights.shape[2]
    moved = 3.0 * (x.dtype.itemsize * ids.size * sum(weights.shape[1:]) + weights.nbytes)
    name = "experts, forward and backward"
    return Operation(name, (rows, weights), jax.grad(loss, (0, 1)), flops, moved, check)
