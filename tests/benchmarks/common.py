"""What the benchmarks against transformers share: turns in processes of their own, the best of them, tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv4_jax.cli import huge_pages

ROOT = Path(__file__).parents[2]
THREADS = 2
SECONDS = 60.0  # of timed steps, after which no further step is started
Result = dict[str, Any]


def bench_model() -> dict[str, Any]:
    """The 40M parameter model, in transformers' form."""
    return json.loads(Path(__file__).with_name("bench_config.json").read_text(encoding="utf-8"))["model"]


def measure(sides: str, **request: Any) -> Result:
    """One turn of module `tests.benchmarks.<sides>` in its own process; empty, with a message, when it fails.

    Our side runs as the `dsv4` command runs it: with huge pages where the system has them.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{sides}", json.dumps(request)]
    fast = request["side"] == "ours" and huge_pages.available() or request.pop("huge_pages", False)
    environment = huge_pages.environment() if fast else dict(os.environ)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = "killed, probably for want of memory" if done.returncode == -9 else done.stderr[-2000:]
        print(f"{request} failed: {reason}", file=sys.stderr, flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def serve(sides: dict[str, Callable[..., Result]]) -> None:
    """What a module of sides does when it runs: the request on the command line, the result as a line of JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    request = json.loads(sys.argv[1])
    print(json.dumps(sides[request.pop("side")](**request)))


def best_of(step: Callable[[], Any], steps: int) -> Result:
    """The fastest of `steps` after one warm-up: seconds, CPU seconds (the smallest), and the process's peak memory."""
    walls, cpus = [], []
    for i in range(steps + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        if i:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        if sum(walls) > SECONDS:
            break
    return {"seconds": min(walls), "cpu_seconds": min(cpus), "peak_mib": peak_mib(), "steps": len(walls)}


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had when it started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def machine(with_torch: bool) -> str:
    """When, where and with what it was measured."""
    packages = ["jax", "jaxlib"] + (["torch", "transformers"] if with_torch else [])
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{datetime.date.today()}, {cpu_model()}, 2 threads, Python {platform.python_version()}, {versions}"


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under `columns`."""
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
