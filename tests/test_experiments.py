"""Run directories and the TweetEval study: a tiny random model through every stage, stopped, failed, resumed."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_tiny

from quantlab.experiments import data, energy, record, tweeteval
from quantlab.experiments.record import RecordError, Run, read_cells, read_json, read_log
from quantlab.experiments.tweeteval import TweetEvalConfig, preset
from quantlab.experiments.variants import parse_variant

WORDS = {0: "bad sad awful", 1: "table chair road", 2: "good glad lovely"}
VARIANTS = ("fp32", "bf16", "gptq-4", "gptq-3-r", "nf4", "int8", "rtn-4")


def write_tiny(root: Path) -> dict[str, str]:
    """A tiny random model and a tiny labelled data set in TweetEval's layout, as configuration fields."""
    random = np.random.default_rng(0)
    folder = root / "data" / "sentiment"
    folder.mkdir(parents=True)
    (folder / "mapping.txt").write_text("0\tnegative\n1\tneutral\n2\tpositive\n")
    for split, n in (("train", 48), ("val", 18), ("test", 30)):
        labels = random.integers(0, 3, n)
        texts = [" ".join(random.permutation(WORDS[int(label)].split())) for label in labels]
        (folder / f"{split}_text.txt").write_text("\n".join(texts) + "\n")
        (folder / f"{split}_labels.txt").write_text("\n".join(map(str, labels)) + "\n")
    return {"model": str(save_tiny(root / "model")), "data_root": str(root / "data")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def settings(tiny: dict[str, str], **changes) -> TweetEvalConfig:
    small = {
        "task": "sentiment", "variants": VARIANTS, "group_size": 16, "calibration_rows": 4, "calibration_length": 32,
        "epochs": 3, "timing_tweets": 4, "timing_repeats": 2, "perplexity_context": 32, "perplexity_tokens": 128,
        "energy": False,
    }  # fmt: skip
    return preset("corrected", **{**tiny, **small, **changes})


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The run directory of a whole study, with energy measured."""
    path = tmp_path_factory.mktemp("run") / "run"
    outcome = tweeteval.run(settings(tiny, energy=True), path, progress=False)
    assert outcome.failed == [] and outcome.worked == len(VARIANTS) + 1
    return path


# ---- the whole study ---------------------------------------------------------------------------------------------


def test_every_cell_has_the_agreed_fields(finished):
    cells = {cell["name"]: cell for cell in read_cells(finished)}
    assert set(cells) == {"head", *VARIANTS}
    fields = {"schema", "cell_id", "experiment", "config", "status", "metrics", "timings", "memory", "energy", "env"}
    for cell in cells.values():
        assert fields | {"seeds", "data", "started", "duration_s"} <= set(cell)
        assert cell["status"] == "done" and cell["duration_s"] > 0
        for metric in cell["metrics"].values():
            assert {"value", "stderr", "ci95", "n", "unit", "higher_is_better"} <= set(metric)
        for timing in cell["timings"].values():
            assert {"values", "unit", "mean", "p50", "p90", "p95", "p99", "stdev"} <= set(timing)
        assert cell["env"]["cpu"] and cell["env"]["quantlab"] and cell["env"]["python"]


def test_variants_are_measured_on_the_same_examples(finished):
    cells = {cell["name"]: cell for cell in read_cells(finished)}
    for name in VARIANTS:
        cell = cells[name]
        assert cell["data"] == cells["fp32"]["data"] and len(cell["predictions"]) == cell["data"]["n"] == 30
        assert np.sum(cell["classification"]["confusion"]) == 30
        low, high = cell["metrics"]["accuracy"]["ci95"]
        assert low <= cell["metrics"]["accuracy"]["value"] <= high
        assert cell["metrics"]["perplexity"]["value"] > 1
        assert cell["timings"]["tweet"]["n"] == 2 and cell["metrics"]["ms_per_tweet"]["value"] > 0
        assert ("quantization" in cell["timings"]) == (name not in ("fp32", "bf16"))
        assert cell["energy"]["evaluation"]["method"]
    size = {name: cells[name]["metrics"]["size_checkpoint"]["value"] for name in VARIANTS}
    assert size["fp32"] > size["bf16"] > size["int8"] > size["gptq-4"] > size["gptq-3-r"]
    assert cells["fp32"]["predictions"] == cells["bf16"]["predictions"]
    assert not (finished / "work").exists() or not list((finished / "work").iterdir())


def test_head_is_saved_with_its_loss_history(finished):
    head = next(cell for cell in read_cells(finished) if cell["name"] == "head")
    assert {"step", "epoch", "train_loss", "eval_loss", "eval_accuracy"} <= set(head["history"][0])
    assert (finished / head["head_file"]).exists()
    steps = [event for event in read_log(finished) if event["event"] == "step"]
    assert [event["train_loss"] for event in steps] == [row["train_loss"] for row in head["history"]]


def test_energy_is_one_csv_a_phase_in_codecarbons_columns(finished):
    names = {path.name for path in (finished / "emissions").glob("*.csv")}
    assert {"head_training.csv", "fp32_evaluation.csv", "gptq-4_quantization.csv", "nf4_quantization.csv"} <= names
    with open(finished / "emissions" / "gptq-4_evaluation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert {"duration", "emissions", "cpu_energy", "ram_energy", "energy_consumed", "country_iso_code"} <= set(row)
    cell = next(cell for cell in read_cells(finished) if cell["name"] == "gptq-4")
    assert float(row["emissions"]) == cell["energy"]["evaluation"]["kg"]
    assert cell["energy"]["evaluation"]["intensity_g_kwh"] == pytest.approx(174.05)


def test_a_country_without_a_carbon_intensity_is_refused(tiny, tmp_path):
    """codecarbon would count with the world's mean, and the report would give it as that country's."""
    with pytest.raises(ValueError, match="country: got 'SPA', which codecarbon has no carbon intensity of"):
        tweeteval.run(settings(tiny, energy=True, country="SPA"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_finished_cells_are_skipped(tiny, finished):
    before = {path.name: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}
    told = []
    outcome = tweeteval.run(settings(tiny, energy=True), finished, on_cell=lambda *event: told.append(event))
    assert outcome.worked == 0 and set(told) == {(name, "skipped") for name in ("head", *VARIANTS)}
    assert before == {path.name: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}


def test_a_dry_run_foresees_the_cells_and_their_sizes(tiny, finished, tmp_path, monkeypatch):
    found = tweeteval.foresee(settings(tiny, energy=True), finished)
    assert {row["status"] for row in found["cells"]} == {"done"} and found["model"]["here"]
    sizes = {row["cell"]: row["weights"] for row in found["cells"]}
    assert sizes.pop("head") is None
    for cell in read_cells(finished):
        if cell["name"] in sizes:  # a tiny model: what stands beside every matrix counts
            assert sizes[cell["name"]] == pytest.approx(cell["metrics"]["size_checkpoint"]["value"], rel=0.06)
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path))  # without the demo's model
    missing = tweeteval.foresee(settings({**tiny, "model": "demo"}), tmp_path / "run")
    assert missing["model"] == {"source": "demo", "bytes": 98362432, "here": False}
    assert {row["weights"] for row in missing["cells"]} == {None} and not (tmp_path / "run").exists()


def test_a_finished_study_loads_nothing_heavy(tiny, finished):
    code = (
        "import sys\nfrom quantlab.experiments import tweeteval\n"
        "config = tweeteval.TweetEvalConfig.from_file(sys.argv[1] + '/config.json')\n"
        "assert tweeteval.run(config, sys.argv[1]).worked == 0\n"
        "heavy = {'torch', 'codecarbon', 'sklearn', 'matplotlib', 'pandas', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, timeout=60)


def test_variants_may_be_added_to_a_run(tiny, tmp_path):
    tweeteval.run(settings(tiny, variants=("fp32",)), tmp_path / "run", progress=False)
    outcome = tweeteval.run(settings(tiny, variants=("nf4",)), tmp_path / "run", progress=False)
    assert outcome.worked == 1 and set(outcome.cells) == {"head", "nf4"}
    assert read_json(tmp_path / "run" / "config.json")["config"]["variants"] == ["fp32", "nf4"]


def test_another_configuration_is_refused(tiny, finished):
    with pytest.raises(RecordError, match=r"another configuration \(epochs: 3 there, 4 asked\)"):
        tweeteval.run(settings(tiny, energy=True, epochs=4), finished)


def test_seed_preset_evaluates_one_tweet_at_a_time(tiny, tmp_path):
    config = preset(
        "seed",
        **tiny,
        task="sentiment",
        variants=("fp32", "gptq-4"),
        group_size=16,
        epochs=1,
        test_limit=6,
        energy=False,
    )
    assert (config.damp_percent, config.calibration_rows, config.calibration_length) == (0.1, 128, 4028)
    outcome = tweeteval.run(config, tmp_path / "run", progress=False)
    cell = outcome.cells["gptq-4"]
    assert cell["timings"]["tweet"]["n"] == 6 and cell["metrics"]["ms_per_tweet"]["n"] == 6
    assert any("c4, which this text replaces" in note for note in cell["notes"])
    assert cell["config"]["variant"]["settings"]["damp_percent"] == 0.1


def test_a_failing_variant_is_recorded_and_run_again(tiny, tmp_path, monkeypatch):
    from quantlab.experiments.stages import Stages

    predict = Stages.predict

    def broken(self, cell, model):
        if cell.name == "nf4":
            raise ArithmeticError("not finite")
        predict(self, cell, model)

    config = settings(tiny, variants=("fp32", "nf4", "int8"))
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "predict", broken)
        outcome = tweeteval.run(config, tmp_path / "run", progress=False)
    assert outcome.failed == ["nf4"] and outcome.cells["int8"]["status"] == "done"
    assert outcome.cells["nf4"]["error"]["type"] == "ArithmeticError"
    assert "not finite" in outcome.cells["nf4"]["error"]["traceback"]
    again = tweeteval.run(config, tmp_path / "run", progress=False)
    assert again.worked == 1 and again.failed == []
    assert again.cells["nf4"]["earlier"][0]["error"]["message"] == "not finite"


def test_a_head_that_fails_stops_the_study(tiny, tmp_path, monkeypatch):
    from quantlab import LlamaForSequenceClassification

    def fail(*_, **__):
        raise ValueError("no labels")

    monkeypatch.setattr(LlamaForSequenceClassification, "fit_head", fail)
    with pytest.raises(tweeteval.StudyError, match="no labels"):
        tweeteval.run(settings(tiny), tmp_path / "run", progress=False)
    assert read_cells(tmp_path / "run")[0]["status"] == "failed"


def comparable(path: Path) -> dict[str, object]:
    """What two runs of one study must share: ids, predictions, quality, sizes, losses."""
    names = ("accuracy", "macro_recall", "macro_f1", "perplexity", "size_checkpoint", "eval_loss")
    return {
        cell["cell_id"]: (
            cell["status"], cell.get("predictions"), cell.get("history"), [cell["metrics"].get(name) for name in names]
        )
        for cell in read_cells(path)
    }  # fmt: skip


def test_a_killed_study_goes_on_to_the_same_cells(tiny, tmp_path):
    """kill -9 at several moments; the last run ends with the cells of a run that was never stopped."""
    config = settings(tiny, variants=("fp32", "gptq-4", "nf4"))
    tweeteval.run(config, tmp_path / "whole", progress=False)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code = (
        "import sys\nfrom quantlab.experiments import tweeteval\n"
        "config = tweeteval.TweetEvalConfig.from_file(sys.argv[1])\n"
        "print('ready', flush=True)\ntweeteval.run(config, sys.argv[2], progress=False)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.json"), str(tmp_path / "killed")]
    for delay in (0.05, 0.3, 0.6, 1.0):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        for file in (tmp_path / "killed").rglob("*.json"):
            read_json(file)  # whole files only
    tweeteval.run(config, tmp_path / "killed", progress=False)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": ("gptq-5",)}, "variant 'gptq-5': accepted are"),
        ({"variants": ("rtn-4-r",)}, "variant 'rtn-4-r'"),
        ({"variants": ()}, "variants: got none"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"test_limit": -1}, "test_limit: got -1"),
        ({"lr": 0}, "lr: got 0"),
        ({"wandb": "yes"}, "wandb: got 'yes'"),
        ({"perplexity_context": 1}, "perplexity_context"),
        ({"colour": 1}, "no field 'colour'"),
        ({"seed": "x"}, "seed: got 'x', expected an integer"),
        ({"one_at_a_time": "false"}, "one_at_a_time: got 'false', expected True or False"),
        ({"epochs": True}, "epochs: got True, expected an integer"),
        ({"lr": float("nan")}, "lr: got nan, expected a finite number"),
        ({"test_limit": 2.5}, "test_limit: got 2.5, expected an integer or None"),
        ({"variants": "fp32"}, "variants: got 'fp32', expected a list, each text"),
        ({"model": 3}, "model: got 3, expected text"),
        ({"preset": "best"}, "preset: got 'best'"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TweetEvalConfig.from_dict(fields)


def test_a_configuration_survives_its_file(tmp_path):
    config = tweeteval.demo_config(variants=("fp32", "gptq-4-r"))
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    assert TweetEvalConfig.from_file(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        TweetEvalConfig.from_file(tmp_path / "config.json")


def test_variant_names():
    assert parse_variant("bf16").dtype == "bfloat16"
    assert parse_variant("gptq-3", 32, damp_percent=0.1).config.to_dict()["damp_percent"] == 0.1
    assert parse_variant("nf4-dq").config.double_quant
    assert parse_variant("gptq-4-r", 32).config.group_size == 32


# ---- records -----------------------------------------------------------------------------------------------------


def test_cell_keys_depend_on_content_not_on_order():
    assert record.key_of({"a": 1, "b": (2, 3)}) == record.key_of({"b": [2, 3], "a": 1})
    assert record.key_of({"a": 1}) != record.key_of({"a": 2})


def test_plain_values():
    values = {"array": np.arange(2), "nan": float("nan"), "scalar": np.float32(0.5), "path": Path("x"), 1: (True, None)}
    assert record.plain(values) == {"array": [0, 1], "nan": None, "scalar": 0.5, "path": "x", "1": [True, None]}


def test_timing_by_hand():
    timing = record.timing([1.0, 2.0, 3.0, 4.0], "ms")
    assert (timing["mean"], timing["p50"], timing["n"]) == (2.5, 2.5, 4)
    assert timing["stdev"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert record.timing([1.0])["stdev"] is None
    with pytest.raises(ValueError, match="at least one"):
        record.timing([])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cell.json"
    record.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            record.write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_log_goes_on_after_a_line_that_was_cut(tmp_path):
    with Run(tmp_path, "test", {}) as run:
        run.log(event="one")
        with open(tmp_path / "logs" / "metrics.jsonl", "ab") as file:
            file.write(b'{"event": "cu\xe2\x82')
        run.log(event="two")
    assert [event["event"] for event in read_log(tmp_path)] == ["one", "two"]


def test_one_process_at_a_time(tmp_path):
    with Run(tmp_path, "test", {}), pytest.raises(RecordError, match="another process"):
        Run(tmp_path, "test", {})
    with pytest.raises(RecordError, match="holds a run of 'test', not of 'other'"):
        Run(tmp_path, "other", {})


def test_an_interrupt_is_recorded_and_raised(tmp_path):
    def work(cell):
        raise KeyboardInterrupt

    with Run(tmp_path, "test", {}) as run, pytest.raises(KeyboardInterrupt):
        run.cell("a", {}, work)
    assert read_cells(tmp_path)[0]["status"] == "cancelled"
    with Run(tmp_path, "test", {}) as run:
        assert run.cell("a", {}, lambda cell: None)["status"] == "done"


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RecordError, match="found a file"):
        Run(tmp_path / "run", "test", {})


# ---- data, energy ------------------------------------------------------------------------------------------------


def test_splits_are_samples_with_checksums(tiny):
    examples = data.load_examples("sentiment", tiny["data_root"], (10, None, 5))
    assert [len(split.texts) for split in (examples.train, examples.val, examples.test)] == [10, 18, 5]
    again = data.load_examples("sentiment", tiny["data_root"], (10, None, 5))
    assert examples.train.describe("x") == again.train.describe("x")
    assert examples.official == "macro_recall" and examples.names == ["negative", "neutral", "positive"]


def test_local_files_only_reaches_the_data(monkeypatch):
    asked = []

    def download(hub_id, name, *, local_files_only):
        asked.append(local_files_only)
        raise FileNotFoundError("not in the local cache")

    monkeypatch.delenv("QUANTLAB_DATA", raising=False)
    monkeypatch.setattr("quantlab.io.hub.download_data", download)
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        tweeteval.resolve(preset("corrected", task="irony", local_files_only=True))
    assert asked == [True]


def test_without_training_text_the_validation_split_is_shared(tiny, tmp_path):
    folder = tmp_path / "sentiment"
    folder.mkdir()
    for path in (Path(tiny["data_root"]) / "sentiment").glob("*"):
        if not path.name.startswith("train"):
            (folder / path.name).write_bytes(path.read_bytes())
    examples = data.load_examples("sentiment", str(tmp_path))
    assert (len(examples.train.texts), len(examples.val.texts)) == (14, 4)
    assert len(examples.notes) == 1 and "no training text" in examples.notes[0]


def test_calibration_rows():
    def encode(text):
        return np.frombuffer(text.encode(), np.uint8)

    rows, at_hand = data.calibration_rows(encode, ["abcd", "efgh"], rows=3, length=4)
    assert rows.shape == (2, 4) and at_hand == 9
    assert bytes(rows.astype(np.uint8).ravel()) == b"abcd\nefg"
    assert data.calibration_rows(encode, ["ab"], 3, 100)[0].shape == (1, 2)
    with pytest.raises(ValueError, match="no token"):
        data.calibration_rows(encode, [""], 1, 4)


def test_energy_is_quiet():
    code = (
        "from quantlab.experiments import energy\nwith energy.track() as reading: pass\nassert reading.kwh is not None"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_energy_uses_no_network_and_leaves_no_thread(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = set(threading.enumerate())
    with energy.track(tmp_path / "e.csv", intensity_g_kwh=100.0) as reading:
        time.sleep(0.2)
    assert set(threading.enumerate()) <= before
    assert reading.duration_s >= 0.2 and reading.kg == pytest.approx(reading.kwh * 0.1)
    assert reading.intensity_g_kwh == 100 and reading.method["ram"].startswith("estimate")
    assert (tmp_path / "e.csv").read_text().count("\n") == 2


def test_energy_tells_why_it_could_not_measure(monkeypatch):
    from codecarbon.emissions_tracker import BaseEmissionsTracker

    def fail(self):
        raise RuntimeError("no meter")

    monkeypatch.setattr(BaseEmissionsTracker, "_ensure_hardware_ready", fail)
    with energy.track() as reading:
        pass
    assert reading.kwh is None and reading.method == {
        "all": "not measured: codecarbon's tracker did not start (RuntimeError: no meter)"
    }


def test_energy_switched_off_says_so():
    with energy.track(enabled=False) as reading:
        pass
    assert reading.kwh is None and reading.method == {"all": "not measured: switched off"}
