"""`dsv4` and `dsv4 info` at the command line."""

from pathlib import Path

import pytest

from dsv4_jax.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "public" / "pub_a"


@pytest.mark.parametrize("model", ["nano", str(FIXTURE), str(FIXTURE / "config.json")])
def test_info_takes_a_preset_a_folder_or_a_file(model, capsys):
    assert main(["info", model]) == 0
    assert "routed experts" in capsys.readouterr().out


def test_info_takes_the_checkpoints_of_a_run_but_no_folder_inside_a_model(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text((FIXTURE / "config.json").read_text())
    assert main(["info", str(tmp_path / "checkpoints")]) == 2
    (tmp_path / "recipe.json").touch()
    assert main(["info", str(tmp_path / "checkpoints")]) == 0
    assert "routed experts" in capsys.readouterr().out


def test_info_shows_the_articles_plan_on_request(capsys):
    assert main(["info", "v4-pro", "--csa-per-hca", "3"]) == 0
    assert "10 x (CSA/4, CSA/4, HCA/128)" in capsys.readouterr().out


def test_info_says_what_agents_over_one_document_weigh(capsys):
    assert main(["info", "v4-pro", "--context", "1M", "--agents", "10", "100"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    # 643,033 bytes per block of 128 tokens, 8,192 of them; 4.6 MB of windows and 18.7 MB of tails.
    assert "5.27 GB of blocks once, 23.3 MB of state per agent" in out
    assert "5.5 GB" in out and "52.9 GB" in out and "7.6 GB" in out and "529 GB" in out
    assert main(["info", "v4-pro", "--context", "0"]) == 2
    assert "'0' is no number of tokens" in capsys.readouterr().err


def test_help_lists_commands_and_examples(capsys):
    assert main(["--help"]) == 0
    assert "dsv4 info v4-pro" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["info", "--help"])
    assert exit_.value.code == 0 and "dsv4 info nano" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["inf"], "perhaps you meant 'info'"), (["info", "v4-por"], "perhaps you meant 'v4-pro'")],
)
def test_a_mistyped_request_is_answered_in_a_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
