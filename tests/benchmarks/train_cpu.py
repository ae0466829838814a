"""Training speed on a CPU against transformers, in one run: `python -m tests.benchmarks.train_cpu`.

Forward and backward of the 40M parameter model of bench_config.json in float32 with 2 threads, batch x length 1x1024,
2x1024, 4x1024 and 1x4096: ours with sparse attention and chunked cross-entropy, transformers at its defaults (eager
attention, grouped_mm experts). The sides take turns, every turn is a process of its own, and the fastest step counts.
Needs the extra `reference`, unless --skip-hf. transformers takes minutes at 1x4096.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = ("1x1024", "2x1024", "4x1024", "1x4096")
COLUMNS = (
    "batch x length", "ours, tokens/s", "transformers, tokens/s", "ratio", "ours, peak MiB", "transformers, peak MiB",
    "ours, of matmul peak", "transformers, of matmul peak", "ours, compile s",
)  # fmt: skip
Result = dict[str, Any]


def main() -> None:
    """Measure all cases and print a markdown table."""
    options = parse_options()
    sides = ("ours",) if options.skip_hf else ("ours", "transformers")
    peaks = [measure(side="peak")]
    measured = {}
    for case in options.cases:
        batch, length = map(int, case.split("x"))
        shape = {"batch": batch, "length": length, "steps": options.steps, "unroll": options.unroll}
        measured[case] = batch * length, take_turns(sides, shape, options.rounds)
    peaks.append(measure(side="peak"))
    machine_peak = max(peak["flops_per_second"] for peak in peaks)
    rows = [row(case, *found, machine_peak) for case, found in measured.items()]
    print("\n" + heading(machine_peak, sides, options.unroll) + "\n\n" + markdown(rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_cpu", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxLENGTH")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of one turn (fewer when they take a minute)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--skip-hf", action="store_true", help="measure our side only")
    parser.add_argument("--unroll", action="store_true", help="unroll our layer loop instead of scanning it")
    return parser.parse_args()


def take_turns(sides: tuple[str, ...], shape: dict[str, Any], rounds: int) -> dict[str, Result]:
    """The fastest turn of each side, with the largest memory of its turns. A side that fails is left out."""
    turns: dict[str, list[Result]] = {}
    for _ in range(rounds):
        for side in sides:
            result = measure(side=side, **shape)
            if not result:
                continue
            turns.setdefault(side, []).append(result)
            print(f"{side} {shape['batch']}x{shape['length']}: {describe(result)}", flush=True)
    best = {side: min(results, key=lambda r: r["seconds"]) for side, results in turns.items()}
    most = {side: max(r["peak_mib"] for r in results) for side, results in turns.items()}
    return {side: result | {"peak_mib": most[side]} for side, result in best.items()}


def measure(**request: Any) -> Result:
    """One turn in its own process; empty, with a message, when it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.train_sides", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = "killed, probably for want of memory" if done.returncode == -9 else done.stderr[-2000:]
        print(f"{request} failed: {reason}", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def describe(result: Result) -> str:
    """One line per turn."""
    parts = [
        f"{result['seconds']:.3f} s a step ({result['cpu_seconds']:.3f} CPU s, best of {result['steps']})",
        f"{result['peak_mib']:.0f} MiB",
    ]
    if "compile_seconds" in result:
        parts.append(f"compiled in {result['compile_seconds']:.0f} s")
    if "experts" in result:
        parts.append(f"{result['attention']} attention, {result['experts']} experts")
    return ", ".join(parts)


def row(case: str, tokens: int, found: dict[str, Result], machine_peak: float) -> list[str]:
    """One line of the table. Both sides are credited with the FLOPs that sparse attention needs."""
    flops = found.get("ours", {}).get("flops")
    pair = [found.get(side) for side in ("ours", "transformers")]
    cell = lambda result, text: "-" if result is None else text(result)  # noqa: E731
    speeds = [cell(r, lambda r: f"{tokens / r['seconds']:.0f}") for r in pair]
    ratio = f"{pair[1]['seconds'] / pair[0]['seconds']:.2f}" if all(pair) else "-"
    memory = [cell(r, lambda r: f"{r['peak_mib']:.0f}") for r in pair]
    shares = [cell(r if flops else None, lambda r: f"{flops / r['seconds'] / machine_peak:.1%}") for r in pair]
    return [case, *speeds, ratio, *memory, *shares, cell(pair[0], lambda r: f"{r['compile_seconds']:.0f}")]


def heading(machine_peak: float, sides: tuple[str, ...], unroll: bool) -> str:
    """When, where and with what it was measured."""
    packages = ["jax", "jaxlib"] + (["torch", "transformers"] if "transformers" in sides else [])
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{datetime.date.today()}, {cpu_model()}, 2 threads, Python {platform.python_version()}, {versions}; "
        f"float32 matrix product {machine_peak / 1e9:.0f} GFLOP/s; layer loop {'unrolled' if unroll else 'scanned'}."
    )


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(rows: list[list[str]]) -> str:
    """Rows under `COLUMNS`."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
