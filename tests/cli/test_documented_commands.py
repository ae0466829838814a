"""Every training command in the guides is one that the program takes, and its mesh fits its model and batches."""

import json
import math
import re
import shlex
import textwrap
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from dsv4_jax import weights
from dsv4_jax.cli import main
from sharding.mesh import AXES, parse_mesh
from sharding.rules import check_fit, find_strategy
from train.recipe import find_recipe

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


def recipe_files():
    """The recipe files that the guides show: indented JSON with a "base", by the name that it gives the run."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = map(textwrap.dedent, re.findall(r"^ {4}\{\n(?: {4}.*\n)+", text, re.MULTILINE))
    return {json.loads(block)["name"]: block for block in shown if '"base"' in block}


@pytest.mark.parametrize("arguments", commands())
def test_a_documented_training_command_is_taken(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in recipe_files().items():
        (tmp_path / f"{name}.json").write_text(text)
    assert main([*arguments, "--show"]) == 0, capsys.readouterr().err


def values(arguments, name):
    return [value for flag, value in zip(arguments, arguments[1:], strict=False) if flag == name]


@pytest.mark.parametrize("arguments", [case for case in commands() if "--mesh" in case.values[0]])
def test_the_mesh_of_a_documented_command_fits(arguments):
    [mesh] = values(arguments, "--mesh")
    sizes = parse_mesh(mesh, math.prod(int(part.split("=")[1]) for part in mesh.split(",")))
    devices = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    recipe = find_recipe(arguments[1], values(arguments, "--set"))
    strategy = find_strategy(*values(arguments, "--strategy"))
    config = recipe.check()
    shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    for stage in recipe.stages:
        rows = stage.batch_size // stage.microbatches
        check_fit(weights.facts(config), shapes, strategy, devices, rows, stage.sequence_length)
