"""What a long job says where standard error is no terminal: few lines, with rate and time left."""

from __future__ import annotations

import quantlab.progress
from quantlab.progress import progress


def said(monkeypatch, capsys, seconds: float, **options: bool) -> list[str]:
    """The lines of a job of 400 units, each of so many seconds."""
    now = 0.0
    monkeypatch.setattr(quantlab.progress.time, "monotonic", lambda: now)
    with progress(400, "GPTQ", "matrix", **options) as bar:
        for _ in range(400):
            now += seconds
            bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_short_job_is_silent(monkeypatch, capsys):
    assert said(monkeypatch, capsys, 9.9 / 400) == []


def test_a_long_job_tells_rate_and_time_left_now_and_then(monkeypatch, capsys):
    lines = said(monkeypatch, capsys, 1.0)
    assert lines[0] == "GPTQ: 11 of 400, 1 matrix/s, 389 s left"
    done = [int(line.split()[1]) for line in lines]
    assert done == [11, 23, 47, 95, 156, 217, 278, 339, 400]


def test_who_asks_for_no_progress_gets_none(monkeypatch, capsys):
    assert said(monkeypatch, capsys, 1.0, enabled=False) == []
