"""A trace on eight devices is the trace on one: tokens, rows, experts and caches spread."""

import jax
import numpy as np
import pytest
from devices import on_devices
from support import TINY, random_params

import dsv4_jax as dsv4
from sharding.mesh import make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy

CONFIG = TINY.replace(q_lora_rank=16, n_routed_experts=8, index_n_heads=4, num_nextn_predict_layers=0)
ROWS, LENGTH, QUERIES = 4, 24, (0, 7, 23)
MASS, ROUNDING = 1e-5, 2e-2  # absolute; relative: an ulp may carry a number over to its neighbour in FP4


def traced(name, text, cached):
    """Leaves of the trace on a mesh, or on one device without a name."""
    partition = {}
    if name:
        partition["partition"] = MeshPartition(make_mesh(parse_mesh(text, 8)), find_strategy(name))
    model = dsv4.Model(CONFIG, random_params(CONFIG))
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (ROWS, LENGTH))
    given = {"cache": model.init_cache(ROWS, LENGTH)} if cached else {}
    found = dsv4.trace(model, tokens, queries=QUERIES, policy="v4", **partition, **given)
    parts = [(x.attention, x.experts, x.mixing, x.spans, x.rounding) for x in found.layers]
    named = jax.tree_util.tree_flatten_with_path(parts)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "cached"),
    [("long-context", "expert=2,context=4", False), ("expert-fsdp", "data=2,expert=2,fsdp=2", True)],
)
def test_the_trace_of_one_device(name, mesh, cached):
    wanted, found = traced(None, None, cached), on_devices(8, traced, name, mesh, cached)
    assert wanted.keys() == found.keys()
    for path, x in wanted.items():
        assert x.shape == found[path].shape, path
        scalar = x.ndim == 0
        np.testing.assert_allclose(
            found[path], x, rtol=ROUNDING if scalar else 0, atol=0 if scalar else MASS, err_msg=path
        )
