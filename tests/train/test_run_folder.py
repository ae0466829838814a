"""A folder belongs to one run; only a run that began and did nothing makes room for another."""

import json

import pytest

from train.data.tasks.rows import TaskSource
from train.recipe import RecipeError, find_recipe
from train.run_folder import RunFolder

RECIPE, OTHER = find_recipe("recall"), find_recipe("recall", ["learning_rate.peak=0.5"])


@pytest.fixture
def begun(tmp_path):
    """A run that wrote what it was asked for."""
    folder = RunFolder(tmp_path / "run")
    assert not folder.check(RECIPE)
    folder.begin(RECIPE, RECIPE.check())
    folder.bind_data(TaskSource("recall", True))
    return folder


def test_a_run_that_did_nothing_is_replaced(begun):
    begun.metrics.touch()
    begun.checkpoints.mkdir()
    (begun.root / "notes.txt").write_text("of mine")
    assert not begun.check(OTHER)
    begun.begin(OTHER, OTHER.check())
    begun.bind_data(TaskSource("another", True))  # not taken for data that changed
    assert json.loads(begun.recipe.read_text())["learning_rate"]["peak"] == 0.5
    assert "another" in begun.manifest.read_text() and (begun.root / "notes.txt").exists()


def logged(folder):
    folder.metrics.write_text('{"step": 1}\n')


def saved(folder):
    (folder.checkpoints / "1").mkdir(parents=True)


def unknown(folder):
    folder.manifest.unlink()  # a recipe.json that somebody put there


@pytest.mark.parametrize("did", [logged, saved, unknown])
def test_a_run_that_did_something_is_not(begun, did):
    did(begun)
    assert begun.check(RECIPE)
    with pytest.raises(RecipeError, match="learning_rate.peak: was .*, is 0.5"):
        begun.check(OTHER)
