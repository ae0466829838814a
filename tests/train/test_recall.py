"""What the recipe `recall` promises: minutes on two cores, so only `make slow` runs it."""

import pytest

from train.ablation import variants
from train.loop import train, use_compilation_cache
from train.recipe import find_recipe


@pytest.mark.slow
def test_the_recall_recipe_answers_beyond_every_window_and_sliding_windows_do_not(tmp_path):
    use_compilation_cache()
    recipe = find_recipe("recall")
    summary = train(recipe, tmp_path / "recall")
    assert summary["task_far"] > 0.9 and summary["task_worst_phase"] > 0.8
    assert (tmp_path / "recall" / "task.png").stat().st_size > 10_000
    sliding = train(variants(recipe)["sliding-only"].change(recipe), tmp_path / "sliding")
    assert sliding["task_far"] < 0.45  # chance is 25%
