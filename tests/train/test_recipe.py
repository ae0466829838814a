"""Recipes: all of them can run, settings have names, and mistakes are named before anything starts."""

import dataclasses
import json
import re

import pytest

from dsv4_jax.config import ConfigError
from dsv4_jax.presets import preset
from train.recipe import RECIPES, Recipe, RecipeError, find_recipe, recipe_from_json, recipe_to_json
from train.recipe_checks import RANGES, STAGE_RANGES
from train.run_folder import RunFolder


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_checks_and_survives_json(name):
    recipe = find_recipe(name)
    recipe.check()
    assert recipe.name == name and recipe.about
    assert recipe_from_json(Recipe, json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


@pytest.mark.parametrize(
    ("name", "trillions", "batch", "peak"), [("flash", 32, 75.5e6, 2.7e-4), ("pro", 33, 94.4e6, 2e-4)]
)
def test_the_reports_runs_have_the_reports_numbers(name, trillions, batch, peak):
    recipe = find_recipe(name)
    assert recipe.tokens == pytest.approx(trillions * 1e12, rel=1e-4)
    last = recipe.stages[-1]
    assert last.batch_size * last.sequence_length == pytest.approx(batch, rel=1e-2)
    lengths = list(dict.fromkeys(stage.sequence_length for stage in recipe.stages))
    assert lengths == [4096, 16384, 65536, 1048576]
    kinds = list(dict.fromkeys(stage.kind for stage in recipe.stages))
    assert kinds == ["dense", "indexer_warmup", "sparse"]
    dense = sum(stage.tokens for stage in recipe.stages if stage.kind == "dense")
    assert dense == pytest.approx(1e12, rel=1e-3)
    assert float(recipe.schedule()(recipe.steps // 2)) == pytest.approx(peak)
    assert (recipe.losses.mtp, recipe.losses.mtp_decayed, recipe.losses.balance) == (0.3, 0.1, 1e-4)


def test_settings_by_dotted_name():
    recipe = find_recipe(
        "nano",
        [
            "learning_rate.peak=0.01",
            "stages.0.steps=7",
            "stages.sparse.batch_size=3",
            "model.hidden_size=128",
            "optimizer.clip_norm=null",
            "data.corpus=some/path",
            "seed=5",
        ],  # fmt: skip
    )
    assert recipe.learning_rate.peak == 0.01 and recipe.stages[0].steps == 7
    assert next(stage for stage in recipe.stages if stage.name == "sparse").batch_size == 3
    assert recipe.model.config == preset("nano").replace(hidden_size=128)
    assert recipe.optimizer.clip_norm is None and recipe.data.corpus == "some/path" and recipe.seed == 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate.peek=1", "perhaps you meant 'peak'"),
        ("model.hidden_sise=1", "perhaps you meant 'hidden_size'"),
        ("stages.spars.steps=1", "perhaps you meant 'sparse'"),
        ("learning_rate.peak=fast", "learning_rate.peak is 'fast'; expected float"),
        ("stages.0.kind=thick", "expected 'dense' or 'indexer_warmup' or 'sparse'"),
        ("seed.x=1", "seed is a single value"),
        ("seed", "expected NAME=VALUE"),
        ("lora.rank=4", """lora is not set; set it as a whole: --set 'lora={"rank": 4}'"""),
        ("data.task.options.n_pairs=4", """set it as a whole: --set 'data.task={"options": {"n_pairs": 4}}'"""),
        ("stages.0=5", "stages.0 is 5; expected an object"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(setting, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        find_recipe("nano", [setting])


def test_a_stage_can_be_changed_by_an_object_and_left_out():
    nano = find_recipe("nano")
    dense, _, sparse = nano.stages
    recipe = find_recipe("nano", ["stages.indexer=null", 'stages.sparse={"steps": 9}'])
    assert recipe.stages == (dense, dataclasses.replace(sparse, steps=9))
    recipe.check()
    assert find_recipe("nano", ["lora={}", "lora.targets.shared=indexer"]).lora.targets == ("attn", "indexer")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", "it must lie in [0, 1e18]"),
        ("stages.dense.steps=0", "stages.0 (dense): steps is 0, at least 1 is needed"),
        ("stages.dense.sequence_length=1", "stages.0 (dense): sequence_length is 1, at least 2 is needed"),
        ("optimizer.momentum=2", "it must lie in [0, 1)"),
        ("optimizer.adam_b2=1.5", "it must lie in [0, 1)"),
        ("optimizer.weight_decay=-3", "at least 0 is needed"),
        ("optimizer.clip_norm=-1", "more than 0 is needed"),
        ("optimizer.clip_norm=0", "more than 0 is needed"),
        ("learning_rate.peak=Infinity", "learning_rate.peak is inf, a finite number is needed"),
        ("learning_rate.floor=NaN", "learning_rate.floor is nan, a finite number is needed"),
        ("losses.balance=-1", "at least 0 is needed"),
        ("precision.unroll=-1", "at least 0 is needed"),
        ("data.recall_share=1", "it must lie in [0, 1)"),
        ("cadence.eval_documents=0", "at least 1 is needed"),
        ("cadence.final_documents=0", "at least 1 is needed"),
        ("cadence.eval_batch_size=0", "at least 1 is needed"),
        ("cadence.recall_rows=-4", "at least 0 is needed"),
        ("cadence.data_timeout=-1", "at least 0 is needed"),
        ('data.task={"phases": 0}', "data.task.phases is 0, at least 1 is needed"),
        ('lora={"alpha": 0}', "lora.alpha is 0.0, more than 0 is needed"),
        ("stability.spike_window=3", "at least 4 is needed"),
    ],
)
def test_a_number_outside_of_its_range_is_named_with_the_range(setting, message):
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        find_recipe("nano", [setting]).check()
    assert setting.split("=")[0].split(".")[-1] in str(caught.value)


def test_every_number_of_a_recipe_has_a_range():
    """But those that other rules check: the rank of adapters."""
    recipe = find_recipe("nano", ["optimizer.clip_norm=1", "cadence.final_documents=1", "lora={}", "data.task={}"])
    found = {f"{name}.{key}" for name, value in vars(recipe).items() if dataclasses.is_dataclass(value)
             for key, inner in vars(value).items() if is_number(inner)}  # fmt: skip
    found |= {f"data.task.{key}" for key, value in vars(recipe.data.task).items() if is_number(value)} | {"seed"}
    assert found - {"lora.rank"} == set(RANGES)
    assert {key for key, value in vars(recipe.stages[0]).items() if is_number(value)} == set(STAGE_RANGES)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_a_wrong_architecture_is_a_configuration_error():
    with pytest.raises(ConfigError, match="num_attention_heads"):
        find_recipe("nano", ["model.num_attention_heads=3"]).check()


def test_check_lists_every_problem_at_once():
    settings = ["stages.0.sequence_length=5000", "stages.0.microbatches=3", "learning_rate.decay_start=2"]
    with pytest.raises(RecipeError) as caught:
        find_recipe("nano", settings).check()
    for words in ("exceeds max_position_embeddings 4096", "microbatches 3 must divide", "decay_start is 2.0, it must"):
        assert words in str(caught.value)


def test_an_indexer_stage_needs_an_indexer():
    ratios = [128] * preset("nano").num_hidden_layers + [0]
    with pytest.raises(RecipeError, match="no CSA layer"):
        find_recipe("nano", [f"model.compress_ratios={ratios}"]).check()


def test_recipe_files_build_on_a_base(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"base": "nano", "name": "mine", "learning_rate": {"peak": 0.5}}')
    mine, nano = find_recipe(file), find_recipe("nano")
    assert mine.learning_rate.peak == 0.5 and mine.learning_rate.floor == nano.learning_rate.floor
    assert mine.stages == nano.stages
    file.write_text('{"base": "nano", "optimiser": {}}')
    with pytest.raises(RecipeError, match="perhaps you meant 'optimizer'"):
        find_recipe(file)
    python = tmp_path / "mine.py"
    python.write_text("from train.recipes.nano import RECIPE\n")
    assert find_recipe(python) == nano


def test_unknown_recipes_and_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match="perhaps you meant 'nano'"):
        find_recipe("nanno")
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        find_recipe(tmp_path / "absent.json")


def test_a_run_folder_belongs_to_one_recipe(tmp_path):
    recipe, folder = find_recipe("nano"), RunFolder(tmp_path / "run")
    assert folder.check(recipe) is False
    folder.begin(recipe, recipe.model.config)
    assert folder.check(recipe) is True
    assert folder.check(find_recipe("nano", ["cadence.eval_every=7"])) is True
    with pytest.raises(RecipeError, match=r"stages\.0\.steps: was \d+, is 9"):
        folder.check(find_recipe("nano", ["stages.0.steps=9"]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no recipe.json"):
        RunFolder(other).check(recipe)
