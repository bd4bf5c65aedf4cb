"""The notebook of the documentation: it runs, and the one that is kept is the one that is made."""

import pathlib
import runpy

import nbformat
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NAMES = runpy.run_path(str(DOCS / "make_notebook.py"))


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_the_kept_notebook_is_the_one_that_the_script_makes_and_has_its_pictures():
    kept, made = nbformat.read(DOCS / "first_steps.ipynb", as_version=4), NAMES["make"]()
    assert [cell.source for cell in kept.cells] == [cell.source for cell in made.cells]
    assert sum("image/png" in output.get("data", {}) for output in outputs(kept)) == 2
    text = (DOCS / "first_steps.ipynb").read_text()
    assert len(text) < 300_000 and "/tmp" not in text and "/home" not in text
    assert "INFO" not in text


@pytest.mark.process
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    ran = NAMES["run"](NAMES["make"](steps=4))
    text = "".join(output.get("text", "") for output in outputs(ran))
    assert "pretrain goes on from step 4 to 6" in text
    assert "error" not in {output.output_type for output in outputs(ran)}
