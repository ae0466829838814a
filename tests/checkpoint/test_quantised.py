"""Quantised releases: what their bytes mean, byte for byte round trips, and an error for what does not fit."""

import json

import ml_dtypes
import numpy as np
import pytest
from synthetic_release import (
    EVEN,
    FP8_SETTINGS,
    SMALL,
    make_release,
    read_safetensors,
    stored_as,
    write_folder,
    write_safetensors,
)

from dsv4_jax.checkpoint import CheckpointError, convert, load_checkpoint, loading, save
from dsv4_jax.checkpoint.names import tensors_of_scheme
from dsv4_jax.config import ConfigError
from dsv4_jax.shapes import flatten, nest, tree_shapes

BASE = SMALL.replace(expert_dtype=None)
W1 = "layers.3.ffn.experts.2.w1"


def assert_same(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(right[path]).tobytes(), path


def write_plain(folder, config, tensors, scheme="released"):
    return write_folder(folder, config.replace(quantization_config=None, expert_dtype=None), tensors, scheme)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder of a quantised release, its tensors, the same numbers as float32 tensors)."""
    tensors, plain = make_release(SMALL)
    return write_folder(tmp_path_factory.mktemp("release") / "fp4", SMALL, tensors), tensors, plain


@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    ("config", "scheme", "experts"),
    [
        pytest.param(SMALL, "released", "fp4", id="release"),
        pytest.param(BASE, "released", "fp8", id="base"),
        pytest.param(SMALL, "transformers", "fp4", id="transformers"),
        pytest.param(BASE, "transformers", "fp8", id="transformers base"),
        pytest.param(SMALL.replace(expert_dtype="fp8"), "released", "fp8", id="said to be fp8"),
    ],
)
def test_stored_bytes_mean_what_ml_dtypes_says(config, scheme, experts, dtype, tmp_path):
    tensors, plain = make_release(config, scheme, experts)
    found_config, found = load_checkpoint(write_folder(tmp_path / "q", config, tensors, scheme), dtype=dtype)
    _, expected = load_checkpoint(
        write_plain(tmp_path / "plain", config, plain, scheme), dtype=dtype or ml_dtypes.bfloat16
    )
    assert found_config.quantization_config == FP8_SETTINGS and found_config.expert_dtype == config.expert_dtype
    assert_same(found, expected)


def test_the_experts_format_may_stand_inside_the_quantisation_settings(release, tmp_path):
    """As transformers writes it."""
    folder, tensors, _ = release
    moved = SMALL.replace(quantization_config=FP8_SETTINGS | {"expert_dtype": "fp4"}, expert_dtype=None)
    assert_same(load_checkpoint(write_folder(tmp_path / "q", moved, tensors))[1], load_checkpoint(folder)[1])


def test_scales_stored_as_plain_bytes_or_as_floats_mean_the_same(release, tmp_path):
    folder, tensors, _ = release
    for dtype, change in (("U8", lambda s: s.view(np.uint8)), ("F32", lambda s: s.astype(np.float32))):
        changed = {n: (dtype, change(a)) if d == "F8_E8M0" else (d, a) for n, (d, a) in tensors.items()}
        assert_same(load_checkpoint(write_folder(tmp_path / dtype, SMALL, changed))[1], load_checkpoint(folder)[1])


@pytest.mark.parametrize("limit", [1 << 30, 50_000])
def test_a_release_comes_back_byte_for_byte(release, tmp_path, limit):
    folder, tensors, _ = release
    convert(folder, tmp_path / "again", quantise="release", max_file_bytes=limit)
    found = read_safetensors(tmp_path / "again")
    assert found.keys() == tensors.keys()
    for name, (dtype, array) in tensors.items():
        assert found[name] == (dtype, array.shape, array.tobytes()), name
    written, read = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", folder))
    assert written == read


def test_even_through_the_other_scheme_and_back(tmp_path):
    config = EVEN.replace(num_nextn_predict_layers=0)
    tensors, _ = make_release(config)
    write_folder(tmp_path / "first", config, tensors)
    convert(tmp_path / "first", tmp_path / "second", "transformers", "release")
    joined = read_safetensors(tmp_path / "second")["model.layers.1.mlp.experts.gate_up_proj"]
    parts = [tensors[f"layers.1.ffn.experts.{e}.{w}.weight"][1] for e in range(4) for w in ("w1", "w3")]
    assert joined == ("I8", (4, 256, 128), b"".join(part.tobytes() for part in parts))
    convert(tmp_path / "second", tmp_path / "third", "released", "release")
    for name, (dtype, array) in tensors.items():
        assert read_safetensors(tmp_path / "third")[name] == (dtype, array.shape, array.tobytes()), name


def test_numbers_that_were_quantised_once_are_quantised_again_without_loss(release, tmp_path):
    """Through a plain checkpoint, where the scales are lost: the numbers stay; bytes only where half the scale is no
    option."""
    folder, tensors, plain = release
    convert(folder, tmp_path / "plain", dtype="bfloat16")
    convert(tmp_path / "plain", tmp_path / "again", quantise="release")
    assert_same(load_checkpoint(folder)[1], load_checkpoint(tmp_path / "again")[1])
    found = read_safetensors(tmp_path / "again")
    for name, stored in tensors_of_scheme(SMALL, "released").items():
        kind = stored_as(stored.leaves[0], "fp4")
        if kind == "plain":
            assert found[name][2] == tensors[name][1].tobytes()
            continue
        scale = name.removesuffix("weight") + "scale"
        rows, columns, largest = (128, 128, 448) if kind == "fp8" else (1, 32, 6)
        before, after = tensors[scale][1].astype(np.float32), np.frombuffer(found[scale][2], ml_dtypes.float8_e8m0fnu)
        for i, j in np.ndindex(*before.shape):
            tile = np.abs(plain[name][1][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).max()
            assert (tile / before[i, j] > largest / 2) == (after.reshape(before.shape)[i, j] == before[i, j]), name


def test_matrices_changed_since_are_rounded_under_new_scales_and_the_others_keep_theirs(release):
    from dsv4_jax.quantization.formats import quantise_fp4

    _, tensors, plain = release
    x, known = plain[f"{W1}.weight"][1].copy(), tensors[f"{W1}.scale"][1]
    x[3, 40] = 1000
    packed, scales = quantise_fp4(x, 32, known)
    changed = np.argwhere(scales.view(np.uint8) != known.view(np.uint8))
    np.testing.assert_array_equal(changed, [[3, 1]])
    rows = np.arange(len(x)) != 3
    assert packed[rows].tobytes() == tensors[f"{W1}.weight"][1].view(np.uint8)[rows].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_trained_model_is_quantised_as_ml_dtypes_rounds_it(tmp_path, dtype, caplog):
    config = SMALL.replace(quantization_config=None, expert_dtype=None, torch_dtype=np.dtype(dtype).name)
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        integers = path.endswith("tid2eid")
        return rng.integers(0, 4, shape, np.int32) if integers else rng.standard_normal(shape).astype(dtype)

    params = nest({path: leaf(path, shape) for path, shape in tree_shapes(config).items()})
    save(tmp_path / "out", config, params, quantise="release")
    assert "transformers guesses the tiles" in caplog.text
    found_config, found = load_checkpoint(tmp_path / "out", dtype=np.float32)
    assert found_config == config.replace(quantization_config=FP8_SETTINGS, expert_dtype="fp4", torch_dtype="bfloat16")
    w1 = np.float64(params["segments"]["1"]["0"]["ffn"]["experts"]["w1"][0, 2].T)  # [out, in], the inputs in 32s
    parts = w1.reshape(len(w1), -1, 32)
    powers = 2.0 ** np.ceil(np.log2(np.abs(parts).max(-1, keepdims=True) / 6))
    rounded = (parts / powers).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * powers
    np.testing.assert_array_equal(
        found["segments"]["1"]["0"]["ffn"]["experts"]["w1"][0, 2].T, rounded.reshape(w1.shape)
    )
    wkv = np.float64(params["segments"]["1"]["0"]["attn"]["wkv"][0].T)
    first = wkv[:, :128]
    power = 2.0 ** np.ceil(np.log2(np.abs(first).max() / 448))
    rounded = (first / power).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * power
    np.testing.assert_array_equal(found["segments"]["1"]["0"]["attn"]["wkv"][0].T[:, :128], rounded)
    np.testing.assert_array_equal(found["embed"], params["embed"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_base_model_keeps_its_experts_in_fp8(tmp_path):
    tensors, _ = make_release(BASE, experts="fp8")
    write_folder(tmp_path / "base", BASE, tensors)
    convert(tmp_path / "base", tmp_path / "again", quantise="release")
    assert read_safetensors(tmp_path / "again")[f"{W1}.weight"][0] == "F8_E4M3"
    assert "expert_dtype" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_dequantised_copy_says_so_in_its_config(release, tmp_path):
    folder, _, plain = release
    convert(folder, tmp_path / "plain", "transformers", dtype="float32")
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert raw["dtype"] == "float32" and "quantization_config" not in raw and "expert_dtype" not in raw
    found = read_safetensors(tmp_path / "plain")
    assert found["model.layers.2.self_attn.q_a_proj.weight"][2] == plain["layers.2.attn.wq_a.weight"][1].tobytes()


def change(name, edit):
    def apply(tensors):
        dtype, array = tensors[name]
        tensors[name] = edit(dtype, array.copy())

    return apply


def poisoned(name):
    def edit(dtype, array):
        array.view(np.uint8)[..., 0] = 255
        return dtype, array

    return change(name, edit)


BF16 = np.zeros((96, 160), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (poisoned(f"{W1}.scale"), f"96 scales of {W1}.weight are NaN or infinite"),
        (poisoned("layers.2.attn.wo_a.scale"), "scales of layers.2.attn.wo_a.weight are NaN"),
        (lambda t: t.pop(f"{W1}.scale"), rf"1 missing .*: {W1}.scale \(the scales of {W1}.weight\)"),
        (lambda t: t.pop(f"{W1}.weight"), rf"{W1}.scale(.|\n)*1 missing .*: {W1}.weight"),
        (lambda t: t.update({f"{W1}.weight_scale_inv": t[f"{W1}.scale"]}), f"1 stored twice: {W1}.scale and {W1}"),
        (lambda t: t.update({"norm.scale": t[f"{W1}.scale"]}), "1 without a place in this architecture: norm.scale"),
        (lambda t: t.update({"layers.0.attn.compressor.wkv.scale": t[f"{W1}.scale"]}), "without a place"),
        (change(f"{W1}.scale", lambda d, a: (d, a[:, :-1])), rf"{W1}.scale \[96, 4\] instead of \[96, 5\]"),
        (change(f"{W1}.weight", lambda d, a: (d, a[:, :-1])), rf"{W1}.weight \[96, 79\] instead of \[96, 80\]"),
        (lambda t: t.update({f"{W1}.weight": ("BF16", BF16)}), rf"{W1}.scale \(its weight is BF16\)"),
        (lambda t: t.update({f"{W1}.weight": ("BF16", BF16[:, :80])}), r"\[96, 80\] instead of \[96, 160\]"),
        (lambda t: t.update({"head.weight": ("F8_E4M3", t[f"{W1}.weight"][1])}), "means plain floats"),
        (change(f"{W1}.scale", lambda d, a: ("I8", a.view(np.int8))), "has dtype I8: one of F8_E8M0"),
        (
            lambda t: t.update({f"{W1}.weight": ("F8_E4M3", np.zeros((96, 160), np.uint8))}),
            rf"{W1}.weight is F8_E4M3 \[96, 160\], but expert_dtype .* means I8, two numbers per byte",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_before_memory_is_filled(release, tmp_path, monkeypatch, edit, message):
    tensors = dict(release[1])
    edit(tensors)
    monkeypatch.setattr(loading, "_load_shard", lambda *_: pytest.fail("memory is filled"))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write_folder(tmp_path / "bad", SMALL, tensors))


def test_mistake_16_the_global_method_does_not_make_fp4_experts_fp8(release, tmp_path):
    folder = write_folder(tmp_path / "unsaid", BASE, release[1])
    with pytest.raises(CheckpointError, match=r"72 stored otherwise(.|\n)*I8 \[.*expert_dtype .* means F8_E4M3"):
        load_checkpoint(folder)


def test_another_quantisation_method_is_refused(release, tmp_path):
    other = SMALL.replace(quantization_config=FP8_SETTINGS | {"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quant_method is 'gptq': 'fp8' is needed"):
        load_checkpoint(write_folder(tmp_path / "gptq", other, release[1]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_quantised(tmp_path, value):
    tensors, plain = make_release(SMALL)
    plain[f"{W1}.weight"][1][5, 7] = value
    write_plain(tmp_path / "plain", SMALL, plain)
    with pytest.raises(CheckpointError, match=f"{W1}.weight holds NaN or infinity"):
        convert(tmp_path / "plain", tmp_path / "out", quantise="release")
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


def test_a_header_that_lays_tensors_over_each_other_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {n: ("F32", np.zeros(4, np.float32)) for n in "abc"})
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b"[16, 32]", b"[00, 16]").replace(b"[00", b"[ 0"))
    with pytest.raises(CheckpointError, match="over each other"):
        load_checkpoint(write_config(tmp_path))


def write_config(folder):
    from dsv4_jax.config_json import to_released_json

    (folder / "config.json").write_text(json.dumps(to_released_json(SMALL)))
    return folder
