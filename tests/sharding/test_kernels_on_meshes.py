"""Kernels of GPUs run on every device's own operands under a mesh, and nowhere else where there are several devices."""

import re

import jax
import jax.numpy as jnp
from devices import on_devices
from flax import nnx
from support import TINY

from dsv4_jax.config import CSA, HCA
from dsv4_jax.kernels import platforms
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.partition import ALONE
from dsv4_jax.quantization.policy import NONE
from sharding.mesh import make_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy

WIDE = TINY.replace(
    num_attention_heads=64, head_dim=128, qk_rope_head_dim=64, index_n_heads=64, index_head_dim=128, index_topk=4
)
BRANCHES = r"(?:gather|range)_attention(?:_d_queries|_d_entries)?"
NAMES = rf"({BRANCHES}|index_scores|index_best|attention_mass|chosen_index_\w+)\n"


def kernels_of_layers():
    """Names in the gradients of a CSA and an HCA layer, traced for Hopper and two devices: in a mesh, and without."""
    platforms.are_hopper = lambda: True
    mesh = make_mesh({"fsdp": 2})
    return [_names(partition) for partition in (MeshPartition(mesh, find_strategy("fsdp")), ALONE)]


def _names(partition):
    found = set()
    for kind in (CSA, HCA):
        spec = next(layer for layer in WIDE.layers if layer.attention == kind)
        graph, state = nnx.split(nnx.eval_shape(lambda spec=spec: Attention(WIDE, spec, nnx.Rngs(0))))
        layout = make_layout(WIDE, 2, 24, None)

        def loss(weights, x, graph=graph, layout=layout):
            options = AttentionOptions("sparse", True, NONE)
            out, record, _ = partition.attention(nnx.merge(graph, weights), x, layout, options, None)
            return out.astype(float).sum() + (record["index_loss"].kl.sum() if "index_loss" in record else 0.0)

        x = jax.ShapeDtypeStruct((2, 24, WIDE.hidden_size), jnp.bfloat16)
        with platforms.compiling_for("cuda"):
            found |= set(re.findall(NAMES, str(jax.make_jaxpr(jax.grad(loss))(nnx.to_pure_dict(state), x))))
    return found


def test_attention_in_a_mesh_takes_the_kernels():
    in_a_mesh, without = on_devices(2, kernels_of_layers)
    branches = {f"{kind}_attention{part}" for kind in ("gather", "range") for part in ("", "_d_queries", "_d_entries")}
    loss = {"attention_mass", "chosen_index_scores", "chosen_index_gradients"}
    assert in_a_mesh == branches | {"index_scores", "index_best"} | loss
    assert not without
