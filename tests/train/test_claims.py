"""The article's claims as an experiment: one statement in other words, what is trained, what is measured, the table."""

import json

import numpy as np
import pytest

from dsv4_jax import cli
from dsv4_jax.lora import Lora
from train.ablation import variants
from train.claims import PAIRS, TUNED, _tuned, measure_claims, table
from train.claims_plot import draw_claims
from train.data.tasks import TaskError
from train.data.tasks.mqar import MultiQueryRecall
from train.recipe import RecipeError, find_recipe

TASK = MultiQueryRecall(n_pairs=4, n_keys=16, n_values=16, spacing=8)


def stated(row):
    return {tuple(map(int, row[place : place + 2])) for place in 1 + 8 * np.arange(4)}


def test_a_statement_in_other_words_has_the_same_pairs_and_one_answer():
    rows, answer = TASK.retold(64, seed=3, index=5, ways=6)
    assert rows.shape == (6, 64) and rows.dtype == np.int32
    pairs = stated(rows[0])
    assert all(stated(row) == pairs for row in rows) and (rows[0, -1], answer) in pairs
    assert len(set(rows[:, -1])) == 1 and (rows[:, 0] == 0).all()
    orders = {tuple(row[1 + 8 * np.arange(4)]) for row in rows}
    assert len(orders) > 1 and not (rows[0] == rows[1]).all()
    again, other = TASK.retold(64, 3, 5, 6), TASK.retold(64, 3, 6, 6)
    assert (again[0] == rows).all() and stated(other[0][0]) != pairs
    fillers = set(range(8, 24))
    assert all(int(token) in fillers for token in rows[0][33:-1])
    with pytest.raises(TaskError, match="needs rows of"):
        TASK.retold(32, 0, 0, 2)


def test_each_pair_differs_from_the_recipe_in_the_mechanism_that_is_claimed():
    recipe = find_recipe("recall")
    known = variants(recipe)
    found = {name: known[name].change(recipe) for name in PAIRS}
    configs = {name: changed.check() for name, changed in found.items()}
    assert configs["one-stream"] == configs["full"].replace(hc_mult=1)
    assert configs["temperature"] == configs["full"].replace(adaptive_routing_temperature=0.5)
    assert configs["no-bias"] == configs["full"] and found["no-bias"].losses.bias_speed == 0
    assert "one-stream" not in variants(find_recipe("recall", ["model.hc_mult=1"]))


def test_the_tuned_models_differ_in_the_generators_alone(tmp_path):
    recipe = find_recipe("recall", ["seed=4"])
    held, adapted = (_tuned(recipe, tmp_path, name, 5) for name in TUNED)
    held.check(), adapted.check()  # before any model is trained
    assert held.start_from == adapted.start_from == str(tmp_path / "full" / "seed-5") and held.seed == 5
    assert isinstance(held.lora, Lora) and held.lora.streams == "held" and adapted.lora.streams == "adapted"
    assert held.lora.targets == adapted.lora.targets and held.stages == adapted.stages
    task = held.data.task.training(held.stages[0])
    assert (task.n_pairs, task.spacing, task.offset) == (8, 4, 32)


@pytest.mark.parametrize("name", ["nano", "recall"])
def test_only_the_task_with_paraphrases_is_taken(name, tmp_path):
    settings = ["data.task.name=induction", 'data.task.options={"n_symbols": 32}'] if name == "recall" else []
    with pytest.raises(RecipeError, match="task mqar"):
        measure_claims(find_recipe(name, settings), tmp_path / "claims")
    assert not (tmp_path / "claims").exists()
    assert cli.main(["claims", "recall", "--seeds", "0"]) == 2


def test_the_table_and_the_picture_leave_out_what_is_not_there(tmp_path):
    run = {"far": 0.9, "ratio": 0.1, "used": 0.8, "busiest": 1.5, "row_error": 1e-3}
    found = {"full": [run | {"reach": 40.0}, run | {"ratio": 0.3, "reach": 60.0}], "no-hca": [run]}
    about = {"full": "the recipe", "no-hca": "HCA layers slide"}
    lines = table(found, about).splitlines()
    assert "| 2e-01 (1e-01 to 3e-01) " in lines[2] and "| 50 (40 to 60) " in lines[2]
    assert "| 1e-01 " in lines[3] and "| - " in lines[3]
    assert draw_claims(found, about, tmp_path / "c.png").stat().st_size > 5_000


@pytest.mark.slow
def test_claims_are_measured_on_models_that_were_trained_and_tuned(tmp_path, capsys):
    """Nineteen steps each of the recipe itself: too few to claim anything, enough for every number."""
    short = [f"stages.{name}.steps={steps}" for name, steps in (("dense", 5), ("indexer", 4), ("sparse", 10))]
    short += ["learning_rate.warmup_steps=2", "cadence.recall_rows=16"]
    out = tmp_path / "claims"
    command = ["claims", "recall", "--seeds", "1", "--out", str(out), *(x for s in short for x in ("--set", s))]
    assert cli.main(command) == 0
    found = json.loads((out / "claims.json").read_text())
    assert list(found) == [*PAIRS, *TUNED]
    for name, [run] in found.items():
        assert 0 < run["ratio"] and 0 < run["within"] < 1 and 0 < run["between"] < 1, name
        assert 0.25 <= run["used"] <= 1 and 1 <= run["busiest"] <= 4 and 0 <= run["far"] <= 1
        assert 0 < run["reach"] < 128 and run["row_error"] < 0.5
    assert found["one-stream"][0]["row_error"] < 1e-5
    assert found["lora-held"][0]["ratio"] != found["lora-adapted"][0]["ratio"]
    assert (out / "claims.png").stat().st_size > 5_000
    before = (out / "full" / "seed-0" / "metrics.jsonl").read_bytes()
    assert cli.main(command) == 0 and (out / "full" / "seed-0" / "metrics.jsonl").read_bytes() == before
    assert (out / "claims.md").read_text().strip() in capsys.readouterr().out
