"""Reports from records alone: tables, plots and the HTML page of a run whose numbers are invented."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import INVENTED, make_run

from quantlab import cli
from quantlab.experiments.record import RecordError, Run
from quantlab.report import build_report, figure, numbers, plots, published, tables
from quantlab.report.records import COLOURS, title
from quantlab.report.study import load_study

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "01_tweeteval.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("study") / "run", failed="gptq-3")


@pytest.fixture(scope="module")
def report(run):
    return build_report(run)


@pytest.fixture(scope="module")
def study(run):
    return load_study(run)


class Page(HTMLParser):
    """What a test asks of a page: its tags with their attributes, and whether every tag is closed."""

    VOID = frozenset(("meta", "br", "img", "link", "hr", "input"))

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def test_report_writes_every_file(run, report):
    for name in ("report.html", "report.md", "variants.csv", "classes.csv"):
        assert report[name].stat().st_size > 200
    for name in plots.PLOTS:
        assert (run / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(run.rglob("*.tmp"))


def test_page_is_self_contained(report):
    text = report["report.html"].read_text()
    page = Page(text)
    assert page.open == []
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), f"{tag} {name}={target}"
    assert not re.search(r"url\((?!#)", text)
    assert len(text) < 2_000_000


def test_page_draws_with_its_own_colours_and_ids(report):
    text = report["report.html"].read_text()
    assert text.count("<svg") == len(plots.PLOTS)
    body = text.partition("</style>")[2]
    assert figure.INK not in body and "var(--ink)" in body
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips))


def test_page_tells_what_failed_with_its_error_escaped(report):
    text = report["report.html"].read_text()
    assert "GPTQ 3-bit failed: ArithmeticError: layer 3: the Hessian is not finite &lt;&amp;&gt;" in text
    assert "Hessian is not finite" in report["report.md"].read_text()


def test_every_number_has_n_interval_and_unit(study):
    quality, cost = tables.quality(study), tables.cost(study)
    assert "n = 120 test tweets" in quality.caption and "95 %" in quality.caption and "McNemar" in quality.caption
    fp32 = quality.rows[0]
    assert fp32[0] == "fp32" and re.fullmatch(r"\d+\.\d \(\d+\.\d\u2013\d+\.\d\)", fp32[1])
    assert all(re.search(r", (%|points|MB|s|ms|J|g)|Variant|by|p |Perplexity", heading) for heading in cost.columns)
    assert "estimate" in cost.caption and "174.05" in cost.caption


def test_csv_holds_plain_numbers(report, study):
    with open(report["variants.csv"], newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == [name for name in INVENTED if name != "gptq-3"]
    for name, row in rows.items():
        assert float(row["accuracy"]) == study.value(name, "accuracy")
        assert float(row["accuracy_low95"]) < float(row["accuracy"]) < float(row["accuracy_high95"])
        assert float(row["size_checkpoint_B"]) == INVENTED[name][1] * 1e6
    assert rows["fp32"]["mcnemar_mid_p"] == "" and float(rows["nf4"]["mcnemar_mid_p"]) <= 1


def test_published_figures_are_marked_and_compared_with_their_own_base(report, study):
    table = tables.beside_published(study)
    row = next(row for row in table.rows if row[0] == "GPTQ 4-bit")
    assert row[1:5] == ["0.21x", "0.14x", numbers.times(study.relative("gptq-4", "ms_per_tweet")), "3.15x"]
    assert row[6] == "-0.79 %"
    for word in ("A100", "Llama-2-7B", "12,284", "Ours differ"):
        assert word in table.caption
    text = report["report.html"].read_text()
    assert "The published figures as printed (theirs)" in text and "12,974.85" in text
    assert published.relative("gptq-4", "evaluation_kg") == pytest.approx(0.040202 / 0.013502)


def test_comparisons_are_paired(study):
    found = study.comparisons["gptq-4"]
    base, other = study.variants["fp32"], study.variants["gptq-4"]
    right = [[p == t for p, t in zip(cell["predictions"], cell["truth"], strict=True)] for cell in (base, other)]
    assert found["base_only"] == sum(a and not b for a, b in zip(*right, strict=True))
    assert found["difference"] == pytest.approx(
        other["metrics"]["accuracy"]["value"] - base["metrics"]["accuracy"]["value"]
    )


def test_a_current_report_is_left_alone(run, report):
    page = report["report.html"]
    before = page.stat().st_mtime_ns
    assert build_report(run, force=False) == report and page.stat().st_mtime_ns == before
    later = page.stat().st_mtime + 10
    os.utime(next((run / "cells").glob("nf4*.json")), (later, later))
    build_report(run, force=False)
    assert page.stat().st_mtime_ns > before


def test_titles_and_colours():
    names = ("fp32", "gptq-4", "gptq-4-r", "nf4-dq", "rtn-3", "int8")
    assert [title(name) for name in names] == [
        "fp32", "GPTQ 4-bit", "GPTQ 4-bit recommended", "NF4 double quant", "RTN 3-bit", "int8"
    ]  # fmt: skip
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_significant_digits():
    values = {
        0.0: "0",
        1234.5: "1,234",
        38.04: "38.0",
        0.01234: "0.0123",
        9.999: "10.0",
        1.2e-7: "1.20e-07",
        None: "\u2013",
    }
    assert {value: numbers.significant(value) for value in values} == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run directory"),
        ("{", "not a readable JSON record"),
        ("[]", "expected a JSON object"),
        (json.dumps({"experiment": "poems", "config": {}}), "a run of 'poems'"),
        (json.dumps({"experiment": "tweeteval", "config": {"variants": ["fp32"]}}), "no finished variant"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RecordError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cells/nf4-*.json", lambda raw: raw[: len(raw) // 2], r"line 11 column \d+"),
        ("cells/nf4-*.json", lambda raw: b"", "line 1 column 1"),
        ("cells/nf4-*.json", lambda raw: b"\xff" + raw, "can't decode byte 0xff"),
        ("cells/nf4-*.json", lambda raw: b"[]", "got list"),
        ("cells/nf4-*.json", lambda raw: raw.replace(b'"metrics"', b'"m"'), "its field metrics is nothing"),
        ("config.json", lambda raw: raw[:-9], r"line \d+ column"),
        ("config.json", lambda raw: raw.replace(b'"config"', b'"c"'), "its field config is NoneType"),
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(capsys, run, tmp_path, name, change, message):
    path = next(Path(shutil.copytree(run, tmp_path / "run")).glob(name))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RecordError, match=rf"^{re.escape(str(path))}: .*{message}.*; delete it and run the"):
        build_report(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 1 and str(path) in capsys.readouterr().err


def test_what_is_said_of_a_run_that_was_interrupted_at_once(tmp_path):
    def work(cell):
        raise KeyboardInterrupt

    with Run(tmp_path, "tweeteval", {"variants": ["fp32"]}) as opened, pytest.raises(KeyboardInterrupt):
        opened.cell("fp32", {}, work)
    with pytest.raises(RecordError, match=r"no finished variant to report \(fp32: interrupted\)"):
        build_report(tmp_path)


def test_notebook_runs_on_a_small_run(run):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    book = nbformat.read(NOTEBOOK, as_version=4)
    os.environ["QUANTLAB_RUN"] = str(run)
    try:
        client.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    finally:
        del os.environ["QUANTLAB_RUN"]
    images = [
        output for cell in book.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) >= 5
