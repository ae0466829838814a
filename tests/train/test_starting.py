"""Runs that begin with the weights of another run or of a checkpoint folder: exactly these, and nothing else of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY as WHOLE
from support import random_params

from dsv4_jax import cli
from dsv4_jax.checkpoint import load_checkpoint, save
from dsv4_jax.config import CSA
from dsv4_jax.config_json import to_released_json
from dsv4_jax.shapes import flatten
from dsv4_jax.tokenizer import ByteTokenizer, train_bpe
from train import loop
from train.checkpointing import Checkpoints
from train.recipe import RecipeError, find_recipe
from train.schedule import warmup_constant_cosine
from train.starting import settings_from, starting_weights
from train.step import Precision, StepPlan

TINY = WHOLE.replace(
    num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,), num_nextn_predict_layers=0, num_hash_layers=0
)
PLAN = StepPlan(
    TINY, warmup_constant_cosine(1e-2, 1e-3, 0, 5, 10), decay_start=5, precision=Precision(policy="v4")
)  # fmt: skip
PARAMS = random_params(TINY)


def same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == (jnp.int32 if path.endswith("tid2eid") else jnp.float32), path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a run whose newest checkpoint holds PARAMS."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        host = {"config": to_released_json(TINY)}
        checkpoints.save(1, {"params": jax.tree.map(jnp.zeros_like, PARAMS)}, host)
        checkpoints.save(3, {"params": PARAMS}, host)
    ByteTokenizer().save(folder)
    (folder / "config.json").write_text(json.dumps(to_released_json(TINY)))
    return folder


def test_masters_are_the_weights_of_the_other_run_and_the_rest_is_fresh(base):
    params, differences = starting_weights(base, PLAN)
    assert not differences
    state = PLAN.make_state(0, params)
    same(state.params, PARAMS)
    fresh = PLAN.make_state(0)
    assert jax.tree.structure(state) == jax.tree.structure(fresh) and int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, (state.optimizer, state.key), (fresh.optimizer, fresh.key))


@pytest.mark.parametrize("quantise", ["none", "v4"])
def test_a_checkpoint_folder_gives_the_numbers_that_it_stores(tmp_path, quantise):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, PARAMS)
    save(tmp_path / "model", TINY, narrow, quantise=quantise)
    params, _ = starting_weights(tmp_path / "model", PLAN)
    same(params, load_checkpoint(tmp_path / "model", dtype=np.float32)[1])


def test_another_architecture_is_refused_before_anything_is_read(base):
    other = dataclasses.replace(PLAN, config=TINY.replace(moe_intermediate_size=16, n_routed_experts=8))
    with pytest.raises(RecipeError, match=r"n_routed_experts: 6 there, 8 here\n.*moe_intermediate_size: 12 there, 16"):
        starting_weights(base, other)


def test_settings_without_parameters_may_differ_and_are_said(base):
    other = dataclasses.replace(PLAN, config=TINY.replace(sliding_window=9, torch_dtype="float32"))
    params, differences = starting_weights(base, other)
    assert differences == ["sliding_window: 5 there, 9 here"]
    same(params, PARAMS)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="neither safetensors nor a training checkpoint"):
        starting_weights(tmp_path, PLAN)
    with pytest.raises(RecipeError, match="there is no folder"):
        settings_from(str(tmp_path / "nowhere"))


def test_the_command_takes_over_weights_and_tokenizer_and_can_take_over_the_architecture(base, capsys):
    asked = ["train", "nano", "--from", str(base), "--set", f"model.preset={base}", "--set", "precision.policy=v4"]
    assert cli.main([*asked, "--show"]) == 0
    shown = json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")
    assert shown["start_from"] == str(base) and shown["data"]["tokenizer"] == str(base / "tokenizer.json")
    recipe = find_recipe("nano", [*settings_from(str(base)), f"model.preset={base}", "data.tokenizer=bpe"])
    assert recipe.model.config == TINY and recipe.data.tokenizer == "bpe"
    assert find_recipe("nano").start_from is None


def test_a_run_sets_out_from_these_weights_under_its_own_policy(base, tmp_path, monkeypatch, capsys):
    """Up to the first step; that steps under a policy start from the masters is tested beside the policies."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number} " * 20)
    small = ["model.vocab_size=384", "data.recall_share=0", "cadence.recall_rows=0", "precision.policy=v4"]
    settings = [*settings_from(str(base)), f"model.preset={base}", *small, f"data.corpus={tmp_path / 'texts'}"]

    class SetOut(Exception):
        pass

    def stop(run, store, state, *_):
        same(state.params, PARAMS)
        assert run.plan.policy.rounding
        raise SetOut

    monkeypatch.setattr(loop, "_all_stages", stop)
    with pytest.raises(RecipeError, match=r"vocab_size: 64 there, 384 here"):
        loop.train(find_recipe("nano", settings), tmp_path / "other", cache=tmp_path / "cache")
    assert not (tmp_path / "other").exists()
    wide = TINY.replace(vocab_size=384)
    params = random_params(wide)
    save(tmp_path / "model", wide, params)
    ByteTokenizer().save(tmp_path / "model")
    settings = [setting.replace(str(base), str(tmp_path / "model")) for setting in settings]
    monkeypatch.setitem(globals(), "PARAMS", params)
    with pytest.raises(SetOut):
        loop.train(find_recipe("nano", settings), tmp_path / "run", cache=tmp_path / "cache")
    assert f"beginning with the weights in {tmp_path / 'model'}" in capsys.readouterr().out
    train_bpe(["some other words"] * 9, 300).save(tmp_path / "model")
    with pytest.raises(RecipeError, match="know another vocabulary"):
        settings = [s.replace(f"tokenizer={tmp_path}/model/tokenizer.json", "tokenizer=bytes") for s in settings]
        loop.train(find_recipe("nano", settings), tmp_path / "run2", cache=tmp_path / "cache")
