"""A train step on eight devices is the step on one, for every strategy and mixed meshes."""

import re

import jax
import numpy as np
import pytest
from devices import on_devices
from support import TINY, random_params

from dsv4_jax.partition import ALONE
from sharding.mesh import make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy
from train.schedule import warmup_constant_cosine
from train.step import OBJECTIVES, StepPlan, batch_gradients, make_train_step

CONFIG = TINY.replace(q_lora_rank=16, n_routed_experts=8, index_n_heads=4, num_nextn_predict_layers=0)
ROWS, LENGTH = 8, 24
# float32: sums over tokens, experts and devices in another order. Gradients relative to each array's largest.
LOSS, GRADIENT = 1e-6, 2e-5
MESHES = [
    ("data", "data=8"),
    ("fsdp", "fsdp=4,data=2"),
    ("expert-fsdp", "data=2,expert=2,fsdp=2"),
    ("expert-tensor", "data=2,expert=2,tensor=2"),
    ("long-context", "expert=2,context=4"),
]


def batch():
    rng = np.random.default_rng(1)
    ends = np.sort(rng.integers(1, LENGTH, (ROWS, 3)), axis=1)
    segments = 1 + (np.arange(LENGTH) >= ends[..., None]).sum(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH))
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }


def plan_for(partition):
    return StepPlan(CONFIG, warmup_constant_cosine(1e-3, 1e-4, 0, 5, 10), 5, partition=partition)


def gradients(partition):
    """Gradients and every part of the loss, the router statistics among them, on the host."""
    plan = plan_for(partition)
    params = random_params(CONFIG)  # at initial values the hyper-connections' gradients are small and mostly rounding
    if plan.placement.mesh_partition is not None:
        params = jax.device_put(params, plan.placement.state(params))
    run = jax.jit(lambda params, batch: batch_gradients(plan, OBJECTIVES["sparse"], 1, params, batch, 0.3))
    return jax.device_get(run(params, plan.placement.to_devices(batch(), ROWS)))


def compare(meshes):
    """By mesh: differences of the loss's parts, and the largest relative difference of a gradient."""
    wanted, parts = gradients(ALONE)
    found = {}
    for name, text in meshes:
        partition = MeshPartition(make_mesh(parse_mesh(text, 8)), find_strategy(name))
        spread, spread_parts = gradients(partition)
        relative = lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-12))  # noqa: E731
        worst = max(jax.tree.leaves(jax.tree.map(relative, wanted, spread)))
        found[name, text] = {key: relative(parts[key], spread_parts[key]) for key in parts}, worst
    return found


def test_loss_gradients_and_router_statistics_are_those_of_one_device():
    for mesh, (parts, worst) in on_devices(8, compare, MESHES).items():
        assert parts.pop("hc_errors") < 0.1, mesh  # distances from 1 of the order of rounding itself
        assert max(parts.values()) < LOSS, (mesh, parts)
        assert worst < GRADIENT, mesh


def step_text(name, text):
    """The compiled train step."""
    plan = plan_for(MeshPartition(make_mesh(parse_mesh(text, 8)), find_strategy(name)))
    state = plan.make_state(0)
    step = make_train_step(plan, "sparse", 1)
    return step.lower(state, plan.placement.to_devices(batch(), ROWS)).compile().as_text()


@pytest.mark.parametrize(("name", "mesh"), [("expert-fsdp", "data=2,expert=2,fsdp=2")])
def test_nothing_large_is_gathered_by_accident(name, mesh):
    """No all-gather gives all experts; none gives anything of all tokens, neither [B, S, ..] nor [.., B * S]."""
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).*? all-gather(?:-start)?\(", on_devices(8, step_text, name, mesh))
    shapes = [tuple(int(n) for n in re.search(r"\[([\d,]*)\]", text)[1].split(",") if n) for text in gathered]
    assert shapes
    for shape in shapes:
        assert shape[-3:-2] != (CONFIG.n_routed_experts,) or shape[-1] not in (32, 12), shape
        assert shape[:2] != (ROWS, LENGTH) and ROWS * LENGTH not in shape, shape
