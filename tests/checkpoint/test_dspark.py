"""Releases whose `mtp.` holds DSpark's drafting blocks: the main model loads, the blocks are kept as bytes."""

import json

import numpy as np
import pytest
from synthetic_release import SMALL, make_release, read_safetensors, write_folder

from dsv4_jax.checkpoint import convert, inventory, load_checkpoint
from dsv4_jax.checkpoint.comparing import compare
from dsv4_jax.config_json import config_from_json
from dsv4_jax.presets import preset
from dsv4_jax.shapes import flatten

MAIN = SMALL.replace(num_nextn_predict_layers=0)
SETTINGS = {
    "num_nextn_predict_layers": 1,
    "compress_ratios": [*MAIN.compress_ratios, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 39,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 8,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder, its drafting tensors): three stages with names and dtypes that V4 does not know."""
    rng = np.random.default_rng(3)
    drafting = {}
    for stage in range(3):
        for name, dtype, size in (("attn.wq_a.weight", "F8_E4M3", 1), ("markov.table", "BF16", 2), ("gate", "F64", 8)):
            drafting[f"mtp.{stage}.{name}"] = dtype, rng.integers(0, 256, (6, 10 * size), dtype=np.uint8)
    stored = {name: (dtype, array.reshape(-1)) for name, (dtype, array) in drafting.items()}
    widths = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F64": np.float64}
    stored = {name: (dtype, array.view(widths[dtype])) for name, (dtype, array) in stored.items()}
    folder = write_folder(tmp_path_factory.mktemp("dspark") / "model", MAIN, make_release(MAIN)[0] | stored)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | SETTINGS))
    return folder, stored


def test_the_main_model_is_loaded_and_the_blocks_are_said_to_be_unused(release, tmp_path, caplog):
    folder, _ = release
    config, params = load_checkpoint(folder)
    assert "9 tensors of DSpark drafting blocks (mtp.*) are not used" in caplog.text
    plain_config, plain = load_checkpoint(write_folder(tmp_path / "main", MAIN, make_release(MAIN)[0]))
    assert config == plain_config
    for path, leaf in flatten(plain).items():
        assert leaf.tobytes() == flatten(params)[path].tobytes(), path


@pytest.mark.parametrize("scheme", ["released", "transformers"])
@pytest.mark.parametrize("quantise", ["none", "release"])
def test_the_blocks_are_exported_byte_for_byte_with_their_settings(release, tmp_path, scheme, quantise):
    folder, drafting = release
    convert(folder, tmp_path / "out", scheme, quantise, max_file_bytes=100_000)
    found = read_safetensors(tmp_path / "out")
    for name, (dtype, array) in drafting.items():
        assert found[name] == (dtype, array.shape, array.tobytes()), name
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {key: value for key, value in SETTINGS.items() if scheme == "released" or key != "compress_ratios"}
    assert {key: raw[key] for key in own} == own
    config, params = load_checkpoint(tmp_path / "out")
    assert config.num_nextn_predict_layers == 0
    for path, leaf in flatten(load_checkpoint(folder)[1]).items():
        assert leaf.tobytes() == flatten(params)[path].tobytes(), path


def test_a_dspark_release_comes_back_byte_for_byte(release, tmp_path):
    folder, _ = release
    convert(folder, tmp_path / "out", quantise="release")
    assert read_safetensors(tmp_path / "out") == read_safetensors(folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_the_main_stack_of_the_0731_release_has_all_its_tensors_but_the_4705_of_the_blocks():
    assert len(inventory(preset("v4-flash").replace(num_nextn_predict_layers=0))) == 72317 - 4705


def test_an_index_with_drafting_blocks_is_compared_without_them(release, tmp_path):
    folder, drafting = release
    names = read_safetensors(folder)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    config = config_from_json(folder)
    assert compare(config, index, dspark=True).fits
    assert set(compare(config, index).extra) == set(drafting)
    assert any(
        "drafting blocks" in line and line.endswith(": 9") for line in compare(config, index, dspark=True).lines()
    )
