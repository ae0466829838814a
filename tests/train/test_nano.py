"""What `make train` promises, whole: minutes on two cores, so only `make slow` runs it."""

import pytest

from train.loop import train, use_compilation_cache
from train.recipe import find_recipe


@pytest.mark.slow
def test_the_nano_recipe_compresses_held_out_text_better_than_xz(tmp_path):
    use_compilation_cache()
    summary = train(find_recipe("nano"), tmp_path / "nano")
    assert summary["heldout_bpb"] < summary["xz_bpb"]
    assert (tmp_path / "nano" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "nano" / "retrieval.png").stat().st_size > 10_000
