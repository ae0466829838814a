"""Time to the first token, compilation included: `python -m tests.benchmarks.first_token`.

The model of `bench_config.json` and a prompt of 1,024 tokens, in two processes: the first finds an empty compilation
cache, the second what the first compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.common import ROOT, THREADS, bench_model

PROMPT, NEW = 1024, 64


def once(cache: str) -> None:
    """Prints seconds from the request to the first token, and of each token after it, as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    import jax
    import numpy as np

    import dsv4_jax as dsv4
    from dsv4_jax.config_json import config_from_json
    from dsv4_jax.inference.requests import GenerateOptions
    from train.loop import use_compilation_cache

    use_compilation_cache(cache)
    model = dsv4.create(config_from_json(bench_model()), 0)
    jax.block_until_ready(model.params)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT)
    start = time.perf_counter()
    events = model.engine().stream([prompt], GenerateOptions(NEW))
    next(events)
    first = time.perf_counter()
    count = sum(1 for _ in events)
    print(json.dumps({"first": first - start, "after": (time.perf_counter() - first) / count}))


def main() -> None:
    """Both starts."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "second start"):
            command = [sys.executable, "-m", "tests.benchmarks.first_token", cache]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            speed = f"then {1 / found['after']:.0f} tokens/s"
            print(f"{name}: first token after {found['first']:.1f} s, {speed}", flush=True)


if __name__ == "__main__":
    once(sys.argv[1]) if len(sys.argv) > 1 else main()
