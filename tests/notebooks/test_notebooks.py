"""The notebooks run from the first cell to the last in a fresh kernel, on this checkout; outputs are not stored."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WHERE = "import dsv4_jax\n\nprint(dsv4_jax.__file__)"


NAMES = {"audit", "inside", "long_context", "plan", "pretrain", "sharding"}
QUICK = {"plan"}  # seconds; the others compile a lot
SHOWN = re.compile(r"\bplt\.show\(\)|\bImage\(")  # what a cell shows as a picture


def in_its_suite(path):
    return pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return [out for out in cell.outputs if "image/png" in out.get("data", {})]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in code(notebook))
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_says_what_to_do_where_the_package_is_missing(path):
    first = code(nbformat.read(path, as_version=4))[0].source
    exec(first, {})  # says nothing here
    with pytest.raises(ModuleNotFoundError, match=r"see Install in README\.md"):
        exec(first.replace("dsv4_jax", "no_such_package"), {})


@pytest.mark.parametrize("path", [in_its_suite(path) for path in NOTEBOOKS])
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()  # raises at the first cell with an error

    *cells, where = code(notebook)
    assert where.outputs[0].text.strip() == str(ROOT / "dsv4_jax" / "__init__.py")
    assert all(cell.execution_count for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert not code(notebook)[0].outputs
    for cell in cells:
        assert len(pictures(cell)) == len(SHOWN.findall(cell.source)), cell.source
    assert sum(len(pictures(cell)) for cell in cells) >= 4
