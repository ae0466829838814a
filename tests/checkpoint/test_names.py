"""Names, shapes and counts of stored tensors against the published inventory and transformers' own names."""

import math
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.checkpoint import read_config
from dsv4_jax.checkpoint.names import scale_names, stored_tensors, tensors_of_scheme
from dsv4_jax.presets import preset
from dsv4_jax.shapes import is_table, keeps_float32

FIXTURES = Path(__file__).parents[1] / "fixtures" / "public"


@pytest.mark.parametrize("name", ["pub_a", "pub_b"])
def test_transformers_names_are_those_of_its_modules(name):
    config = read_config(FIXTURES / name)
    grads = np.load(FIXTURES / name / "grads.npz")
    theirs = {str(key) for key in (*grads["norm_names"], *grads["no_grad_names"])}
    ours = {key for key, stored in tensors_of_scheme(config, "transformers").items()}
    buffers = {key for key in ours if key.endswith(("e_score_correction_bias", "tid2eid"))}
    assert ours - buffers == theirs


@pytest.mark.parametrize(
    ("name", "bytes_", "counts"),
    [
        ("v4-flash", 159609485896, {"BF16": 433, "F32": 417, "F8_E4M3": 375, "I64": 3, "I8": 33792}),
        ("v4-pro", 864704792696, {"BF16": 619, "F32": 590, "F8_E4M3": 528, "I64": 3, "I8": 71424}),
    ],
)
def test_the_released_inventory_has_the_published_tensors_and_bytes(name, bytes_, counts):
    found, total, scales = dict.fromkeys(counts, 0), 0, 0
    for key, stored in tensors_of_scheme(preset(name), "released").items():
        dtype = released_dtype(key, stored)
        rows, columns = stored.shape[0], stored.shape[-1]
        found[dtype] += 1
        scales += {"F8_E4M3": -(-rows // 128) * -(-columns // 128), "I8": rows * columns // 32}.get(dtype, 0)
        total += math.prod(stored.shape) * {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8, "I8": 0.5}[dtype]
    assert found == counts
    assert total + scales == bytes_


def released_dtype(name, stored):
    """The dtype rules of the release."""
    leaf = stored.leaves[0]
    if is_table(leaf):
        return "I64"
    if keeps_float32(leaf):
        return "F32"
    if "/experts/" in leaf:
        return "I8"
    fp8 = ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "e_proj", "h_proj", "w1", "w2", "w3")
    return "F8_E4M3" if name.removesuffix(".weight").endswith(fp8) else "BF16"


def test_every_place_of_the_tree_has_a_rule_in_each_scheme():
    every = {slot for stored in stored_tensors(preset("nano")) for slot in stored.slots}
    released = [slot for stored in tensors_of_scheme(preset("nano"), "released").values() for slot in stored.slots]
    theirs = [slot for stored in tensors_of_scheme(preset("nano"), "transformers").values() for slot in stored.slots]
    assert len(released) == len(set(released)) and set(released) == every
    assert len(theirs) == len(set(theirs)) and set(theirs) == {slot for slot in every if "mtp/" not in slot[0]}


@pytest.mark.parametrize("name", ["nano", "v4-flash"])
def test_mistake_17_no_name_has_two_rules_and_none_is_a_weight_and_a_scale(name):
    # mHC's factors are called `attn_hc.scale` and `hc_attn_scale`; the scales of matrices `..w1.scale`, `.._scale_inv`.
    rules = list(stored_tensors(preset(name)))
    names = [spelling for stored in rules for spelling in dict.fromkeys(filter(None, stored.names))]
    scales = [scale for stored in rules if stored.transposed for spelling in dict.fromkeys(filter(None, stored.names))
              for scale in scale_names(spelling)]  # fmt: skip
    assert len(names) == len(set(names)) and len(scales) == len(set(scales))
    assert not set(names) & set(scales)
