"""Whole runs on a synthetic task: logged, drawn, resumed bit by bit; ablations go on where they were cut off."""

import json
import shutil

import jax
import numpy as np
import pytest

from dsv4_jax import cli
from dsv4_jax.analysis.count import total_parameters
from dsv4_jax.config import CSA, HCA, SLIDING
from dsv4_jax.layer_plan import GQA, MLA, MLA_SPARSE
from train import ablation_run
from train.ablation import variants
from train.ablation_run import ablate, table
from train.checkpointing import load_params
from train.loop import train
from train.metrics import read_metrics
from train.recipe import RecipeError, find_recipe
from train.run_data import task_rows
from train.step import StepPlan, make_train_step

MODEL = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "num_hash_layers": 0,
    "compress_ratios": [4], "layer_types": ["compressed_sparse_attention"], "num_attention_heads": 1, "head_dim": 8,
    "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 4, "index_n_heads": 1, "index_head_dim": 8,
    "index_topk": 4, "sliding_window": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
    "hc_mult": 2, "hc_sinkhorn_iters": 2,
}  # fmt: skip
RECIPE = {
    "base": "recall",
    "name": "tiny",
    "model": {"overrides": MODEL},
    "data": {"task": {"options": {"n_pairs": 2, "n_keys": 8, "n_values": 8, "offset": 4}}},
    "stages": [{"name": "sparse", "kind": "sparse", "steps": 6, "sequence_length": 48, "batch_size": 2}],
    "learning_rate": {"warmup_steps": 1, "decay_start": 0.5},
    "cadence": {"checkpoint_every": 2, "keep": 9, "eval_every": 3, "eval_batch_size": 4, "recall_rows": 4},
}


COMPILED = {}
"""The programs of these runs, shared as an ablation shares them."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.json").write_text(json.dumps(RECIPE))
    return home


@pytest.fixture(scope="module")
def finished(home):
    """(run folder, summary) of an uninterrupted run."""
    return home / "run", train(find_recipe(home / "tiny.json"), home / "run", compiled=COMPILED)


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_a_run_on_a_task_logs_and_draws_accuracy_by_distance_and_phase(finished):
    folder, summary = finished
    lines = read_metrics(folder / "metrics.jsonl")
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    evaluated = [line for line in lines if "task_accuracy" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    for found in (*evaluated, summary, summary["dense"]):
        assert 0 < found["task_loss"] < 2 * np.log(48)
        assert 0 <= found["task_accuracy"] <= 1 and 0 <= found["task_worst_phase"] <= found["task_far"] <= 1
        assert found["task_worst_phase"] == min(found["task_by_phase"].values())
        assert {int(edge) for edge in found["task_by_distance"]} <= {0, 8, 9, 18, 36}
    assert summary["window_reach"] == summary["far"] == 8 and summary["task_chance"] == 0.5
    assert 0 < summary["index_recall"] <= 1 and "sample" not in summary and "heldout_bpb" not in summary
    for name in ("curves.png", "task.png", "recipe.json", "config.json", "manifest.json", "summary.json"):
        assert (folder / name).stat().st_size > 0, name


def test_a_resumed_run_on_a_task_repeats_the_losses_bit_by_bit(home, finished):
    folder = home / "resumed"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    train(find_recipe(home / "tiny.json"), folder, compiled=COMPILED)
    assert losses(folder) == losses(finished[0])
    leaves = [jax.tree.leaves(load_params(run / "checkpoints")[1]) for run in (folder, finished[0])]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_another_task_in_a_run_folder_is_refused(home, finished):
    other = find_recipe(home / "tiny.json", ["data.task.options.n_pairs=3"])
    with pytest.raises(RecipeError, match="data.task.options.n_pairs: was 2, is 3"):
        train(other, finished[0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.task.name=mqr", "perhaps you meant 'mqar'"),
        ("data.task.options.n_pair=2", "perhaps you meant 'n_pairs'"),
        ("stages.sparse.sequence_length=11", r"stages.0 \(sparse\): task 'mqar': needs rows of 12 tokens"),
        ("model.vocab_size=32", "needs 40 ids, model.vocab_size is 32"),
        ("cadence.recall_rows=0", "a task needs rows to be evaluated on"),
    ],
)
def test_a_task_that_cannot_run_is_named_before_anything_starts(home, setting, message):
    with pytest.raises(RecipeError, match=message):
        find_recipe(home / "tiny.json", [setting]).check()


def test_stages_may_differ_in_options_and_go_on_in_the_numbers_of_the_rows(home):
    file = home / "curriculum.json"
    stages = [{**RECIPE["stages"][0], "name": f"{n} pairs", "task": {"n_pairs": n}} for n in (1, 2)]
    file.write_text(json.dumps({**RECIPE, "stages": stages}))
    recipe = find_recipe(file)
    task = recipe.data.task
    assert [task.training(stage).n_pairs for stage in recipe.stages] == [1, 2]
    assert [task.heldout(stage).offset for stage in recipe.stages] == [4, 4]
    assert [rows.start for rows in task_rows(recipe)] == [0, 12]


def test_variants_change_the_mechanism_they_name():
    recipe = find_recipe("recall")
    configs = {name: variant.change(recipe).check() for name, variant in variants(recipe).items()}
    kinds = {name: [layer.attention for layer in config.layers] for name, config in configs.items()}
    assert {CSA, HCA} <= set(kinds["full"])
    assert CSA not in kinds["no-csa"] and HCA in kinds["no-csa"] and not configs["no-csa"].has_indexer
    assert HCA not in kinds["no-hca"] and CSA in kinds["no-hca"] and set(kinds["sliding-only"]) == {SLIDING}
    for name in ("article-3-1", "article-4-1"):
        compressed = [kind for kind in kinds[name] if kind != SLIDING]
        assert compressed == [CSA] * int(name[8]) + [HCA]
    ratios = {
        name: {layer.ratio for layer in config.layers if layer.attention == CSA} for name, config in configs.items()
    }
    assert ratios["full"] == {4} and ratios["csa-2"] == {2} and ratios["csa-8"] == {8}
    assert {stage.kind for stage in variants(recipe)["dense"].change(recipe).stages} == {"dense"}
    assert variants(recipe)["no-offsets"].change(recipe).data.task.options["offset"] == 1
    tokens = {variant.change(recipe).tokens for variant in variants(recipe).values()}
    assert tokens == {recipe.tokens}


def test_variants_of_other_models_differ_in_what_they_name_and_hardly_in_parameters():
    recipe = find_recipe("recall")
    configs = {name: variant.change(recipe).check() for name, variant in variants(recipe).items()}
    for name, kind in (("gqa", GQA), ("mla", MLA), ("mla-sparse", MLA_SPARSE)):
        assert {layer.attention for layer in configs[name].layers} == {kind}
    for name in ("gqa", "mla", "mla-sparse", "top-2"):
        assert abs(total_parameters(configs[name]) / total_parameters(configs["full"]) - 1) < 0.01, name
        assert variants(recipe)[name].change(recipe).tokens == recipe.tokens
    assert configs["mla-sparse"].has_indexer and not configs["mla"].has_indexer
    assert configs["mla-sparse"].index_topk == 8 + 16  # as many as a CSA layer chooses, and its window
    assert configs["mla"].baseline.kv_lora_rank + configs["mla"].qk_rope_head_dim == configs["full"].head_dim
    routing = configs["top-2"]
    assert (routing.scoring_func, routing.num_experts_per_tok, routing.n_shared_experts) == ("softmax", 2, 0)
    assert [layer.attention for layer in routing.layers] == [CSA, HCA]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gqa", "mla", "top-2")]


@pytest.mark.parametrize("name", ["mla-sparse", *SLOW])
def test_a_variant_of_another_model_takes_a_step_with_a_finite_loss(home, name):
    base = find_recipe(home / "tiny.json")
    recipe = variants(base)[name].change(base)
    plan = StepPlan(recipe.check(), recipe.schedule(), recipe.decay_start, recipe.optimizer, recipe.losses)
    state = plan.make_state(0)
    before = jax.tree.map(np.asarray, state.params["segments"]["0"]["0"])
    rows = np.random.default_rng(0).integers(0, 48, (2, 48), dtype=np.int32)
    batch = {"tokens": rows, "segment_ids": np.repeat([[1, 2]], 24, axis=1) * np.ones_like(rows)}
    after, metrics = make_train_step(plan, recipe.stages[-1].kind)(state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0 and 0 < metrics["grad_norm"] < np.inf
    assert ("index_kl" in metrics) == (name in ("mla-sparse", "top-2"))
    moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, after.params["segments"]["0"]["0"])
    assert all(jax.tree.leaves(moved["attn"])) and all(jax.tree.leaves(moved["ffn"]["experts"]))
    assert ("bias" in moved["ffn"]["gate"]) == ("shared_experts" in moved["ffn"]) == (name != "top-2")


def result(name, *far):
    found = lambda x: {"task_accuracy": x, "task_loss": 1 - x, "task_far": x, "task_worst_phase": x - 0.1}  # noqa: E731
    common = {"far": 31, "task_chance": 0.25}
    runs = [found(x) | common | {"task_by_distance": {"0": 1.0, "16": x}} for x in far]
    costs = {"parameters": 1234, "flops": 5678.0, "cache_token": 26.0, "cache_row": 2048, "length": 128}
    return {"variant": name, "about": "...", **costs, "runs": runs}


def test_the_table_has_means_and_spreads_over_seeds(tmp_path):
    text = table([result("full", 0.9, 1.0), result("no-csa", 0.25)])
    assert "95.0% (90.0% to 100.0%)" in text and "85.0% (80.0% to 90.0%)" in text
    assert "0.050 (0.000 to 0.100)" in text
    names, _, first = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:3])
    costs = {"parameters": "1,234", "FLOPs/token": "5,678", "cache bytes/token": "26", "cache of 128 tokens": "2,048"}
    assert costs.items() <= dict(zip(names, first, strict=True)).items()
    assert "far: beyond 31 tokens; chance 25.0%" in text
    recipe = find_recipe("recall")
    ablation_run.write_report(recipe, [result("full", 0.9, 1.0), result("no-csa", 0.25)], tmp_path)
    assert (tmp_path / "ablation.png").stat().st_size > 5_000 and (tmp_path / "table.md").read_text() == text + "\n"


def test_an_ablation_keeps_what_is_finished_and_goes_on(home, monkeypatch, finished):
    """Runs are those of a real one, put in place by a stand-in for training that dies in the third."""
    recipe, out, trained = find_recipe(home / "tiny.json"), home / "ablation", []

    def put(recipe, folder, **_):
        if len(trained) == 2:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(f"{folder.parent.name} {recipe.seed}")
        assert recipe.data.task.far == 8
        shutil.copytree(finished[0], folder)

    monkeypatch.setattr(ablation_run, "train", put)
    monkeypatch.setattr(ablation_run.RunFolder, "check", lambda *_: True)
    call = {"names": ("full", "sliding-only"), "seeds": 2, "say": lambda *_: None}
    with pytest.raises(KeyboardInterrupt):
        ablate(recipe, out, **call)
    results = ablate(recipe, out, **call)
    assert trained == ["full 0", "sliding-only 0", "killed", "full 1", "sliding-only 1"]
    assert [(r["variant"], len(r["runs"])) for r in results] == [("full", 2), ("sliding-only", 2)]
    assert (out / "table.md").is_file() and (out / "ablation.png").is_file()
    ablate(recipe, out, **call)
    assert len(trained) == 5


def test_an_ablation_overwrites_nothing(home, monkeypatch, finished):
    monkeypatch.setattr(ablation_run, "train", lambda *_, **__: None)
    recipe = find_recipe(home / "tiny.json")
    with pytest.raises(RecipeError, match="no ablation.json"):
        ablate(recipe, finished[0])
    with pytest.raises(RecipeError, match="perhaps you meant 'no-csa'"):
        ablate(recipe, home / "new", names=("no-cs",))
    with pytest.raises(RecipeError, match="trains on a text"):
        ablate(find_recipe("nano"), home / "new")
    assert not (home / "new").exists()
    (home / "other").mkdir()
    (home / "other" / "ablation.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(RecipeError, match="seed: was 5, is 0"):
        ablate(recipe, home / "other", names=("full",))


def test_the_command_lists_its_variants(capsys):
    assert cli.main(["ablate", "recall", "--list"]) == 0
    assert "no-csa" in capsys.readouterr().out
    assert cli.main(["ablate", "recall", "--seeds", "0"]) == 2
