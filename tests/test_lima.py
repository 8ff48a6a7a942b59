"""The LIMA study: a tiny random model and made-up conversations through every cell, stopped, failed, resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_tiny

from quantlab.experiments import lima, statistics
from quantlab.experiments.lima import LimaConfig, parts_of
from quantlab.experiments.lima_data import QUESTIONS, load_conversations
from quantlab.experiments.record import RecordError, read_cells, read_json, read_log
from quantlab.io.datasets import lima_file

FOUR = ("bnb-bnb", "gptq-gptq", "bnb-gptq", "gptq-bnb")
EVERY = ("fp16", "fp16-fp16", *FOUR)
COUNTS = ("one", "two", "three", "four", "five")


def write_conversations(path: Path, n: int = 24) -> Path:
    """Questions that a tiny model can learn to answer: count on from a word."""
    rows = []
    for row in range(n):
        first = row % len(COUNTS)
        turns = [f"go on from {COUNTS[first]}", " ".join(COUNTS[first:] + COUNTS[:first]) * (1 + row % 3)]
        turns += ["and again", COUNTS[first]] * (row % 4 == 0)
        rows.append(json.dumps({"conversations": turns, "source": "made up"}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lima")
    model = save_tiny(root / "model", max_position_embeddings=256)
    return {"model": str(model), "data": str(write_conversations(root / "train.jsonl"))}


def settings(tiny: dict[str, str], **changes) -> LimaConfig:
    small = {
        "baselines": EVERY, "group_size": 16, "calibration_rows": 4, "calibration_length": 32, "max_length": 64,
        "lr": 2e-2, "epochs": 2.0, "evaluations": 3, "save_steps": 5, "batches": (1, 3), "repeats": 2, "new_tokens": 4,
        "answer_tokens": 5, "prompt_tokens": 8, "precise": True, "energy": False,
    }  # fmt: skip
    return LimaConfig.from_preset("corrected", **{**tiny, **small, **changes})


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The run directory of a whole study."""
    path = tmp_path_factory.mktemp("run") / "run"
    outcome = lima.run(settings(tiny), path, progress=False)
    assert outcome.failed == [], [outcome.cells[name]["error"]["traceback"] for name in outcome.failed]
    assert outcome.worked == 3 + 3 + 3 + len(EVERY)
    return path


def by_name(path: Path) -> dict[str, dict]:
    return {cell["name"]: cell for cell in read_cells(path)}


# ---- the whole study -------------------------------------------------------------------------------------------------


def test_every_cell_has_the_agreed_fields(finished):
    cells = by_name(finished)
    assert set(cells) == {f"{kind}-{part}" for kind in ("base", "tune", "merge") for part in lima.PARTS} | {
        f"infer-{name}" for name in EVERY
    }
    for cell in cells.values():
        assert cell["status"] == "done" and cell["experiment"] == "lima" and cell["seeds"] and cell["env"]["cpu"]
        assert cell["data"]["held_out"]["n"] == 2
        for rows in cell["held_out"].values():
            assert len(rows["sums"]) == len(rows["tokens"]) == 2
    assert not (finished / "models").exists() and not any((finished / "work").iterdir())
    assert sorted(path.name.partition("-")[0] for path in (finished / "adapters").iterdir()) == ["bnb", "fp16", "gptq"]


def test_tuning_lowers_the_held_out_loss_in_every_baseline(finished):
    cells = by_name(finished)
    for name in EVERY[1:]:
        after = cells[f"infer-{name}"]["metrics"]["eval_loss"]["value"]
        before = cells[f"base-{parts_of(name)[1]}"]["metrics"]["eval_loss"]["value"]
        assert after < 0.9 * before, name


def test_an_adapter_beside_its_base_is_what_was_trained(finished):
    """The unmerged baselines end with the loss that training ended with; merging into floats keeps it."""
    cells = by_name(finished)
    for part in ("bnb", "gptq"):
        tuned = cells[f"tune-{part}"]["held_out"]["final"]["sums"]
        assert cells[f"infer-{part}-{part}"]["held_out"]["final"]["sums"] == tuned
        np.testing.assert_allclose(cells[f"merge-{part}"]["held_out"]["merged"]["sums"], tuned, rtol=2e-3)
        assert cells[f"merge-{part}"]["merge_report"][0]["error_ratio"] > 0
        assert set(cells[f"merge-{part}"]["held_out"]) == {"merged", "requantized", "onto_floats"}
    assert set(cells["merge-fp16"]["held_out"]) == {"merged"}


def test_training_is_recorded(finished):
    cell = by_name(finished)["tune-bnb"]
    assert cell["metrics"]["steps"]["value"] == 44 and cell["data"]["train"]["n"] == 22
    assert [row["step"] for row in cell["history"]][-1] == 44 and cell["history"][-1]["epoch"] == 2
    assert [row["step"] for row in cell["evaluations"]] == [15, 30, 44]
    metrics = {name: fields["value"] for name, fields in cell["metrics"].items()}
    assert 2 * metrics["tokens"] == sum(row["tokens"] for row in cell["history"])
    assert 2 * metrics["epoch_time"] <= cell["timings"]["training"]["mean"]
    assert metrics["samples_per_s"] * metrics["epoch_time"] == pytest.approx(22)
    assert metrics["tokens_per_s"] * metrics["epoch_time"] == pytest.approx(metrics["tokens"])
    assert metrics["train_loss_last"] < metrics["train_loss_first"]
    steps = [event for event in read_log(finished) if event["event"] == "step" and event["name"] == "tune-bnb"]
    assert len(steps) == len(cell["history"]) + len(cell["evaluations"])


def test_rows_that_are_cut_are_noted_once(finished):
    cell = by_name(finished)["tune-gptq"]
    assert sum("rows" in note and "cut to 64 tokens" in note for note in cell["notes"]) == 2
    assert [note.split(":")[0] for note in cell["notes"]] == ["Conversations, held out", "Conversations, train"]


def test_generation_is_recorded(finished):
    cell = by_name(finished)["infer-gptq-bnb"]
    for size in (1, 3):
        metric, timing = cell["metrics"][f"generate_{size}"], cell["timings"][f"generate_{size}"]
        assert metric["n"] == 2 and metric["value"] == timing["p50"] > cell["timings"][f"first_token_{size}"]["p50"]
        assert cell["metrics"][f"decode_{size}"]["value"] > 0
    assert [item["question"] for item in cell["answers"]] == list(QUESTIONS)
    assert cell["metrics"]["quantization_time"]["value"] > 0 and "quantized then" in cell["adapter"]


def test_records_hold_no_text_of_the_conversations(finished):
    for path in [*finished.rglob("*.json"), *finished.rglob("*.jsonl")]:
        assert "go on from" not in path.read_text(), path


def test_sizes(finished):
    size = {name: by_name(finished)[f"infer-{name}"]["metrics"]["size_memory"]["value"] for name in EVERY}
    assert size["fp16"] == size["fp16-fp16"] > size["bnb-bnb"] > size["gptq-bnb"]  # the adapter is beside bnb-bnb
    assert size["gptq-gptq"] > size["bnb-gptq"]


def test_finished_cells_are_skipped_without_what_they_left(tiny, finished):
    told = []
    outcome = lima.run(settings(tiny), finished, on_cell=lambda *event: told.append(event))
    assert outcome.worked == 0 and {status for _, status in told} == {"skipped"}
    assert {row["status"] for row in lima.foresee(settings(tiny), finished)["cells"]} == {"done"}


def test_baselines_may_be_added_to_a_run(tiny, finished, tmp_path):
    """The new baseline needs bases that are gone: they are made again, the adapters are not."""
    run = shutil.copytree(finished, tmp_path / "run")
    outcome = lima.run(settings(tiny, baselines=("fp16-bnb",)), run, progress=False)
    assert outcome.failed == [] and outcome.worked == 2  # base-bnb and infer-fp16-bnb
    assert read_json(run / "config.json")["config"]["baselines"] == [*EVERY, "fp16-bnb"]


def test_another_configuration_is_refused(tiny, finished):
    with pytest.raises(RecordError, match=r"another configuration \(r: 8 there, 4 asked\)"):
        lima.run(settings(tiny, r=4), finished)


def test_another_experiment_is_refused(tiny, tmp_path):
    stored = {"experiment": "tweeteval", "config": {"variants": ["fp32"]}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(RecordError, match="holds a run of 'tweeteval', not of 'lima'"):
        lima.run(settings(tiny), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecordError, match="not a run's configuration"):
        lima.run(settings(tiny), tmp_path)


def test_what_fails_leaves_out_what_needs_it(tiny, tmp_path, monkeypatch):
    from quantlab.experiments.lima_stages import LimaStages

    record, told = LimaStages.record_training, []

    def broken(self, cell, tuned):
        if cell.name == "tune-bnb":
            raise ArithmeticError("not finite")
        record(self, cell, tuned)

    config = settings(tiny, baselines=FOUR, epochs=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(LimaStages, "record_training", broken)
        outcome = lima.run(config, tmp_path / "run", False, lambda *event: told.append(event))
    assert outcome.failed == ["tune-bnb"]
    left_out = {name for name, status in told if status == "left out"}
    assert left_out == {"merge-bnb", "infer-bnb-bnb", "infer-bnb-gptq"}
    again = lima.run(config, tmp_path / "run", progress=False)
    assert again.failed == [] and "infer-bnb-gptq" in again.cells


def test_a_stopped_training_goes_on_to_the_same_losses(tiny, tmp_path, monkeypatch):
    """Ctrl-C in the middle of tuning; the next run takes up the last checkpoint."""
    from quantlab import finetune

    config = settings(tiny, baselines=("bnb-bnb",), epochs=1.0)
    whole = lima.run(config, tmp_path / "whole", progress=False).cells["tune-bnb"]
    update, steps = finetune_module(finetune).TrainingRun._update, []

    def interrupted(self, *arguments):
        if len(steps) == 13:
            raise KeyboardInterrupt
        steps.append(1)
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module(finetune).TrainingRun, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lima.run(config, tmp_path / "stopped", progress=False)
    cell = lima.run(config, tmp_path / "stopped", progress=False).cells["tune-bnb"]
    assert cell["training_resumed"] and cell["earlier"][0]["status"] == "cancelled"
    fields = ("step", "loss", "learning_rate", "grad_norm")
    assert [[row[name] for name in fields] for row in cell["history"]] == [
        [row[name] for name in fields] for row in whole["history"]
    ]
    assert cell["held_out"] == whole["held_out"] and "went on from a checkpoint" in cell["notes"][0]


def finetune_module(function):
    import sys

    return sys.modules[function.__module__]


def test_the_seed_preset(tiny, tmp_path):
    config = LimaConfig.from_preset(
        "seed", **tiny, baselines=("bnb-gptq",), group_size=16, batches=(1, 2), repeats=2, new_tokens=3,
        answer_tokens=2, calibration_rows=2, calibration_length=16, energy=False,
    )  # fmt: skip
    assert (config.bnb, config.fp16, config.gptq, config.precise) == ("fp4", "fp16", "gptq-4", True)
    assert (config.chat_template, config.answers_only, config.prompt, config.damp_percent) == (
        "joined",
        False,
        "hello",
        0.1,
    )
    outcome = lima.run(config, tmp_path / "run", progress=False)
    assert outcome.failed == []
    cell = outcome.cells["infer-bnb-gptq"]
    assert cell["generation"]["prompt_tokens"] == [5, 5] and any("c4" in note for note in cell["notes"])
    assert outcome.cells["base-bnb"]["config"]["variant"]["method"] == "fp4"


# ---- configuration, data, statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baselines": ("bnb-int8",)}, "baseline 'bnb-int8': accepted are"),
        ({"baselines": ("four",)}, "baseline 'four'"),
        ({"baselines": ()}, "baselines: got none"),
        ({"bnb": "int8"}, "bnb: got 'int8', expected a variant by nf4 or fp4"),
        ({"gptq": "gptq-5"}, "variant 'gptq-5'"),
        ({"fp16": "nf4"}, "fp16: got 'nf4', expected a variant by float"),
        ({"repeats": 1}, "repeats: got 1"),
        ({"batches": ()}, "batches: got"),
        ({"limit": 1}, "limit: got 1"),
        ({"r": 0}, "r: got 0"),
        ({"lr": -1.0}, "learning_rate: got -1.0"),
        ({"lr_scheduler": "step"}, "lr_scheduler_type: got 'step'"),
        ({"target_modules": ()}, "target_modules: got"),
        ({"device": "gpu"}, "device: got 'gpu', accepted are cpu, cuda, cuda:N"),
        ({"colour": 1}, "no field 'colour'"),
        ({"batches": 8}, "batches: got 8, expected a list, each an integer"),
        ({"target_modules": ["q_proj", 1]}, "target_modules: got .*, expected a list, each text"),
        ({"precise": 1}, "precise: got 1, expected True or False"),
        ({"max_length": "512"}, "max_length: got '512', expected an integer or None"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LimaConfig.from_dict(fields)


def test_a_limit_bounds_the_batches_of_generation():
    config = LimaConfig()
    assert lima.limited(config, 200) == replace(config, limit=200)
    assert lima.limited(config, 6).batches == (1, 2, 4)
    assert lima.limited(replace(config, batches=(8, 16)), 6).batches == (6,)


def test_a_configuration_survives_its_file(tmp_path):
    config = LimaConfig.from_preset("seed", baselines=FOUR, limit=40)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    assert LimaConfig.from_file(tmp_path / "config.json") == config


def test_conversations_are_parted_by_the_seed(tiny):
    everything = load_conversations(tiny["data"], None, 50, seed=0)
    assert (len(everything.train), len(everything.held_out)) == (22, 2)
    assert load_conversations(tiny["data"], None, 50, seed=0) == everything
    assert load_conversations(tiny["data"], None, 50, seed=1) != everything
    few = load_conversations(tiny["data"], 5, 50, seed=0)
    assert (len(few.train), len(few.held_out)) == (4, 1) and few.held_out[0] == everything.held_out[0]
    assert few.describe("train")["sha256"] != everything.describe("train")["sha256"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"conversations": []}', "row 2: the conversation is empty"),
        ('{"conversations": ["only a question"]}', "row 2: the conversation has no turn of the assistant"),
        ('{"conversations": ["a", ""]}', "row 2: turn 2, of the assistant, is empty"),
        ('{"texts": ["a"]}', "row 2"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_bad_conversations_are_named(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"conversations": ["a", "b"]}\n' + row + "\n")
    with pytest.raises(ValueError, match=message):
        load_conversations(str(path), None, 1, 0)


def test_where_the_data_set_is_found(tmp_path, monkeypatch):
    (tmp_path / "lima").mkdir()
    path = write_conversations(tmp_path / "lima" / "train.jsonl")
    assert lima_file(path) == lima_file(path.parent) == path
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    assert lima_file() == path
    with pytest.raises(FileNotFoundError, match="no such file"):
        lima_file(tmp_path / "nothing.jsonl")
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path / "lima" / "nowhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LIMA is gated: accept its licence"):
        lima_file(local_files_only=True)


def test_mean_loss_by_hand():
    mean, stderr, ends = statistics.mean_loss([2.0, 3.0, 7.0], [1, 2, 3])
    assert mean == 2.0
    # residuals 0, -1, 1: sqrt(3/2 * 2) / 6; Student's 97.5 % point of 2 degrees of freedom is 4.3027
    assert stderr == pytest.approx(np.sqrt(3) / 6) and ends == pytest.approx(
        [2 - 4.3027 * stderr, 2 + 4.3027 * stderr], rel=1e-4
    )
    assert statistics.mean_loss([3.0], [2]) == (1.5, None, None)
    with pytest.raises(ValueError, match="mean_loss"):
        statistics.mean_loss([1.0], [0])


def test_mean_loss_covers_the_truth():
    """The interval holds the population's ratio in about 95 of 100 samples."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = random.integers(20, 500, 20)
        sums = tokens * (2 + 0.4 * random.standard_normal(20))
        ends = statistics.mean_loss(sums, tokens)[2]
        hits += ends[0] <= 2 <= ends[1]
    assert 0.91 <= hits / 400 <= 0.98
