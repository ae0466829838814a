"""What Muon costs: its share of a step, its operations and their balance: `python -m tests.benchmarks.muon_cost`.

The first table times nano's step and the optimizer alone, with gradients given. The second is arithmetic on the
assignment that `train.spread_muon` makes: Newton-Schulz multiplies 10 (4 r^2 c + 2 r^3) numbers for a matrix of r <= c,
every device takes whole matrices, and the slowest one counts.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from dsv4_jax import weights
from dsv4_jax.presets import preset
from sharding.mesh import AXES, parse_mesh
from sharding.rules import find_strategy
from tests.benchmarks.common import best_of, machine, markdown
from train.flops import training_flops_per_token
from train.newton_schulz import COEFFICIENTS
from train.schedule import warmup_constant_cosine
from train.spread_muon import SpreadMuon
from train.step import StepPlan, make_train_step

ROWS, LENGTH = 4, 1024  # of nano's step
PODS = [
    ("v4-flash", 256, "expert=64,fsdp=4", 256 * 4096),
    ("v4-flash", 256, "expert=8,fsdp=32", 256 * 4096),
    ("v4-pro", 512, "expert=128,fsdp=4", 512 * 4096),
    ("v4-pro", 1024, "expert=128,fsdp=8", 1024 * 4096),
]
COLUMNS = ("model", "devices", "mesh", "matrices", "operations, of the step's", "mean / largest")
COLUMNS += ("largest stack of a device, MB", "of all, GB")


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(prog="python -m tests.benchmarks.muon_cost", description=__doc__).parse_args()
    step, optimizer = measured()
    rows = [[f"{ROWS}x{LENGTH}", f"{step * 1e3:,.0f}", f"{optimizer * 1e3:,.0f}", f"{optimizer / step:.0%}"]]
    print(machine(False) + "\n\n" + markdown(("nano", "step, ms", "optimizer, ms", "share"), rows) + "\n")
    print(markdown(COLUMNS, [computed(*pod) for pod in PODS]))


def measured() -> tuple[float, float]:
    """Seconds of nano's whole step and of its optimizer."""
    config = preset("nano")
    plan = StepPlan(config, warmup_constant_cosine(1e-3, 1e-4, 0, 5, 10), 5)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    step, state = make_train_step(plan, "sparse"), plan.init(0)

    def whole() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    seconds = best_of(whole, 5)["seconds"]
    moves = jax.jit(plan.transformation("sparse").update)
    gradients = jax.tree.map(lambda x: x if x.dtype.kind == "f" else np.zeros(x.shape, jax.dtypes.float0), state.params)
    alone = best_of(lambda: jax.block_until_ready(moves(gradients, state.optimizer, state.params)), 5)["seconds"]
    return seconds, alone


def computed(name: str, devices: int, text: str, tokens: int) -> list[str]:
    """A row of the second table."""
    config = preset(name)
    sizes = parse_mesh(text, devices)
    mesh: Any = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(weights.facts(config)), strict=True)
    arrays, facts = zip(*((x, fact) for x, fact in pairs if fact.optimizer == "muon"), strict=True)
    shares = SpreadMuon(mesh, find_strategy("expert-fsdp")).share(arrays, facts)
    cost = {shape: len(COEFFICIENTS) * (4 * r * r * c + 2 * r**3) for shape in shares for r, c in [shape]}
    total = sum(count * cost[shape] for shape, (count, _) in shares.items())
    largest = sum(own * cost[shape] for shape, (_, own) in shares.items())
    useful = training_flops_per_token(config, 4096, "sparse") * tokens / devices
    stack = max(own * r * c for (r, c), (_, own) in shares.items()) * 4
    whole = max(count * r * c for (r, c), (count, _) in shares.items()) * 4
    return [
        name,
        str(devices),
        text,
        f"{sum(count for count, _ in shares.values()):,}",
        f"{largest / useful:.1%}",
        f"{total / devices / largest:.0%}",
        f"{stack / 1e6:,.0f}",
        f"{whole / 1e9:,.1f}",
    ]


if __name__ == "__main__":
    main()
