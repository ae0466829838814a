"""`dsv4` and `dsv4 info` at the command line."""

from pathlib import Path

import pytest

from dsv4_jax.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "public" / "pub_a"


@pytest.mark.parametrize("model", ["nano", str(FIXTURE), str(FIXTURE / "config.json")])
def test_info_takes_a_preset_a_folder_or_a_file(model, capsys):
    assert main(["info", model]) == 0
    assert "routed experts" in capsys.readouterr().out


def test_info_shows_the_articles_plan_on_request(capsys):
    assert main(["info", "v4-pro", "--csa-per-hca", "3"]) == 0
    assert "10 x (CSA/4, CSA/4, HCA/128)" in capsys.readouterr().out


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
