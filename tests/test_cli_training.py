"""`quantlab finetune`, `merge` and the chat of `generate`: what they leave, what they refuse."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
from checkpoints import save_tiny
from test_cli import call, interrupting, result

TURNS = ["What is it?", "It is a small thing.", "And that?", "Another one."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("training") / "tiny")


@pytest.fixture
def talk(tmp_path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"conversations": TURNS[:2] if i % 2 else TURNS}) + "\n" for i in range(6)))
    return path


def test_an_interrupt_tells_how_to_go_on(capsys, tiny, talk, tmp_path, monkeypatch):
    words = ["finetune", tiny, tmp_path / "out", "--data", talk, "--num-train-epochs", 2]
    run = import_module("quantlab.finetune").TrainingRun
    with monkeypatch.context() as patch:
        patch.setattr(run, "_update", interrupting(run._update, 0))
        assert call(capsys, *words) == (130, "", "quantlab: interrupted\n")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_update", interrupting(run._update, 5))
        status, _, err = call(capsys, *words)  # what was interrupted at once has left nothing in the way
        kept = f"checkpoint-5 is kept in {tmp_path / 'out'}: the same call with --resume goes on from it"
        assert (status, err) == (130, f"quantlab: interrupted; {kept}\n")
    status, told, _ = call(capsys, *words, "--resume")
    assert status == 0 and "12 steps" in told


def test_an_adapter_is_trained_used_and_merged(capsys, tiny, talk, tmp_path):
    out = tmp_path / "adapter"
    status, told, err = call(
        capsys, "finetune", tiny, out, "--data", talk, "--eval-data", talk, "--base", "nf4", "--learning-rate", 0.01,
        "--num-train-epochs", 2, "--logging-steps", 2, "--save-steps", 3, "--assistant-only-loss",
        "--target-modules", "q_proj", "v_proj", "down_proj",
    )  # fmt: skip
    assert (status, err) == (0, "") and "12 steps" in told and "held out: loss" in told
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "checkpoint-12"} <= names
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    merged = result(capsys, "merge", tiny, out, tmp_path / "merged")
    assert len(merged["matrices"]) == 6 and "model.safetensors" in merged["files"]
    beside = result(capsys, "generate", tiny, "hello", "--adapter", out, "--max-new-tokens", 8)
    inside = result(capsys, "generate", tmp_path / "merged", "hello", "--max-new-tokens", 8)
    assert beside["tokens"] == inside["tokens"]
    status, told, err = call(capsys, "merge", tiny, out, tmp_path / "merged-nf4", "--requantize", "nf4")
    assert err.startswith(f"quantlab: adapter: {out} was trained beside nf4 weights, ") and err.count("\n") == 1
    assert err.endswith("this model's are float\n")
    assert status == 0 and "rounding: its error is up to" in told
    assert "rounding" not in call(capsys, "merge", tiny, out, tmp_path / "merged-float")[1]
    status, _, err = call(capsys, "merge", tiny, out, tmp_path / "other", "--requantize", "int9")
    assert status == 2 and "expected one of same, nf4, fp4, rtn, int8" in err


def test_an_adapter_that_adds_nothing_is_merged(capsys, tiny, talk, tmp_path):
    result(capsys, "finetune", tiny, tmp_path / "zero", "--data", talk, "--learning-rate", 0)
    for name, words in (("float", ()), ("nf4", ("--requantize", "nf4"))):
        status, told, err = call(capsys, "merge", tiny, tmp_path / "zero", tmp_path / name, *words)
        assert (status, err) == (0, "") and "rounding" not in told
    merged = result(capsys, "merge", tiny, tmp_path / "zero", tmp_path / "json", "--requantize", "nf4")
    assert {matrix["error_ratio"] for matrix in merged["matrices"]} == {None}  # nothing to compare with


def test_a_run_is_taken_up(capsys, tiny, talk, tmp_path):
    words = ("finetune", tiny, tmp_path / "run", "--data", talk, "--logging-steps", 1, "--save-steps", 4)
    whole = result(capsys, *words)
    status, _, err = call(capsys, *words)
    assert status == 2 and "exists and is not empty" in err
    again = result(capsys, *words, "--resume")
    assert [entry["loss"] for entry in again["log"]] == [entry["loss"] for entry in whole["log"]]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--r", 0), 2, "r: got 0"),
        (("--packing",), 2, "packing: got True without max_length"),
        (("--target-modules", "c_proj"), 2, "'c_proj' is no linear module"),
        (("--base", "gptq"), 2, "gptq needs calibration text"),
        (("--base", "nf3"), 2, "--base: got 'nf3'"),
        (("--bits", 4), 2, "--bits"),
        (("--eval-data", "none.jsonl"), 2, "'none.jsonl' does not exist"),
        (("--chat-template", "vicuna"), 2, "chat_template: got 'vicuna'"),
    ],
)
def test_a_wrong_call_leaves_nothing(capsys, tiny, talk, tmp_path, words, status, says):
    got, told, err = call(capsys, "finetune", tiny, tmp_path / "out", "--data", talk, *words)
    assert (got, told) == (status, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_that_are_cut_are_told_in_a_line(capsys, tiny, talk, tmp_path):
    status, _, err = call(capsys, "finetune", tiny, tmp_path / "out", "--data", talk, "--max-length", 40)
    assert status == 0 and err == "quantlab: data: of 6 rows 6 were cut to 40 tokens\n"


def test_one_sided_conversations_are_named(capsys, tiny, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"conversations": ["alone"]}) + "\n")
    status, _, err = call(capsys, "finetune", tiny, tmp_path / "out", "--data", path)
    assert status == 1 and "talk.jsonl, row 1: the conversation has no turn of the assistant" in err


def test_chat(capsys, tiny):
    plain = result(capsys, "generate", tiny, "hello", "--max-new-tokens", 4)
    chat = result(capsys, "generate", tiny, "hello", "--max-new-tokens", 4, "--chat", "--system", "Be brief.")
    assert len(chat["tokens"]) <= 4 and chat["tokens"] != plain["tokens"]
    status, _, err = call(capsys, "generate", tiny, "hello", "--system", "Be brief.")
    assert status == 2 and "--system: it needs --chat beside it" in err
    stopped = result(capsys, "generate", tiny, "hello", "--max-new-tokens", 9, "--stop", plain["text"][1])
    assert len(stopped["tokens"]) <= 2
