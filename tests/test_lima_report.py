"""The report of the LIMA study: tables, plots and the page of a run whose numbers are invented."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
from synthetic_lima import INVENTED, make_lima_run
from test_report import Page

from quantlab.experiments.lima_data import QUESTIONS
from quantlab.experiments.record import RecordError
from quantlab.report import build_report, figure, lima_plots, lima_published, lima_tables
from quantlab.report.kinds import load_report
from quantlab.report.lima import load_lima
from quantlab.report.table import document

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "02_lima.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_lima_run(tmp_path_factory.mktemp("study") / "run")


@pytest.fixture(scope="module")
def report(run):
    return build_report(run)


@pytest.fixture(scope="module")
def study(run):
    return load_lima(run)


def test_report_writes_every_file(run, report):
    for name in ("report.html", "report.md", "baselines.csv", "training.csv"):
        assert report[name].stat().st_size > 200
    for name in lima_plots.PLOTS:
        assert (run / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_page_is_self_contained(report):
    text = report["report.html"].read_text()
    page = Page(text)
    assert page.open == [] and text.count("<svg") == len(lima_plots.PLOTS)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    body = text.partition("</style>")[2]
    assert figure.INK not in body and "var(--ink)" in body
    assert all(question in text for question in QUESTIONS) and "bnb-gptq says &lt;so&gt; &amp; so" in text
    assert "The published figures as printed (theirs)" in text and "6.065" in text
    assert "NF4 \u2192 NF4: the held-out loss falls by tuning: -0." in text
    assert "The adapter of NF4, merged into its base and quantized again as it was: +0." in text


def test_titles_name_what_the_parts_stand_for(study):
    assert [study.title(name) for name in INVENTED] == [
        "bf16, untuned", "bf16 \u2192 bf16", "NF4 \u2192 NF4", "GPTQ 4-bit \u2192 GPTQ 4-bit", "NF4 \u2192 GPTQ 4-bit",
        "GPTQ 4-bit \u2192 NF4",
    ]  # fmt: skip
    assert study.title("tune-bnb") == "tuning over NF4" and study.title("infer-fp16") == "inference bf16, untuned"
    assert len({study.colour(name) for name in INVENTED}) == len(INVENTED)


def test_quality_has_n_intervals_and_paired_changes(study):
    table = lima_tables.quality(study)
    assert "n = 20 held-out conversations" in table.caption and "95 %" in table.caption
    number = r"\d\.\d{3} \(\d\.\d{3}\u2013\d\.\d{3}\)"
    assert all(re.fullmatch(number, row[1]) for row in table.rows)
    assert table.rows[0][4] == "\u2013" and re.fullmatch(r"-0\.\d{3} \(-0\.\d{3} to -0\.\d{3}\)", table.rows[2][4])
    low, high = study.loss("infer-bnb-bnb")[1]
    change = study.difference("infer-bnb-bnb", "base-bnb")
    assert change[1][1] - change[1][0] < 0.2 * (high - low)  # paired: what conversations share falls out


def test_merging_is_against_the_adapter_beside_its_base(study):
    table = lima_tables.merging(study)
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == {"bf16", "NF4", "GPTQ 4-bit"}
    assert rows["bf16"][3:] == ["\u2013"] * 3
    assert rows["NF4"][3].startswith("+0.0") and rows["NF4"][5].startswith("GPTQ 4-bit: +0.0")


def test_generation_and_training_have_units(study):
    generation, training = lima_tables.generation(study), lima_tables.training(study)
    assert generation.columns[1:3] == ["Batch 1, s", "Batch 2, s"] and "median of 5" in generation.caption
    assert generation.rows[0][7] == lima_tables.times(lima_tables.relative(study, "fp16", 32, "fp16", 1))
    assert all(re.search(r", (s|MB|nat)|Tuned over|/s|CO2e", heading) for heading in training.columns)
    assert "n = 180 conversations, 180 steps of 1" in training.caption


def test_a_machine_that_did_other_work_is_told(run, study):
    assert "other work" not in lima_tables.training(study).caption  # no processor time was recorded
    crowded = load_lima(run)
    timings = crowded.cells["tune-bnb"]["timings"]
    crowded.cells["tune-bnb"]["env"]["threads"] = 2
    timings["training"] = {"mean": 100.0, "cpu_s": 50.0}
    assert "too long: tuning over NF4 (25 %) of the processors" in lima_tables.training(crowded).caption
    assert lima_tables.training_ratio(crowded, "gptq") is None and lima_tables.training_ratio(study, "gptq") == 0.95
    timings["training"]["cpu_s"] = 190.0
    assert "other work" not in lima_tables.training(crowded).caption


def test_published_figures_are_relative_to_their_own(study):
    table = lima_tables.beside_published(study)
    rows = {row[0]: row for row in table.rows}
    assert rows["NF4 \u2192 NF4"][2] == "4.91x" and rows["GPTQ 4-bit \u2192 GPTQ 4-bit"][4] == "0.34x"
    assert rows["GPTQ 4-bit \u2192 GPTQ 4-bit"][5:] == ["0.95x", "0.67x"]
    assert "GPU not stated" in table.caption
    printed = lima_tables.as_published()
    assert printed.rows[-1][1:] == ["\u2013"] * 6 + ["1.45"]
    assert lima_published.GENERATION["bnb-gptq"][0] == 1.155


def test_csv_holds_plain_numbers(report, study):
    with open(report["baselines.csv"], newline="") as file:
        rows = {row["baseline"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(INVENTED)
    for name, row in rows.items():
        assert float(row["generate_32_s"]) == study.value(f"infer-{name}", "generate_32")
        assert float(row["eval_loss_low95"]) < float(row["eval_loss_nat"]) < float(row["eval_loss_high95"])
    with open(report["training.csv"], newline="") as file:
        assert [row["base"] for row in csv.DictReader(file)] == ["fp16", "bnb", "gptq"]


@pytest.mark.parametrize("failed", ["base-bnb", "tune-gptq", "merge-bnb", "infer-bnb-bnb"])
def test_what_failed_is_told_and_the_rest_reported(tmp_path, failed):
    found = load_report(make_lima_run(tmp_path / "run", failed=failed))
    assert "failed: ArithmeticError: the held-out loss is nan &lt;&amp;&gt;" in found.page(found.study, {})
    assert "Not finished" in document(found.study, found.heading, found.tables)


@pytest.mark.parametrize(
    "changes", [{"baselines": ("fp16",)}, {"baselines": ("bnb-bnb",), "batches": (2,)}, {"fp16": "fp16", "bnb": "fp4"}]
)
def test_small_runs_are_reported(tmp_path, changes):
    found = load_report(make_lima_run(tmp_path / "run", **changes))
    assert len(found.csv["baselines"]) == len(changes.get("baselines", INVENTED))
    figures = found.draw(found.study)
    assert {"generation", "rate", "quality_by_speed"} <= set(figures) <= set(lima_plots.PLOTS)
    assert Page(found.page(found.study, figures)).open == []


def test_a_run_without_a_baseline_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "lima", "config": {"baselines": ["bnb-bnb"]}}))
    with pytest.raises(RecordError, match="no finished baseline"):
        build_report(tmp_path)


def test_notebook_runs_on_a_small_run(run, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("QUANTLAB_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parent.parent), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    images = [out for cell in book.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(images) >= 7
