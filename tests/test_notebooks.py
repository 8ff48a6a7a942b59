"""The notebooks run from top to bottom; the studies' on the records in the repository, or on a run of one's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["01_tweeteval", "02_lima", "03_kernels"])
def test_notebook_runs(name, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}  # where Jupyter starts it
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert pictures >= max(1, sum("plt.show()" in cell.source for cell in notebook.cells))
