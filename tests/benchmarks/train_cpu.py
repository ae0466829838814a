"""Training speed on a CPU against transformers, in one run: `python -m tests.benchmarks.train_cpu`.

Forward and backward of the 40M parameter model of bench_config.json in float32 with 2 threads, batch x length 1x1024,
2x1024, 4x1024 and 1x4096: ours with sparse attention and chunked cross-entropy, transformers at its defaults (eager
attention, grouped_mm experts). The sides take turns, every turn is a process of its own, and the fastest step counts.
Needs the extra `reference`, unless --skip-hf. transformers takes minutes at 1x4096.
"""

from __future__ import annotations

import argparse
from typing import Any

from tests.benchmarks.common import Result, machine, markdown, measure

CASES = ("1x1024", "2x1024", "4x1024", "1x4096")
COLUMNS = (
    "batch x length", "ours, tokens/s", "transformers, tokens/s", "ratio", "ours, peak MiB", "transformers, peak MiB",
    "ours, of matmul peak", "transformers, of matmul peak", "ours, compile s",
)  # fmt: skip


def main() -> None:
    """Measure all cases and print a markdown table."""
    options = parse_options()
    sides = ("ours",) if options.skip_hf else ("ours", "transformers")
    peaks = [measure("train_sides", side="peak")]
    measured = {}
    for case in options.cases:
        batch, length = map(int, case.split("x"))
        shape = {"batch": batch, "length": length, "steps": options.steps, "unroll": options.unroll}
        shape |= {"huge_pages": True} if options.huge_pages else {}
        measured[case] = batch * length, take_turns(sides, shape, options.rounds)
    peaks.append(measure("train_sides", side="peak"))
    machine_peak = max(peak["flops_per_second"] for peak in peaks)
    rows = [row(case, *found, machine_peak) for case, found in measured.items()]
    print("\n" + heading(machine_peak, sides, options.unroll) + "\n\n" + markdown(COLUMNS, rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_cpu", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxLENGTH")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of one turn (fewer when they take a minute)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument(
        "--huge-pages", action="store_true", help="give transformers the huge pages that our command gives itself"
    )
    parser.add_argument("--skip-hf", action="store_true", help="measure our side only")
    parser.add_argument("--unroll", action="store_true", help="unroll our layer loop instead of scanning it")
    return parser.parse_args()


def take_turns(sides: tuple[str, ...], shape: dict[str, Any], rounds: int) -> dict[str, Result]:
    """The fastest turn of each side, with the largest memory of its turns. A side that fails is left out."""
    turns: dict[str, list[Result]] = {}
    for _ in range(rounds):
        for side in sides:
            result = measure("train_sides", side=side, **shape)
            if not result:
                continue
            turns.setdefault(side, []).append(result)
            print(f"{side} {shape['batch']}x{shape['length']}: {describe(result)}", flush=True)
    best = {side: min(results, key=lambda r: r["seconds"]) for side, results in turns.items()}
    most = {side: max(r["peak_mib"] for r in results) for side, results in turns.items()}
    return {side: result | {"peak_mib": most[side]} for side, result in best.items()}


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
    loop = "unrolled" if unroll else "scanned"
    where = machine("transformers" in sides)
    return f"{where}; float32 matrix product {machine_peak / 1e9:.0f} GFLOP/s; layer loop {loop}."


if __name__ == "__main__":
    main()
