"""A run that does not fit its devices is refused whole: every stage, with the settings that would do."""

import json

import pytest

from dsv4_jax.cli import main
from dsv4_jax.errors import UserError
from train import loop, placement
from train.fitting import check_on_paper, training_strategy
from train.recipe import RecipeError, find_recipe


def test_all_stages_are_named_with_the_settings_that_would_do():
    with pytest.raises(RecipeError) as refused:
        check_on_paper(find_recipe("small"), None, "expert-fsdp", 64)  # 48 experts: over 16 of the 64
    _, *lines = str(refused.value).splitlines()
    assert lines[0] == (
        "  stages.ramp: batch_size 64 / microbatches 8 = 8 rows, which 64 devices (fsdp=4 x expert=16) cannot share; "
        "--set stages.ramp.microbatches=1 gives 64"
    )
    assert [line.split(":")[0].strip() for line in lines] == [f"stages.{s.name}" for s in find_recipe("small").stages]
    assert lines[1].endswith("--set stages.dense.microbatches=4 gives 64")
    settings = [line.rpartition("--set ")[2].split()[0] for line in lines]
    assert check_on_paper(find_recipe("small", settings), None, "expert-fsdp", 64) == (
        "fits 64 devices, fsdp=4 x expert=16, strategy expert-fsdp"
    )


def test_a_batch_that_is_too_small_is_made_larger():
    with pytest.raises(
        RecipeError, match=r"--set stages.dense.batch_size=64 gives 64\n.*\n.*stages.sparse.batch_size=64"
    ):
        check_on_paper(find_recipe("mini"), "expert=16,fsdp=4", "expert-fsdp", 64)


def test_the_tokens_of_a_row_are_shared_too():
    with pytest.raises(RecipeError, match=r"sequence_length 2048, which 3 devices \(context=3\) cannot share"):
        check_on_paper(find_recipe("mini"), "context=3", "long-context", None)


@pytest.mark.parametrize("name", ["expert-tensor", "expert-data", "nope"])
def test_a_run_is_trained_with_a_strategy_of_training(name):
    with pytest.raises(UserError, match="expert-fsdp"):
        training_strategy(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "nope"], "there is no strategy 'nope'"),
        (["--strategy", "expert-data"], "is for inference"),
        (["--strategy", "expert-fsdp", "--mesh", "expert=3"], "which does not divide over expert=3"),
        (["--mesh", "fsdp=3", "--cpu-devices", "4"], "for 3 devices, but there are 4"),
        (["--cpu-devices", "64"], "batch_size=64"),
    ],
)
def test_show_refuses_what_training_would(options, message, capsys):
    settings = ["--set", "stages.dense.batch_size=12", "--set", "stages.sparse.batch_size=12"]
    settings += ["--set", "stages.indexer.batch_size=12"]
    assert main(["train", "mini", *settings, *options, "--show"]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_show_says_which_devices_it_checked(capsys):
    assert main(["train", "mini", "--mesh", "expert=8,fsdp=2", "--strategy", "expert-fsdp", "--show"]) == 0
    shown, _, words = capsys.readouterr().out.rpartition("\n}")
    assert json.loads(shown + "}") and words.endswith("fits 16 devices, fsdp=2 x expert=8, strategy expert-fsdp\n")
    assert main(["train", "mini", "--strategy", "expert-fsdp", "--show"]) == 0
    assert "was not checked: say how many with --cpu-devices" in capsys.readouterr().out


def test_training_spreads_experts_over_as_many_devices_as_divide_them(monkeypatch, tmp_path, capsys):
    """On 64 devices that are not here: what is laid on them, and whether training is reached."""
    laid = []
    monkeypatch.setattr(placement.jax, "device_count", lambda: 64)
    monkeypatch.setattr(placement, "first_mesh", lambda texts, _: texts[0])
    monkeypatch.setattr(loop, "train", lambda *_, partition, **__: laid.append(partition.mesh))
    monkeypatch.setattr(loop, "use_compilation_cache", lambda _: None)
    assert main(["train", "small", "--strategy", "expert-fsdp", "--out", str(tmp_path)]) == 0
    assert laid == ["expert=16,fsdp=-1"]
    assert main(["train", "small", "--strategy", "expert-tensor", "--out", str(tmp_path)]) == 2
    assert "is for inference" in capsys.readouterr().err and len(laid) == 1
