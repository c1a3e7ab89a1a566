"""Working notebooks are kept without outputs; that they run is tested by nbmake."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs_and_short_cells(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert cell.source.count("\n") < 15, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_lets_the_reader_choose_the_model(path: Path):
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert any('MODEL = os.environ.get("LLAMA4LAB_MODEL", "tiny")' in source for source in sources)


def test_there_are_notebooks():
    assert NOTEBOOKS
