"""Texts generated on eight devices are those of one, for every strategy, mixed meshes and crowded experts."""

import jax
import numpy as np
import pytest
from devices import on_devices
from support import TINY, random_params

from dsv4_jax import weights
from dsv4_jax.inference.generate import Engine
from dsv4_jax.inference.requests import GenerateOptions
from dsv4_jax.partition import ALONE
from sharding.mesh import make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy, parameter_shardings

CONFIG = TINY.replace(q_lora_rank=16, n_routed_experts=8, index_n_heads=4)
PROMPTS, NEW = 8, 9
# Differences of log-probabilities in float32 from other orders of summation; in the deployed format a number beside a
# border of its rounding then becomes its neighbour (measured: 4e-5).
LOG_PROB = {"deployed": 2e-4}
MESHES = [
    ("data", "data=8"),
    ("fsdp", "fsdp=4,data=2"),
    ("expert-fsdp", "data=2,expert=2,fsdp=2"),
    ("expert-tensor", "data=2,expert=2,tensor=2"),
    ("expert-data", "expert=8"),
    ("expert-data", "expert=4,data=2"),
]
CASES = {  # what the engine is given beside the defaults; the last router's bias sends every token to two experts
    "plain": {"seed": 0},
    "deployed": {"seed": 1, "cache_format": "deployed"},
    "drafts": {"seed": 2, "speculative": 2},
    "samples": {"seed": 3, "n": 2},
    "crowded": {"seed": 4, "crowded": True},
}


def crowded(params):
    """Every learned router's bias sends all tokens to experts 1 and 6, so that the other six are empty."""

    def one(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[..., np.array([1, 6])].set(100.0) if names.endswith("gate/bias") else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def generated(partition, seed, cache_format="float32", speculative=0, n=1, crowded_experts=False):
    """Prompts of drawn lengths, continued greedily (or, with n > 1, drawn): (tokens, log-probabilities) of each."""
    params = random_params(CONFIG)
    if crowded_experts:
        params = crowded(params)
    if isinstance(partition, MeshPartition):
        rules = partition.strategy.parameters
        params = jax.device_put(params, parameter_shardings(weights.facts(CONFIG), params, rules, partition.mesh))
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, CONFIG.vocab_size, rng.integers(1, 40)).astype(np.int32) for _ in range(PROMPTS)]
    if n > 1:
        prompts = prompts[:1]
    engine = Engine(CONFIG, params, None, cache_format, speculative, prefill_chunk=7, partition=partition)
    options = GenerateOptions(NEW, temperature=float(n > 1), seed=5, n=n, logprobs=1)
    return [
        (text.tokens, [found.log_prob for found in text.log_probs])
        for texts in engine.generate(prompts, options)
        for text in texts
    ]


def compare(pairs):
    """By mesh and case: whether all tokens are the same, and the largest difference of a log-probability."""
    found, alone = {}, {}
    for (name, text), case in pairs:
        given = dict(CASES[case])
        given["crowded_experts"] = given.pop("crowded", False)
        if case not in alone:
            alone[case] = generated(ALONE, **given)
        spread = generated(MeshPartition(make_mesh(parse_mesh(text, 8)), find_strategy(name)), **given)
        same = [a[0] == b[0] for a, b in zip(alone[case], spread, strict=True)]
        apart = [np.abs(np.subtract(a[1], b[1])).max() for a, b in zip(alone[case], spread, strict=True)]
        found[name, text, case] = all(same), float(max(apart))
    return found


def check(pairs):
    found = on_devices(8, compare, pairs, timeout=1800)
    assert len(found) == len(pairs)
    for key, (same, apart) in found.items():
        assert same and apart < LOG_PROB.get(key[-1], 2e-5), (key, apart)


def test_eight_devices_generate_what_one_does():
    """Two strategies that spread experts, each with another case."""
    check(list(zip(MESHES[2:4], ["deployed", "drafts"], strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
def test_every_strategy_generates_every_case_as_one_device_does(mesh):
    """A process each: the programs of all would take more pieces of memory than Linux gives one."""
    check([(mesh, case) for case in CASES])
