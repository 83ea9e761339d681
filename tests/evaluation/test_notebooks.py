"""The notebooks run headless from start to end, on any model folder, by changing one path."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_inspection import thinking

HERE = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((HERE / "eval" / "notebooks").glob("*.ipynb"))
PATH = 'MODEL = Path("../../runs/ml-100k/model/aligned")'


def run_notebook(path: Path, model: Path) -> str:
    """Every output of a notebook for a model, as text and HTML; the notebook stays as it is."""
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[1].source.count(PATH) == 1
    notebook.cells[1].source = notebook.cells[1].source.replace(
        PATH, f"MODEL = Path({str(model)!r})"
    )
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/html", "") for output in outputs
    )


@pytest.fixture(scope="module")
def tiny(prepared_run: Path, saved_model: Path, tmp_path_factory) -> Path:
    """A run with an aligned model and one that thinks."""
    run = Path(shutil.copytree(prepared_run, tmp_path_factory.mktemp("notebooks") / "tiny"))
    shutil.copytree(saved_model, run / "model" / "aligned")
    thinking(saved_model, run / "model" / "activated")
    return run


def test_they_are_kept_without_outputs() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3"]
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        nbformat.validate(nbformat.from_dict(notebook))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
        assert all(len("".join(cell["source"]).splitlines()) <= 15 for cell in code)


def test_catalogue_and_sids(tiny: Path) -> None:
    shown = run_notebook(NOTEBOOKS[0], tiny / "model" / "aligned")
    assert "30 items, 4 × 4 × 4 codes" in shown and shown.count("<svg") == 2
    assert "What level a means" in shown and "items begin with" in shown


def test_traces_of_a_model_that_thinks_and_one_that_does_not(tiny: Path) -> None:
    shown = run_notebook(NOTEBOOKS[1], tiny / "model" / "activated")
    assert 'class="trace"' in shown and "<rt>" in shown and 'class="tree"' in shown
    assert "came in" in shown or "stays" in shown
    plain = run_notebook(NOTEBOOKS[1], tiny / "model" / "aligned")
    assert "has not learnt to think" in plain and 'class="tree"' in plain
    assert 'class="trace"' not in plain and "nothing to change" in plain
    assert len(re.findall("Film [0-9]+", plain)) > 20


def test_results_of_a_run_that_was_not_measured(tiny: Path) -> None:
    shown = run_notebook(NOTEBOOKS[2], tiny / "model" / "aligned")
    assert "no results" in shown and "no figures with thinking" in shown


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_on_the_released_checkpoint(notebook: Path, released_run: Path) -> None:
    shown = run_notebook(notebook, released_run / "model" / "aligned")
    assert "<table" in shown
