"""Every training command in the guides is one that the program takes: `--show` resolves and checks its recipe."""

import re
import shlex
from pathlib import Path

import pytest

from dsv4_jax.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """The arguments of each `dsv4 train ..` in a code block, with a folder for the run to begin from."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4})?(dsv4 train .+)$", text, re.MULTILINE):
            line = re.sub(r"--from \S+", f"--from {ROOT / 'tests'}", line)
            found.append(pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.stem}: {line[11:60]}"))
    return found


@pytest.mark.parametrize("arguments", commands())
def test_a_documented_training_command_is_taken(arguments, capsys):
    assert main([*arguments, "--show"]) == 0, capsys.readouterr().err
