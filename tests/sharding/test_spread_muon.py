"""Muon's matrices dealt out over devices: the same update, whole matrices, equal shares, nothing inside the loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from devices import on_devices
from support import TINY

from dsv4_jax import weights
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import find_strategy, parameter_shardings
from train.optimizer import make_optimizer
from train.spread_muon import SpreadMuon

CONFIG = TINY.replace(q_lora_rank=16, n_routed_experts=8, index_n_heads=4, num_nextn_predict_layers=0)
COLLECTIVE = r"= [^=]*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def compare(mesh_text):
    """(largest difference of the updates, collectives inside loops, balance by shape)."""
    params, facts = weights.init(CONFIG, jax.random.key(0)), weights.facts(CONFIG)
    gradient = lambda x: jax.random.normal(jax.random.key(x.size), x.shape) if x.dtype == jnp.float32 else x  # noqa: E731
    gradients = jax.tree.map(gradient, params)
    alone = make_optimizer(facts, 0.1)
    wanted, _ = jax.jit(alone.update)(gradients, alone.init(params), params)
    mesh = make_mesh(parse_mesh(mesh_text, 8))
    placed = parameter_shardings(facts, params, find_strategy("expert-fsdp").state, mesh)
    spread = make_optimizer(facts, 0.1, orthogonalize=SpreadMuon(mesh, find_strategy("expert-fsdp")))
    params, gradients = jax.device_put((params, gradients), (placed, placed))
    state = jax.jit(spread.init)(params)
    update = jax.jit(spread.update, out_shardings=(placed, None)).lower(gradients, state, params).compile()
    found, _ = update(gradients, state, params)
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *jax.device_get((wanted, found)))
    text = update.as_text()
    bodies = {name for name in re.findall(r"body=%?([\w.\-]+)", text)}
    inside = [
        line
        for name in bodies
        for line in re.findall(rf"%?{re.escape(name)} \(.*?\n}}", text, re.DOTALL)[:1]
        if re.search(COLLECTIVE, line)
    ]
    pairs = [(x, f) for x, f in zip(jax.tree.leaves(params), jax.tree.leaves(facts), strict=True)]
    muon = [(x, f) for x, f in pairs if f.optimizer == "muon"]
    shares = SpreadMuon(mesh, find_strategy("expert-fsdp")).share([x for x, _ in muon], [f for _, f in muon])
    return max(jax.tree.leaves(differences)), len(inside), len(bodies), shares


def test_the_update_is_that_of_one_device_and_nothing_travels_between_iterations():
    difference, inside, loops, shares = on_devices(8, compare, "data=2,expert=2,fsdp=2")
    assert difference < 1e-6
    assert loops > 3 and inside == 0
    for count, own in shares.values():
        assert own <= count // 8 + 3  # each of the experts' arrays is dealt out by itself and may leave a remainder
