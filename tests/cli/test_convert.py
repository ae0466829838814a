"""`dsv4 convert`: inventories of the releases to the byte, comparisons with an index, and conversions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dsv4_jax as dsv4
from dsv4_jax.checkpoint import save
from dsv4_jax.checkpoint.files import list_tensors
from dsv4_jax.cli import main
from dsv4_jax.shapes import flatten
from dsv4_jax.tokenizer import ByteTokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "public" / "pub_a"
PUBLISHED = {
    "v4-flash": (
        "69,187 tensors, 159,609,485,896 bytes",
        "BF16 433, F32 417, F8_E4M3 375, F8_E8M0 34,167, I64 3, I8 33,792",
    ),
    "v4-pro": (
        "145,116 tensors, 864,704,792,696 bytes",
        "BF16 619, F32 590, F8_E4M3 528, F8_E8M0 71,952, I64 3, I8 71,424",
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_dry_run_lists_every_tensor_of_a_release(name, capsys):
    assert main(["convert", "--dry-run", name]) == 0
    *tensors, total, dtypes = capsys.readouterr().out.splitlines()
    assert (total, dtypes) == PUBLISHED[name]
    assert f"{len(set(tensors)):,}" == total.split()[0]
    if name == "v4-flash":
        assert "layers.2.attn.wo_a.weight  F8_E4M3 [8192, 4096]" in tensors
        assert "layers.2.attn.wo_a.scale  F8_E8M0 [64, 32]" in tensors
        assert "layers.42.ffn.experts.255.w2.weight  I8 [4096, 1024]" in tensors
        assert "layers.42.ffn.experts.255.w2.scale  F8_E8M0 [4096, 64]" in tensors
        assert "layers.2.ffn.gate.tid2eid  I64 [129280, 6]" in tensors
        assert "mtp.0.e_proj.scale  F8_E8M0 [32, 32]" in tensors


def test_a_dry_run_of_a_small_model_can_be_quantised_or_plain(capsys):
    assert main(["convert", "--dry-run", "nano"]) == 0
    assert "F8" not in capsys.readouterr().out
    assert main(["convert", "--dry-run", "nano", "--quantise", "release", "--scheme", "transformers"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.experts.gate_up_proj  I8 [8, 192, 96]" in out
    assert "model.layers.0.mlp.experts.gate_up_proj_scale_inv  F8_E8M0 [8, 192, 6]" in out


def test_the_formats_of_a_policy_can_be_asked_for_in_both_spellings(tmp_path, capsys):
    assert main(["convert", "--dry-run", "v4-flash", "--quantize", "v4"]) == 0
    assert tuple(capsys.readouterr().out.splitlines()[-2:]) == PUBLISHED["v4-flash"]
    assert main(["convert", "--dry-run", "v4-flash", "--quantise", "fp8"]) == 0  # a base model
    assert "layers.2.ffn.experts.7.w1.weight  F8_E4M3 [2048, 4096]" in capsys.readouterr().out
    assert main(["convert", str(FIXTURE), str(tmp_path / "v4"), "--quantize", "v4"]) == 0
    assert main(["convert", str(tmp_path / "v4"), str(tmp_path / "fp8"), "--quantize", "fp8"]) == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("v4", "fp8")]
    assert [config.get("expert_dtype") for config in configs] == ["fp4", None]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    before, after = (flatten(dsv4.load(tmp_path / name).params) for name in ("v4", "fp8"))
    for path, leaf in before.items():  # experts in FP4 are experts in FP8: their scales lie near one another
        np.testing.assert_array_equal(leaf, after[path])


@pytest.mark.parametrize("arguments", [[], ["--dtype", "float16"], ["--quantise", "fp8", "--scheme", "transformers"]])
def test_a_dry_run_of_a_checkpoint_lists_what_is_written(arguments, tmp_path, capsys):
    assert main(["convert", str(FIXTURE), str(tmp_path / "v4"), "--quantise", "v4"]) == 0
    capsys.readouterr()
    for source in (tmp_path / "v4", FIXTURE):
        assert main(["convert", "--dry-run", str(source), *arguments]) == 0
        listed = capsys.readouterr().out.splitlines()[:-2]
        assert main(["convert", str(source), str(tmp_path / f"out of {source.name}"), *arguments]) == 0
        capsys.readouterr()
        written = list_tensors(tmp_path / f"out of {source.name}")
        assert sorted(listed) == sorted(f"{name}  {entry.dtype} {list(entry.shape)}" for name, entry in written.items())


@pytest.fixture
def shards(tmp_path):
    """A model in several files with an index."""
    model = dsv4.load(FIXTURE)
    save(tmp_path / "model", model.config, model.params, max_file_bytes=100_000)
    return tmp_path / "model"


def test_an_index_that_fits_is_said_to_fit(shards, capsys):
    index = shards / "model.safetensors.index.json"
    assert main(["convert", "--dry-run", str(shards), "--against", str(index)]) == 0
    out = capsys.readouterr().out
    assert "is what the configuration says" in out and "missing: 0" in out


def test_an_index_is_compared_by_names_where_its_shards_are_elsewhere(shards, tmp_path, capsys):
    index = tmp_path / "alone.json"
    shutil.copy(shards / "model.safetensors.index.json", index)
    assert main(["convert", "--dry-run", str(shards / "config.json"), "--against", str(index)]) == 0
    assert "headers were read: 0 of" in capsys.readouterr().out


def test_what_is_missing_extra_and_misshapen_is_named(shards, capsys):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = content["weight_map"].pop("head.weight")
    tensors = load_file(shards / lost)
    tensors["surplus"] = tensors.pop("head.weight")
    save_file(tensors, shards / lost)
    content["weight_map"]["surplus"] = lost
    file = content["weight_map"]["norm.weight"]
    tensors = load_file(shards / file)
    tensors["norm.weight"] = np.zeros(63, np.float32)
    save_file(tensors, shards / file)
    index.write_text(json.dumps(content))
    assert main(["convert", "--dry-run", str(shards), "--against", str(index)]) == 2
    problems = capsys.readouterr().err
    assert "missing: 1: head.weight" in problems and "extra: 1: surplus" in problems
    assert "misshapen: 1: norm.weight: F32 [63] instead of F32 [64]" in problems


@pytest.mark.parametrize("scheme", ["released", "transformers"])
def test_a_folder_is_converted_with_its_tokenizer(tmp_path, scheme, capsys):
    shutil.copytree(FIXTURE, tmp_path / "in")
    ByteTokenizer().save(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--scheme", scheme]) == 0
    assert "config.json" in capsys.readouterr().out
    theirs, ours = dsv4.load(tmp_path / "in"), dsv4.load(tmp_path / "out")
    assert ours.tokenizer is not None and ours.config == theirs.config
    for path, leaf in flatten(theirs.params).items():
        np.testing.assert_array_equal(leaf, flatten(ours.params)[path])


def test_a_training_run_is_converted(tmp_path, capsys):
    import jax.numpy as jnp

    from dsv4_jax.config_json import to_released_json
    from train.checkpointing import Checkpoints

    model = dsv4.load(FIXTURE)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": model.params}, {"config": to_released_json(model.config)})
    ByteTokenizer().save(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    found = dsv4.load(tmp_path / "out")
    assert found.tokenizer is not None and found.config.torch_dtype == "bfloat16"
    assert found.params["embed"].dtype == jnp.bfloat16 and found.params["hc_head"]["fn"].dtype == jnp.float32
    np.testing.assert_array_equal(found.params["embed"], model.params["embed"].astype(jnp.bfloat16))
    capsys.readouterr()
    assert main(["convert", "--dry-run", str(tmp_path / "run"), "--dtype", "bfloat16"]) == 0
    listed = capsys.readouterr().out.splitlines()[:-2]
    written = list_tensors(tmp_path / "out")
    assert sorted(listed) == sorted(f"{name}  {entry.dtype} {list(entry.shape)}" for name, entry in written.items())


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--help"])
    assert exit_.value.code == 0 and "dsv4 convert --dry-run v4-flash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano"], "where to?"),
        ([str(FIXTURE), "{out}", "--against", "x"], "give --dry-run"),
        (["{out}/nowhere", "{out}"], "there is no folder"),
        (["--dry-run", "v4-flsh"], "perhaps you meant 'v4-flash'"),
        (["--dry-run", "v4-flash", "--against", "nowhere.json"], "nowhere.json does not exist"),
        ([str(FIXTURE), str(FIXTURE)], "nothing is overwritten"),
        ([str(FIXTURE), "{out}/a", "--quantise", "v4", "--dtype", "float32"], "the rest is always bfloat16"),
        (["--dry-run", "nano", "--quantise", "v4", "--dtype", "float32"], "the rest is always bfloat16"),
        ([str(FIXTURE), "{out}/a", "--step", "3"], "--step is for runs"),
    ],
)
def test_requests_that_cannot_be_met_are_answered_in_a_sentence(arguments, message, tmp_path, capsys):
    assert main(["convert", *(argument.format(out=tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_another_architecture_is_refused(tmp_path, capsys):
    shutil.copytree(FIXTURE, tmp_path / "other")
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw | {"model_type": "deepseek_v41"}))
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "out")]) == 2
    assert "DeepSeek-V4.1 is another architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert main(["convert", "nowhere", str(tmp_path)]) == 2
    assert f"{tmp_path} holds notes.txt: choose a new folder" in capsys.readouterr().err
    assert main(["convert", "nowhere", str(tmp_path / "notes.txt" / "x")]) == 2
    assert f"{tmp_path}/notes.txt is no folder" in capsys.readouterr().err
