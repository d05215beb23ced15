"""The notebook runs from its first cell to its last, and is stored without what it printed somewhere."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(EXAMPLES / "tutorial.ipynb", as_version=4)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_forgets(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": EXAMPLES}}).execute()
    said = [o.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any(text.startswith("forgotten\n1 target forgotten") for text in said), said
