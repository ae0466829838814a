"""What the real compilers make of the grouped matmul: FLOPs and temporary bytes, beside `jax.lax.ragged_dot`.

    python -m tests.kernels.grouped_costs v5e:2x2 h200:1x1

Rows are so many for each expert that no tile is padded: the ideal is two FLOPs for every row and number of a matrix.
What a kernel does is counted in its own program, grid and products, since to the compiler it is a closed box;
`ragged_dot` is counted by the compiler.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from dsv4_jax.kernels.grouped_matmul import grouped_matmul, make_groups
from dsv4_jax.kernels.grouped_matmul.product import multiply, weight_gradient
from dsv4_jax.kernels.platforms import compiling_for
from dsv4_jax.quantization.packed import Packed
from sharding.targets import parse_target, prepare

EXPERTS, INNER, OUTER, TILE = 8, 1024, 512, 128
PAIRS = 4 * TILE * EXPERTS
IDEAL = 2 * PAIRS * INNER * OUTER
NATIVE = ("ragged_dot forward", "ragged_dot rows", "ragged_dot weights")


class Cost(NamedTuple):
    """FLOPs over the ideal, None where nobody counts them (GPUs), and temporary bytes."""

    flops: float | None
    temporary: int


def costs(target: str) -> dict[str, Cost]:
    """By product: forward, gradient of the rows, gradient of the weights, packed forwards, and `ragged_dot`'s three."""
    prepare()
    machine = parse_target(target)
    here = jax.sharding.SingleDeviceSharding(machine.devices()[0])
    put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)  # noqa: E731
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)  # noqa: E731
    ids = jax.ShapeDtypeStruct((PAIRS // 2, 2), jnp.int32)
    groups = put(jax.eval_shape(lambda ids: make_groups(ids, EXPERTS, TILE), ids))
    count = groups.pair_of.shape[0]
    rows, d_out = array(count, INNER), array(count, OUTER)
    masters = array(EXPERTS, INNER, OUTER, dtype=jnp.float32)
    fp8, fp4 = (abstract_packed(array, format) for format in ("fp8", "fp4"))
    exact, sizes = (array(PAIRS, INNER), array(PAIRS, OUTER)), array(EXPERTS, dtype=jnp.int32)
    native = array(EXPERTS, INNER, OUTER)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "forward": (grouped_matmul, (rows, masters, groups)),
        "rows": (partial(multiply, transposed=True), (d_out, masters, groups)),
        "weights": (weight_gradient, (rows, d_out, masters, groups)),
        "fp8 forward": (grouped_matmul, (rows, fp8, groups)),
        "fp4 forward": (grouped_matmul, (rows, fp4, groups)),
        NATIVE[0]: (jax.lax.ragged_dot, (exact[0], native, sizes)),
        NATIVE[1]: (lambda r, w, g, d: pulled(jax.lax.ragged_dot, r, w, g)(d)[0], (exact[0], native, sizes, exact[1])),
        NATIVE[2]: (lambda r, w, g, d: pulled(jax.lax.ragged_dot, r, w, g)(d)[1], (exact[0], native, sizes, exact[1])),
    }
    platform = "tpu" if machine.is_tpu else "cuda"
    with compiling_for(platform, machine.capability):
        return {name: cost(name, *program, machine.compiler_options) for name, program in programs.items()}


def abstract_packed(array: Callable[..., Any], format: Any) -> Packed:
    """The experts in FP8 or FP4."""
    rows, tile = (INNER, (128, 128)) if format == "fp8" else (INNER // 2, (32, 1))
    scales = array(EXPERTS, INNER // tile[0], OUTER // tile[1], dtype=jnp.uint8)
    return Packed(array(EXPERTS, rows, OUTER, dtype=jnp.uint8), scales, format, tile, "bfloat16")


def pulled(product: Callable[..., jax.Array], rows: Any, weights: Any, groups: Any) -> Callable[..., Any]:
    """The gradients of a product by rows and weights."""
    return jax.vjp(lambda rows, weights: product(rows, weights, groups), rows, weights)[1]


def cost(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Cost:
    """Compiles for the machine of the arguments."""
    # A function of its own: what was traced for another platform must not be found again.
    traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
    compiled = traced.lower().compile(compiler_options=options)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    if name in NATIVE:
        counted = (compiled.cost_analysis() or {}).get("flops")
        return Cost(counted and counted / IDEAL, temporary)
    kernels = sum(kernel_flops(equation) for equation in pallas_calls(traced.jaxpr.jaxpr))
    return Cost(kernels / IDEAL if kernels else None, temporary)


def pallas_calls(jaxpr: Any) -> list[Any]:
    """The kernels in a program."""
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    inner = (e for equation in jaxpr.eqns if equation not in found for e in jaxprs_in_params(equation.params))
    return found + [equation for part in inner for equation in pallas_calls(part)]


def kernel_flops(equation: Any) -> int:
    """FLOPs of the products in a kernel; of its last grid axis, tiles, only as many do something as have rows."""
    *outer, _ = equation.params["grid_mapping"].grid
    return math.prod(outer) * (PAIRS // TILE) * product_flops(equation.params["jaxpr"])


def product_flops(jaxpr: Any) -> int:
    """FLOPs of one pass through a program; of a branch that may be taken, those it may come to."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
        total += sum(product_flops(part) for part in jaxprs_in_params(equation.params))
    return total


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for name, found in costs(target).items():
            flops = "not counted" if found.flops is None else f"{found.flops:.2f}x ideal FLOPs"
            print(f"{target:12} {name:20} {flops:20} {found.temporary / 2**20:8.1f} MiB temporary", flush=True)
