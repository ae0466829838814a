"""Whole runs of a tiny recipe: what they leave behind, and that an interrupted run ends as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv4_jax import cli, model
from dsv4_jax.config_json import config_from_json
from dsv4_jax.errors import UserError
from train import run_data
from train.checkpointing import load_params
from train.data.manifest import DataMismatchError
from train.data.tokens import prepare
from train.loop import train
from train.metrics import read_metrics
from train.recipe import RecipeError, find_recipe
from train.run_data import SHUFFLE_ROWS, batch_configs
from train.run_lock import alone_in

ROOT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0], "num_hash_layers": 1,
    "layer_types": ["sliding_attention", "compressed_sparse_attention"], "num_attention_heads": 2, "head_dim": 8,
    "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 4, "index_n_heads": 1, "index_head_dim": 8,
    "index_topk": 4, "sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "hc_mult": 2, "hc_sinkhorn_iters": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts and a recipe of three dense and three sparse steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    words = [line for line in (ROOT / "train" / "loop.py").read_text().splitlines() if line]
    rng = np.random.default_rng(0)
    for number in range(24):
        (home / "texts" / f"{number}.txt").write_text("\n".join(rng.choice(words, 40)))
    recipe = {
        "base": "nano",
        "name": "tiny",
        "model": {"overrides": MODEL},
        "data": {"corpus": str(home / "texts"), "tokenizer": "bytes", "recall_pairs": 2, "recall_distance": 16},
        "stages": [
            {"name": "dense", "kind": "dense", "steps": 3, "sequence_length": 64, "batch_size": 2},
            {"name": "sparse", "kind": "sparse", "steps": 3, "sequence_length": 64, "batch_size": 2},
        ],
        "learning_rate": {"warmup_steps": 1, "decay_start": 0.5},
        "cadence": {"checkpoint_every": 2, "keep": 9, "eval_every": 4, "eval_documents": 1, "final_documents": 1,
                    "eval_batch_size": 2, "recall_rows": 2},
    }  # fmt: skip
    (home / "tiny.json").write_text(json.dumps(recipe))
    return home


@pytest.fixture(scope="module")
def recipe(home):
    return find_recipe(home / "tiny.json")


@pytest.fixture(scope="module")
def finished(home, recipe):
    """(run folder, summary) of the uninterrupted run."""
    return home / "run", train(recipe, home / "run", cache=home / "cache")


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_a_run_leaves_its_log_pictures_and_summary(finished):
    folder, summary = finished
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["stage"] for line in lines if "loss" in line] == ["dense"] * 3 + ["sparse"] * 3
    assert [line["step"] for line in lines if "heldout_bpb" in line] == [4, 6]
    for name in ("curves.png", "retrieval.png", "recipe.json", "config.json", "manifest.json", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "summary.json").read_text())["heldout_bpb"] == summary["heldout_bpb"]
    assert {"data", "compilation", "training", "evaluation"} <= set(summary["seconds"])
    assert 0 < summary["index_recall"] <= 1 and 0 <= summary["retrieval_accuracy"] <= 1
    assert (summary["heldout_documents"], summary["heldout_of"]) == (1, 4)


MEASURED = {
    *("loss", "ce", "mtp", "balance", "index_kl", "index_recall", "heldout_bpb", "retrieval_accuracy", "lr"),
    *("load_max_over_mean", "load_entropy", "dead_experts", "hc_row_error", "hc_col_error", "grad_norm"),
    *("update_rms_muon", "update_rms_adamw", "tokens_per_s", "mfu"),
}


def test_the_log_and_tensorboard_hold_every_measurement(finished):
    folder, _ = finished
    lines = read_metrics(folder / "metrics.jsonl")
    logged = {name for line in lines for name, value in line.items() if isinstance(value, float)}
    assert logged >= MEASURED
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert {name for name in MEASURED if name.encode() not in events} == set()
    evaluated = [line for line in lines if "heldout_bpb" in line]  # both within the sparse stage
    assert [0 < line["index_recall"] <= 1 for line in evaluated] == [True, True]


def test_held_out_bits_per_byte_equal_a_direct_sum_over_the_text(finished, home, recipe):
    """One document, token by token, from the logits of the saved checkpoint."""
    store = prepare(recipe.data.corpus, "bytes", cache=home / "cache")
    raw, params = load_params(finished[0] / "checkpoints")
    config = config_from_json(raw)
    document = store.document(int(store.heldout_documents[0]))
    logits_of = jax.jit(lambda p, r, s: model.forward(config, p, r, segment_ids=s).logits[0])
    nats = 0.0
    for begin in range(0, len(document) - 1, 63):  # pieces of 64 that overlap by one token
        piece = np.asarray(document[begin : begin + 64], np.int32)
        row = np.zeros((1, 64), np.int32)
        row[0, : len(piece)] = piece
        segments = (np.arange(64) < len(piece)).astype(np.int32)[None]
        logits = np.asarray(logits_of(params, row, segments), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(float(log_p[t, piece[t + 1]]) for t in range(len(piece) - 1))
    bytes_ = len(store.heldout_bytes(1))
    assert finished[1]["heldout_bpb"] == pytest.approx(nats / np.log(2) / bytes_, rel=1e-5)


def test_a_resumed_run_repeats_the_losses_bit_by_bit(home, recipe, finished):
    """From the checkpoint of step 4, inside the second stage."""
    folder = home / "resumed"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    watched = []
    train(recipe, folder, cache=home / "cache", watch=watched.append)
    assert losses(folder) == losses(finished[0])
    assert watched == [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 4 and "loss" in line]
    leaves = [jax.tree.leaves(load_params(run / "checkpoints")[1]) for run in (folder, finished[0])]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_a_finished_run_is_only_reported_again(home, recipe, finished):
    before = losses(finished[0])
    again = train(recipe, finished[0], cache=home / "cache")
    assert again["heldout_bpb"] == finished[1]["heldout_bpb"] and losses(finished[0]) == before
    assert "training" not in again["seconds"]


def test_a_run_killed_in_mid_air_ends_as_if_it_had_not_been(home, finished):
    """SIGKILL, twice, in a process of its own."""
    folder = home / "killed"
    command = [sys.executable, "-m", "dsv4_jax.cli", "train", "--recipe", str(home / "tiny.json"), "--out", str(folder)]
    command += ["--cache", str(home / "cache"), "--set", "cadence.checkpoint_every=1"]
    for lines in (1, 4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = folder / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resuming" in done.stdout
    assert losses(folder) == losses(finished[0])


def test_other_settings_or_other_text_are_refused(home, recipe, finished):
    with pytest.raises(RecipeError, match="learning_rate.peak: was .*, is 0.5"):
        train(find_recipe(home / "tiny.json", ["learning_rate.peak=0.5"]), finished[0], cache=home / "cache")
    text = home / "texts" / "0.txt"
    saved = text.read_text()
    try:
        text.write_text(saved + "more")
        with pytest.raises(DataMismatchError, match=r"1 files changed \(0.txt\)"):
            train(recipe, finished[0], cache=home / "cache")
    finally:
        text.write_text(saved)


def test_a_second_job_in_the_folder_of_one_that_runs_is_refused_and_changes_nothing(home, recipe, finished):
    def files():
        return {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file()}

    with alone_in(finished[0]):
        before = files()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
            train(recipe, finished[0], cache=home / "cache")
        assert files() == before


def test_a_stage_begins_in_the_text_behind_the_stretch_that_the_one_before_read(home, recipe):
    store = prepare(recipe.data.corpus, "bytes", cache=home / "cache")
    mixed = find_recipe(home / "tiny.json", ["data.recall_share=0"])
    first, second = batch_configs(mixed, store)
    stretch = store.lengths[store.train_documents].sum() // 64  # a small corpus is shuffled whole
    assert 3 * 2 < stretch < SHUFFLE_ROWS
    assert first.shuffle_rows == stretch and (first.start, second.start) == (0, stretch * 64)


def test_stages_skip_hardly_a_row_of_a_large_text(home, recipe, monkeypatch):
    store = prepare(recipe.data.corpus, "bytes", cache=home / "cache")
    mixed = find_recipe(home / "tiny.json", ["data.recall_share=0.1", "stages.dense.steps=10"])
    monkeypatch.setattr(run_data, "SHUFFLE_ROWS", 8)
    first, second = batch_configs(mixed, store)
    assert first.shuffle_rows == 7  # of 20 rows 18 are text
    assert (first.start, second.start) == (0, 21 * 64)


def test_a_recall_task_that_does_not_fit_is_found_before_anything_is_written(home):
    impossible = find_recipe(home / "tiny.json", ["data.recall_pairs=20"])
    with pytest.raises(RecipeError, match="stage 'dense'"):
        train(impossible, home / "impossible", cache=home / "cache")
    assert not (home / "impossible").exists()


def test_the_sample_command_continues_a_text(finished, capsys):
    options = ["--prompt", "def ", "--max-new-tokens", "3", "--temperature", "0"]
    assert cli.main(["sample", str(finished[0]), *options]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert cli.main(["sample", str(finished[0]), "--step", "5"]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err
