"""Kernels on the device at hand: `python -m tests.benchmarks.kernels`.

Per operation: the time, the rate of useful operations and of bytes that must move, the fraction of the device's
roofline, and how many times as long plain XLA and a dense masked baseline take. Every result is checked against float64
on a few queries first; an operation whose result is wrong, or all zeros, ends the benchmark without a table.

    python -m tests.benchmarks.kernels                                  # V4-Flash widths, what this device can bear
    python -m tests.benchmarks.kernels --preset v4-pro --contexts 4K 64K 1M --queries 2048
    python -m tests.benchmarks.kernels --only sparse --contexts 4K
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.analysis.hardware import HARDWARE
from dsv4_jax.presets import preset
from tests.benchmarks.common import cpu_model, markdown
from tests.benchmarks.kernel_operations import operations
from tests.benchmarks.operation import Operation

COLUMNS = (
    "operation", "context", "ms", "TFLOP/s", "GB/s", "of roofline", "XLA takes", "dense mask takes", "error",
)  # fmt: skip
CHOICES = {"accelerator": (2048, 8, "bfloat16"), "cpu": (16, 1, "float32")}  # queries, rows, dtype
SECONDS = 2.0  # of repeated calls


class WrongResult(Exception):
    """A backend that does not compute what it should."""


@dataclass(frozen=True)
class Timing:
    """Seconds of our path and of the baselines (None: not timed), and the largest error of all."""

    operation: Operation
    context: int
    seconds: float
    xla: float | None
    dense: float | None
    error: float


def main() -> None:
    """Check, time and print."""
    options = parse_options()
    config = preset(options.preset)
    before, timings = roof(options.dtype), []
    for context in options.contexts:
        made = operations(config, context, min(options.queries, context), options.rows, options.dtype)
        for operation in (x for x in made if options.only in x.name):
            timings.append(measure(operation, context, options.dtype, options.baselines))
            print(f"{operation.name}, {context:,}: {1e3 * timings[-1].seconds:.4g} ms", flush=True)
    after = roof(options.dtype)
    peaks = max(before[0], after[0]), max(before[1], after[1])
    versions = f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    size = f"{options.queries} queries, decode of {options.rows} rows, {options.dtype}"
    print(f"\n{options.preset}, {size}; {before[2]}; {versions}\n")
    print(markdown(COLUMNS, [row(timing, *peaks) for timing in timings]))


def parse_options() -> argparse.Namespace:
    """Defaults depend on the device."""
    queries, rows, dtype = CHOICES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="v4-flash", help="widths: v4-flash or v4-pro")
    parser.add_argument("--contexts", nargs="+", type=tokens, default=[4096, 65536], metavar="TOKENS")
    parser.add_argument("--queries", type=int, default=queries, help="of a prefill chunk; tokens of the experts")
    parser.add_argument("--rows", type=int, default=rows, help="sequences that decode")
    parser.add_argument("--dtype", default=dtype, choices=("bfloat16", "float32"))
    parser.add_argument("--only", default="", help="operations with these letters in their names")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false", help="time our own path only")
    return parser.parse_args()


def tokens(text: str) -> int:
    """4096, 64K or 1M."""
    return int(text.rstrip("KM")) * {"K": 1024, "M": 1024**2}.get(text[-1], 1)


def measure(operation: Operation, context: int, dtype: str, baselines: bool) -> Timing:
    """Our path and the baselines. Raises WrongResult."""
    seconds, error = timed(operation, operation.run, dtype)
    xla = dense = None
    if baselines:
        with plain_xla():
            xla = timed(operation, operation.run, dtype)[0]
        dense = operation.dense and timed(operation, operation.dense, dtype)[0]
    return Timing(operation, context, seconds, xla, dense, error)


def row(timing: Timing, peak: float, bandwidth: float) -> Sequence[str]:
    """One line of the table."""
    operation, seconds = timing.operation, timing.seconds
    roofline = max(operation.flops / peak, operation.moved / bandwidth)
    others = ("-" if other is None else f"{other / seconds:.2f}x" for other in (timing.xla, timing.dense))
    rates = f"{operation.flops / seconds / 1e12:.3g}", f"{operation.moved / seconds / 1e9:.3g}"
    shown = f"{timing.context:,}", f"{1e3 * seconds:.4g}", *rates, f"{roofline / seconds:.1%}"
    return [operation.name, *shown, *others, f"{timing.error:.0e}"]


def timed(operation: Operation, call: Callable[..., Any], dtype: str) -> tuple[float, float]:
    """Seconds of the fastest of some calls, and the error of the result. Raises WrongResult."""
    # A function of its own: what was traced for one backend must not be found again for another.
    run = jax.jit(lambda *operands: call(*operands))
    found = jax.block_until_ready(run(*operation.operands))
    error = verified(operation, found, dtype)
    walls: list[float] = []
    while len(walls) < 3 or sum(walls) < SECONDS and len(walls) < 50:
        began = time.perf_counter()
        jax.block_until_ready(run(*operation.operands))
        walls.append(time.perf_counter() - began)
    return min(walls), error


def verified(operation: Operation, found: Any, dtype: str) -> float:
    """The error of a result. Raises WrongResult."""
    arrays = [np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for x in jax.tree.leaves(found)]
    if not all(x.any() for x in arrays):
        raise WrongResult(f"{operation.name}: a result is all zeros")
    error = operation.check(arrays if isinstance(found, tuple) else arrays[0])
    if not error <= operation.tolerance[dtype]:
        raise WrongResult(f"{operation.name}: error {error:.1e}, more than {operation.tolerance[dtype]:.0e}")
    return error


@contextmanager
def plain_xla() -> Iterator[None]:
    """Without kernels."""
    before = os.environ.get("DSV4_KERNELS", "auto")
    os.environ["DSV4_KERNELS"] = "xla"
    try:
        yield
    finally:
        os.environ["DSV4_KERNELS"] = before


def roof(dtype: str) -> tuple[float, float, str]:
    """FLOP/s and bytes/s of the device: a data sheet's, or measured where there is none; and its name."""
    kind = jax.devices()[0].device_kind
    known = {"h100": "H100", "h200": "H200", "b200": "B200", "v5e": "v5 lite", "v5p": "v5p", "v6e": "v6 lite"}
    for name, part in known.items():
        if part.lower() in kind.lower():
            chip = HARDWARE[name]
            share = chip.devices_per_chip
            return chip.peak("bf16" if dtype == "bfloat16" else "float32") / share, chip.hbm_bandwidth / share, kind
    return measured_peak(dtype), measured_bandwidth(), f"{cpu_model() if kind == 'cpu' else kind}, peaks measured"


def measured_peak(dtype: str) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices."""
    x = jnp.ones((2048, 2048), dtype)
    return 2 * 2048**3 / fastest(jax.jit(lambda x: x @ x), x)


def measured_bandwidth() -> float:
    """Bytes/s of a sum over 1 GiB."""
    x = jnp.ones(1 << 28, jnp.float32)
    return x.nbytes / fastest(jax.jit(jnp.sum), x)


def fastest(call: Callable[..., Any], *operands: Any) -> float:
    """Seconds of the fastest of five calls behind a warm-up."""
    walls = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(call(*operands))
        walls.append(time.perf_counter() - began)
    return min(walls[1:])


if __name__ == "__main__":
    main()
