"""Hugging Face folders: three naming schemes, bitwise round trips, and an error for everything that does not fit."""

import json
import logging
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv4_jax.checkpoint import CheckpointError, load_checkpoint, load_params, read_config, save
from dsv4_jax.config import CSA, HCA, SLIDING, DeepseekV4Config
from dsv4_jax.shapes import flatten, is_table, keeps_float32, nest, tree_shapes

FIXTURES = Path(__file__).parents[1] / "fixtures" / "public"
NAMES = ["pub_a", "pub_b"]
TINY = DeepseekV4Config(
    vocab_size=24, hidden_size=16, num_hidden_layers=5, compress_ratios=(0, 4, 8, 4, 8, 0),
    layer_types=(SLIDING, CSA, HCA, CSA, HCA), num_hash_layers=1, num_attention_heads=4, head_dim=8,
    qk_rope_head_dim=4, q_lora_rank=6, o_lora_rank=5, o_groups=2, sliding_window=8, index_n_heads=3, index_head_dim=4,
    index_topk=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=7, max_position_embeddings=64,
    torch_dtype="float32",
)  # fmt: skip


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if is_table(path):
            return rng.integers(0, config.n_routed_experts, shape, dtype=np.int32)
        return rng.standard_normal(shape).astype(np.float32 if keeps_float32(path) else dtype)

    return nest({path: leaf(path, shape) for path, shape in tree_shapes(config).items()})


def assert_same(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype and leaf.tobytes() == right[path].tobytes(), path


@pytest.fixture
def broken(tmp_path):
    """A copy of pub_a to damage: a function that rewrites its tensors."""
    shutil.copytree(FIXTURES / "pub_a", tmp_path / "broken")

    def rewrite(change):
        file = tmp_path / "broken" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return tmp_path / "broken"

    return rewrite


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_computes_what_torch_computes_from_the_stored_tensors(name):
    config, params = load_checkpoint(FIXTURES / name)
    stored = load_file(FIXTURES / name / "model.safetensors")
    block = params["segments"]["0"]["0"]
    x = np.random.default_rng(0).standard_normal((3, config.hidden_size)).astype(np.float32)
    np.testing.assert_array_equal(params["embed"], stored["model.embed_tokens.weight"])
    np.testing.assert_allclose(x @ params["head"], x @ stored["head.weight"].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(block["attn"]["kv_norm"][0], stored["model.layers.0.attn.norm.weight"])
    np.testing.assert_array_equal(block["ffn"]["gate"]["tid2eid"][0], stored["model.layers.0.ffn.gate.tid2eid"])
    np.testing.assert_array_equal(block["hc_ffn"]["fn"][0], stored["model.layers.0.hc_ffn_fn"].T)
    for expert in range(config.n_routed_experts):
        w2 = stored[f"model.layers.0.ffn.experts.{expert}.w2.weight"]
        np.testing.assert_array_equal(block["ffn"]["experts"]["w2"][0, expert], w2.T)
    groups = config.o_groups
    out = np.random.default_rng(1).standard_normal((groups, block["attn"]["wo_a"].shape[2])).astype(np.float32)
    matrices = np.split(stored["model.layers.0.attn.wo_a.weight"], groups)  # one [o_lora_rank, in] per group
    expected = [matrix @ part for matrix, part in zip(matrices, out, strict=True)]
    np.testing.assert_allclose(np.einsum("gi,gio->go", out, block["attn"]["wo_a"][0]), expected, rtol=1e-5, atol=1e-5)


def test_layers_stand_in_the_stack_in_their_order():
    config, params = load_checkpoint(FIXTURES / "pub_a")
    stored = load_file(FIXTURES / "pub_a" / "model.safetensors")
    sinks = [
        params["segments"][str(i)][str(j)]["attn"]["attn_sink"][repeat]
        for i, segment in enumerate(config.segments)
        for repeat in range(segment.repeats)
        for j in range(len(segment.unit))
    ]
    for layer, sink in enumerate(sinks):
        np.testing.assert_array_equal(sink, stored[f"model.layers.{layer}.attn.attn_sink"])


@pytest.mark.parametrize("scheme", ["released", "transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_comes_back_bitwise(name, scheme, tmp_path):
    config, params = load_checkpoint(FIXTURES / name)
    save(tmp_path / "out", config, params, scheme)
    again, params_again = load_checkpoint(tmp_path / "out")
    assert again == config
    assert_same(params, params_again)


def test_the_released_names_are_the_mix_without_its_prefix(tmp_path):
    config, params = load_checkpoint(FIXTURES / "pub_a")
    save(tmp_path / "out", config, params)
    released, mix = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", FIXTURES / "pub_a"))
    layers = {
        key.removeprefix("model.").replace("attn.norm.", "attn.kv_norm."): key for key in mix if ".layers." in key
    }
    assert {key for key in released if key.startswith("layers.")} == set(layers)
    for key, theirs in layers.items():
        assert released[key].dtype == mix[theirs].dtype
        np.testing.assert_array_equal(released[key], mix[theirs])


def test_experts_stored_together_are_gate_rows_then_up_rows(tmp_path):
    config, params = load_checkpoint(FIXTURES / "pub_b")
    save(tmp_path / "out", config, params, "transformers")
    together = load_file(tmp_path / "out" / "model.safetensors")["model.layers.3.mlp.experts.gate_up_proj"]
    mix = load_file(FIXTURES / "pub_b" / "model.safetensors")
    for expert, rows in enumerate(together):
        gate, up = (mix[f"model.layers.3.ffn.experts.{expert}.{name}.weight"] for name in ("w1", "w3"))
        np.testing.assert_array_equal(rows, np.concatenate([gate, up]))


def test_bfloat16_weights_and_split_files_come_back_bitwise(tmp_path):
    params = random_params(TINY, ml_dtypes.bfloat16)
    save(tmp_path / "out", TINY, params, max_file_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for file in files for array in load_file(tmp_path / "out" / file).values()
    )
    config, again = load_checkpoint(tmp_path / "out")
    assert config == TINY.replace(torch_dtype="bfloat16")
    assert_same(params, again)


def test_the_mtp_module_is_kept_by_the_released_scheme_and_left_out_by_the_other(tmp_path, caplog):
    params = random_params(TINY)
    save(tmp_path / "released", TINY, params)
    config, again = load_checkpoint(tmp_path / "released")
    assert config == TINY
    assert_same(params, again)
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "transformers", TINY, params, "transformers")
    assert "no MTP module" in caplog.text
    config, again = load_checkpoint(tmp_path / "transformers")
    assert config == TINY.replace(num_nextn_predict_layers=0)
    assert_same({key: value for key, value in params.items() if key != "mtp"}, again)


def test_a_transformers_checkpoint_is_loaded_without_mtp_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        config = read_config(FIXTURES / "pub_a")
    assert config.num_nextn_predict_layers == 0 and "no MTP weights" in caplog.text


def test_drafting_blocks_of_a_dspark_release_are_left_out(tmp_path, caplog):
    params = random_params(TINY)
    save(tmp_path / "out", TINY, params)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    raw |= {"dspark_block_size": 5, "compress_ratios": [*raw["compress_ratios"], 0, 0]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    config, again = load_checkpoint(tmp_path / "out")
    assert config.num_nextn_predict_layers == 0 and "mtp" not in again
    assert "DSpark" in caplog.text


def test_a_tied_model_has_no_output_matrix_in_its_files(tmp_path):
    config = TINY.replace(tie_word_embeddings=True)
    params = random_params(config)
    save(tmp_path / "out", config, params)
    assert "head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert_same(params, load_checkpoint(tmp_path / "out")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=t["head.weight"]), "1 without a place in this architecture: extra"),
        (lambda t: t.update({"lm_head.weight": t["head.weight"]}), "1 stored twice: .*head.weight"),
        (lambda t: t.update({"layers.0.attn.kv_norm.weight": t["model.layers.0.attn.norm.weight"]}), "1 stored twice"),
        (lambda t: t.pop("model.layers.4.ffn.experts.3.w2.weight"), "1 missing .*: layers.4.ffn.experts.3.w2.weight"),
        (lambda t: t.update({"head.weight": t["head.weight"].T.copy()}), r"\[64, 96\] instead of \[96, 64\]"),
        (lambda t: t.update({"head.weight": t["head.weight"].astype(np.int8)}), "I8 .* means plain floats"),
        (lambda t: t.update({"head.weight": t["head.weight"].astype(np.float64)}), "dtype F64: one of F32"),
        (lambda t: t["model.layers.0.ffn.gate.tid2eid"].__setitem__((0, 0), 8), "experts outside 0..7"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_listed(broken, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken(change))


def test_an_unfit_config_lists_what_is_missing_and_what_is_too_many():
    config = read_config(FIXTURES / "pub_a").replace(num_hash_layers=2)
    with pytest.raises(CheckpointError, match=r"tid2eid(.|\n)*missing .*layers.2.ffn.gate.bias"):
        load_params(FIXTURES / "pub_a", config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "cut short: .* bytes, .* are needed"),
        (lambda data: data[:50], "cut short"),
        (lambda data: b"", "cut short"),
        (lambda data: data + b"x", "longer than its header says"),
        (lambda data: b"\x80\x02}q\x00." + data, "PyTorch pickle"),
        (lambda data: b"PK\x03\x04" + data, "PyTorch pickle"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda data: data[:8] + b"x" + data[9:], "header is not JSON"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_read(tmp_path, damage, message):
    shutil.copytree(FIXTURES / "pub_a", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update({"head.weight": "../other.safetensors"}), CheckpointError, "without folders"),
        (lambda m: m.update({"head.weight": "model-00009-of-00009.safetensors"}), FileNotFoundError, "incomplete"),
        (lambda m: m.update({"ghost": m["head.weight"]}), CheckpointError, "its files do not hold: ghost"),
        (lambda m: m.pop("head.weight"), CheckpointError, "does not name tensors that its files hold: head.weight"),
        (lambda m: m.update({"head.weight": m["layers.4.ffn_norm.weight"]}), CheckpointError, "wrong file for: head"),
        (lambda m: m.clear(), CheckpointError, "empty weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, change, error, message):
    save(tmp_path / "out", TINY, random_params(TINY), max_file_bytes=4000)
    file = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        load_params(tmp_path / "out", TINY)


def test_a_folder_without_safetensors_says_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a PyTorch pickle"):
        load_params(tmp_path, TINY)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_checkpoint(tmp_path / "absent")


def test_saving_overwrites_nothing_and_refuses_a_tree_of_another_config(tmp_path):
    params = random_params(TINY)
    save(tmp_path / "out", TINY, params)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save(tmp_path / "out", TINY, params)
    with pytest.raises(CheckpointError, match="lacks: .*segments/0/0/ffn/gate/bias"):
        save(tmp_path / "other", TINY.replace(num_hash_layers=0), params)
    with pytest.raises(CheckpointError, match="no naming scheme 'hf'"):
        save(tmp_path / "other", TINY, params, "hf")
    assert not (tmp_path / "other").exists()
