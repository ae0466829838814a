"""Training adapters: what moves, what is held, what a checkpoint of such a run gives back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY as WHOLE
from support import random_params

import dsv4_jax as dsv4
from dsv4_jax.config import CSA
from dsv4_jax.config_json import to_released_json
from dsv4_jax.lora import Lora
from dsv4_jax.shapes import flatten
from dsv4_jax.tokenizer import ByteTokenizer
from train import adapted
from train.checkpointing import Checkpoints
from train.data.tasks.rows import TaskSource
from train.loop import Evaluators, Run
from train.losses import OBJECTIVES
from train.recipe import RecipeError, find_recipe
from train.run_folder import RunFolder
from train.schedule import warmup_constant_cosine
from train.step import StepPlan, batch_gradients, make_train_step

TINY = WHOLE.replace(
    num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,), num_nextn_predict_layers=0, num_hash_layers=0
)
LORA = Lora(rank=2, targets=("attn", "indexer"))
PLAN = StepPlan(TINY, warmup_constant_cosine(1e-2, 1e-3, 0, 5, 10), decay_start=5, lora=LORA)
BASE = random_params(TINY)


def a_batch(rows=2, length=24):
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.ones((rows, length), jnp.int32)}


def trained(kind, steps=2):
    state = PLAN.make_state(0, jax.tree.map(jnp.copy, BASE))
    step = make_train_step(PLAN, kind)
    for _ in range(steps):
        state, metrics = step(state, a_batch())
    return state, metrics


def test_adapters_move_and_the_base_stays_bit_by_bit():
    state, metrics = trained("sparse")
    jax.tree.map(np.testing.assert_array_equal, state.params["base"], BASE)
    fresh = flatten(PLAN.make_state(0, jax.tree.map(jnp.copy, BASE)).params["lora"])
    moved = {path for path, x in flatten(state.params["lora"]).items() if (x != fresh[path]).any()}
    assert moved == set(fresh) and metrics["skipped"] == 0
    changed = {path for path, x in flatten(PLAN.masters(state.params)).items() if (x != flatten(BASE)[path]).any()}
    assert changed == {path.rsplit("/", 1)[0] for path in fresh}


def test_the_indexers_warm_up_moves_only_the_indexers_adapters():
    state, _ = trained("indexer_warmup", steps=1)
    moved = {path for path, x in flatten(state.params["lora"]).items() if path.endswith("/b") and x.any()}
    assert moved and all("indexer" in path for path in moved)


def test_gradients_are_those_of_the_merged_matrices_times_the_other_factor():
    whole = dataclasses.replace(PLAN, lora=None)
    params = PLAN.make_state(0, jax.tree.map(jnp.copy, BASE)).params
    params = params | {"lora": jax.tree.map(lambda x: x + 0.01, params["lora"])}
    run = lambda plan, params: batch_gradients(  # noqa: E731
        plan, OBJECTIVES["dense"], 1, params, a_batch(), jnp.float32(0.3)
    )[0]
    of_factors, of_matrices = flatten(run(PLAN, params)["lora"]), flatten(run(whole, PLAN.masters(params)))
    factors, scale = flatten(params["lora"]), LORA.alpha / LORA.rank
    for path in {path.rsplit("/", 1)[0] for path in factors if "indexer" not in path}:
        d_matrix = np.asarray(of_matrices[path], np.float64)
        d_a = scale * d_matrix @ np.swapaxes(np.asarray(factors[f"{path}/b"], np.float64), -1, -2)
        np.testing.assert_allclose(of_factors[f"{path}/a"], d_a, rtol=1e-4, atol=1e-5 * np.abs(d_a).max())


def test_a_checkpoint_of_adapters_loads_merged(tmp_path):
    state, _ = trained("sparse")
    host = {"config": to_released_json(TINY), "lora": json.loads(json.dumps(adapted.to_json(LORA)))}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, state, host)
    ByteTokenizer().save(tmp_path)
    merged = PLAN.masters(state.params)
    jax.tree.map(np.testing.assert_array_equal, dsv4.load(tmp_path).params, merged)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = lambda config: jax.tree.map(lambda _: alone, merged)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, dsv4.load(tmp_path, shardings=shardings).params, merged)


def test_a_recipe_says_what_it_lacks():
    with pytest.raises(RecipeError, match="lora adapts the weights of a run or checkpoint: name it with --from"):
        find_recipe("nano", ['lora={"rank": 4}']).check()
    with pytest.raises(RecipeError, match="lora.rank 999 is no low rank for "):
        find_recipe("nano", ['lora={"rank": 999}']).check()
    with pytest.raises(RecipeError, match=r"stages.1 \(indexer\): it trains the indexers alone.*stages.indexer=null"):
        find_recipe("nano", ["lora={}", "start_from=base"]).check()
    for setting in ("stages.indexer=null", 'lora.targets=["attn", "indexer"]'):
        find_recipe("nano", ['lora={"rank": 2}', "start_from=base", setting]).check()
    assert "at equal streams the maps are those of pretraining" in adapted.describe(LORA, TINY)
    moving = dataclasses.replace(LORA, streams="adapted")
    assert "they move" in adapted.describe(moving, TINY)


def test_runs_with_other_adapters_do_not_share_an_evaluator(tmp_path):
    """Its program holds the scale of the adapters."""
    made = {}
    for setting in ("rank=2", "rank=3", "alpha=4", "rank=2"):
        name, value = setting.split("=")
        recipe = find_recipe("recall", [f'lora={{"{name}": {value}}}'])
        run = Run(recipe, recipe.model.config, RunFolder(tmp_path), compiled=made)
        Evaluators(run, TaskSource("mqar")).at(128)
    assert len(made) == 3
