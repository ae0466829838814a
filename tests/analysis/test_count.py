"""Parameter counts against the published totals and against the model itself."""

import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from dsv4_jax import weights
from dsv4_jax.analysis import count
from dsv4_jax.config import CSA
from dsv4_jax.presets import PRESETS, preset
from dsv4_jax.shapes import flatten, tree_shapes


def test_the_releases_have_the_published_number_of_parameters():
    assert count.total_parameters(preset("v4-flash")) == 290_942_289_362
    assert count.total_parameters(preset("v4-pro")) == 1_598_837_347_742


@pytest.mark.parametrize(("name", "stack", "activated"), [("v4-flash", 284, 13), ("v4-pro", 1573, 49)])
def test_the_releases_have_the_reported_size_and_activated_parameters(name, stack, activated):
    config = preset(name)
    parts = {part.name: part for part in count.count_parameters(config)}
    assert round((count.total_parameters(config) - parts["MTP"].total) / 1e9) == stack
    assert round(count.activated_parameters(config) / 1e9) == activated


def test_the_mtp_module_of_flash_has_the_published_size_and_a_router_bias():
    parts = {part.name: part.total for part in count.count_parameters(preset("v4-flash"))}
    assert parts["MTP"] == 6_610_048_635 + preset("v4-flash").n_routed_experts


@pytest.mark.parametrize("config", [*PRESETS.values(), preset("nano").replace(tie_word_embeddings=True)])
def test_shapes_from_the_config_are_those_of_the_model(config):
    tree = jax.eval_shape(partial(weights.init, config), jax.random.key(0))
    assert tree_shapes(config) == {path: leaf.shape for path, leaf in flatten(tree).items()}
    floats = [leaf.size for leaf in flatten(tree).values() if np.issubdtype(leaf.dtype, np.floating)]
    integers = [leaf.size for leaf in flatten(tree).values() if np.issubdtype(leaf.dtype, np.integer)]
    assert count.total_parameters(config) == sum(floats)
    assert count.table_entries(config) == sum(integers)


def test_every_leaf_has_a_component_and_the_components_add_up():
    parts = {part.name: part for part in count.count_parameters(preset("nano"))}
    assert set(parts) == set(count.COMPONENTS)
    c = preset("nano")
    expert, layers = 3 * c.hidden_size * c.moe_intermediate_size, c.num_hidden_layers
    assert parts["routed experts"].total == layers * c.n_routed_experts * expert
    assert parts["routed experts"].activated == layers * c.num_experts_per_tok * expert
    assert parts["embedding"].activated == c.hidden_size
    # wq_b, weights_proj, two projections of 2 x 32, 4 position biases of 2 x 32, a norm
    indexer = c.q_lora_rank * 4 * 32 + c.hidden_size * 4 + 2 * c.hidden_size * 64 + 4 * 64 + 32
    assert parts["indexers"].total == indexer * c.layer_types.count(CSA)


def test_the_cache_grows_by_an_entry_per_ratio_and_layer():
    pro = preset("v4-pro")  # 30 CSA layers at 4 with a 128-wide indexer key beside each entry, 31 HCA layers at 128
    assert count.cache_elements_per_token(pro) == 30 * (512 + 128) / 4 + 31 * 512 / 128
    assert count.window_elements(pro) == 61 * 128 * 512


def test_counting_a_giant_does_not_import_jax():
    code = "import sys; from dsv4_jax.cli import main; main(['info', 'v4-pro']); assert 'jax' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1,598,837,347,742" in result.stdout and "48,852,409,187" in result.stdout
