"""The bar of a long job: silent off a terminal; what an earlier run has done is not of this run's rate."""

from __future__ import annotations

import sys

import quantlab.progress
from quantlab.progress import progress


def test_silent_off_a_terminal(monkeypatch, capsys):
    now = 0.0
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # a notebook shows it
    monkeypatch.setattr(quantlab.progress.time, "monotonic", lambda: now)
    with progress(400, "GPTQ", "matrix") as bar:
        for _ in range(400):
            now += 1.0
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_rate_is_that_of_this_run(monkeypatch):
    shown = []
    now = 0.0
    monkeypatch.setattr(quantlab.progress.time, "monotonic", lambda: now)
    with progress(400, "GPTQ", "matrix") as bar:
        monkeypatch.setattr(bar, "_enabled", True)
        monkeypatch.setattr("rich.progress.Progress.update", lambda self, task, **what: shown.append(what))
        bar.skip(300)
        now = 50.0
        bar.advance()
    assert shown == [{"completed": 301, "rate": "0.02 matrix/s", "note": ""}]
