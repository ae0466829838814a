"""Prefill and decode on a CPU against transformers, in one run: `python -m tests.benchmarks.infer_cpu`.

The 40M parameter model of bench_config.json in float32 with 2 threads. Prefill of one prompt of 1,024 and 4,096 tokens
(tokens/s), and decoding one token for 1 and 8 sequences behind contexts of 1,024, 4,096 and 16,384 (tokens/s of the
batch). Every measurement is a process of its own and the sides take turns. Needs the extra `reference`, unless
--skip-hf; transformers takes minutes to build a context of 16,384.
"""

from __future__ import annotations

import argparse

from tests.benchmarks.common import Result, machine, markdown, measure

CASES = (
    "prefill:1x1024", "prefill:1x4096", "decode:1x1024", "decode:1x4096", "decode:1x16384", "decode:8x1024",
    "decode:8x4096", "decode:8x16384",
)  # fmt: skip
COLUMNS = (
    "batch x tokens", "ours, tokens/s", "transformers, tokens/s", "ratio", "ours, peak MiB", "transformers, peak MiB",
    "ours, of memory bandwidth", "ours, compile s",
)  # fmt: skip


def main() -> None:
    """Measure all cases and print a markdown table."""
    options = parse_options()
    sides = ("ours",) if options.skip_hf else ("ours", "transformers")
    speed = measure("infer_sides", side="bandwidth").get("bytes_per_second", float("nan"))
    rows = []
    for case in options.cases:
        kind, shape = case.split(":")
        batch, length = map(int, shape.split("x"))
        request = {"kind": kind, "batch": batch, "length": length, "steps": 20 if kind == "decode" else 3}
        found = {side: measure("infer_sides", side=side, **request) for side in sides}
        rows.append(row(f"{kind} {shape}", batch * (length if kind == "prefill" else 1), found, speed))
        print(" | ".join(rows[-1]), flush=True)
    print(f"\n{machine(len(sides) > 1)}; memory read at {speed / 1e9:.1f} GB/s.\n\n{markdown(COLUMNS, rows)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.infer_cpu", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="KIND:BATCHxTOKENS")
    parser.add_argument("--skip-hf", action="store_true", help="measure our side only")
    return parser.parse_args()


def row(name: str, tokens: int, found: dict[str, Result], speed: float) -> list[str]:
    """One line of the table; the bandwidth is that of reading the parameters in use and the whole cache once."""
    ours, theirs = found.get("ours") or None, found.get("transformers") or None
    cell = lambda result, text: "-" if result is None else text(result)  # noqa: E731
    rate = [cell(r, lambda r: f"{tokens / r['seconds']:,.0f}") for r in (ours, theirs)]
    memory = [cell(r, lambda r: f"{r['peak_mib']:.0f}") for r in (ours, theirs)]
    ratio = f"{theirs['seconds'] / ours['seconds']:.1f}" if ours and theirs else "-"
    share = "-"
    if ours and "parameter_bytes" in ours:
        share = f"{(ours['parameter_bytes'] + ours['cache_bytes']) / ours['seconds'] / speed:.0%}"
    return [name, *rate, ratio, *memory, share, cell(ours, lambda r: f"{r['compile_seconds']:.0f}")]


if __name__ == "__main__":
    main()
