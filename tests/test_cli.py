"""The shell: what each command prints, its exit status, its one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save_tiny

import quantlab
from quantlab import cli
from quantlab.experiments.lima import LimaConfig
from quantlab.experiments.tweeteval import TweetEvalConfig, demo_config

TEXT = "Quantization maps many values to few, and what is lost depends on who looks. " * 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def call(capsys, *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command line, in this process."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def result(capsys, *words: object):
    """The JSON that a command prints."""
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def commands() -> list[str]:
    return sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)


@pytest.mark.parametrize("command", commands())
def test_help_has_an_example(capsys, command):
    status, out, err = call(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert f"Example: quantlab {command}" in " ".join(out.split())


def test_help_tells_the_defaults_of_a_study(capsys):
    def defaults(command: str) -> list[str]:
        text = " ".join(call(capsys, command, "--help")[1].replace("│", " ").split())
        return re.findall(r"\[default: \(?(.+?)\)?\]", text)

    tweets, talks = TweetEvalConfig(), LimaConfig()
    assert {" ".join(tweets.variants), tweets.task, f"{tweets.perplexity_text}; seed: none"} <= {*defaults("tweeteval")}
    assert {" ".join(talks.baselines), "none"} <= {*defaults("lima")}
    for config, command in ((tweets, "tweeteval"), (talks, "lima")):
        shared = {config.preset, config.model, config.country, config.device, config.wandb}
        assert shared <= {*defaults(command)}
    small = demo_config()
    counts = f"{small.train_limit} train, {small.val_limit} val, {small.test_limit} test"
    assert {" ".join(small.variants), counts} <= {*defaults("demo")}


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = "import sys\nfrom quantlab import cli\ncli.main(['--help'])\nprint(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f" {command} " in done.stdout for command in commands())
    modules = set(eval(done.stdout.splitlines()[-1]))
    assert not modules & {"numpy", "scipy", "tokenizers", "matplotlib", "sklearn", "pyarrow", "torch"}


def test_info(capsys):
    found = result(capsys, "info")
    assert found["isa"]["selected"] in found["isa"]["built"]
    assert found["cuda"]["usable"] or found["cuda"]["why_not"]
    status, out, _ = call(capsys, "info")
    assert status == 0 and "scalar" in out and "cuda" in out


def test_size_of_llama_2_7b_is_what_the_study_published(capsys):
    found = result(capsys, "size", "llama-2-7b", "--bits", 8, 4, 3)
    assert [round(size["total"] / 1e9, 3) for size in found["sizes"]] == [6.895, 3.632, 2.816]
    status, out, _ = call(capsys, "size", "--bits", 8, 4, 3, "llama-2-7b")  # several values, then the argument
    assert status == 0 and all(total in out for total in ("6.895 GB", "3.632 GB", "2.816 GB"))


def test_size_reads_directories_and_files(capsys, tiny, tmp_path):
    by_folder = result(capsys, "size", tiny, "--bits", 4)
    by_file = result(capsys, "size", tiny / "config.json", "--bits", 4)
    assert by_folder["sizes"] == by_file["sizes"] and by_folder["kept"] == "float16"
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())  # without weights: the config alone
    by_config = result(capsys, "size", tmp_path, "--bits", 4)
    assert by_config["stored"] is None and by_config["sizes"][0]["head"] == "classifier"
    assert "groups of 128, all else in 16 bits" in call(capsys, "size", tmp_path)[1]


def test_size_tells_what_quantize_writes_and_what_is_stored(capsys, tiny, tmp_path):
    written = result(capsys, "quantize", tiny, tmp_path / "rtn", "--method", "rtn", "--bits", 3)["size"]["total"]
    assert result(capsys, "size", tiny, "--bits", 3)["sizes"][0]["total"] == written
    found = result(capsys, "size", tmp_path / "rtn")
    assert found["stored"]["total"] == written and found["sizes"] == []
    told = call(capsys, "size", tmp_path / "rtn")[1]
    assert "quantized already (gptq)" in told and "stored" in told.splitlines()[-1]
    for option in (["--head", "tail"], ["--group-size", 0]):  # wrong where no row needs it too
        assert call(capsys, "size", tmp_path / "rtn", *option)[0] == 2


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_what_is_quantized_already_is_not_quantized_again(capsys, tiny, tmp_path, text_file, method):
    written = result(capsys, "quantize", tiny, tmp_path / "once", "--method", method)["size"]["total"]
    assert result(capsys, "size", tmp_path / "once")["stored"]["total"] == written
    status, _, err = call(capsys, "quantize", tmp_path / "once", tmp_path / "twice", "--calibration", text_file)
    assert status == 2 and f"is {method} already" in err and not (tmp_path / "twice").exists()


def test_size_of_a_hub_model_asks_for_its_config_alone(capsys, tiny, monkeypatch):
    monkeypatch.setattr("quantlab.size.download_config", lambda name: tiny / "config.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = result(capsys, "size", "nobody/nothing", "--bits", 4)
    assert found["stored"] is None and found["sizes"][0]["bits"] == 4
    assert found["sizes"][0]["head"] == "causal"  # as once it is downloaded


def test_perplexity(capsys, tiny, text_file):
    found = result(capsys, "perplexity", tiny, "--text", text_file, "--context", 64)
    assert found["tokens"] == len(TEXT) // 64 * 63 and found["ppl"] > 1
    status, out, _ = call(capsys, "perplexity", tiny, "--text", text_file, "--context", 64)
    assert status == 0 and out.startswith(f"perplexity {found['ppl']:.4f}")


def test_generate(capsys, tiny):
    words = ["generate", tiny, "abc", "--max-new-tokens", 6]
    found = result(capsys, *words)
    assert 1 <= len(found["tokens"]) <= 6
    assert call(capsys, *words) == (0, found["text"] + "\n", "")
    sampled = [result(capsys, *words, "--do-sample", "--seed", seed)["tokens"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


METHODS = [
    ("gptq", ["--bits", 4, "--group-size", 32, "--samples", 4, "--context", 32]),
    ("gptq", ["--bits", 3, "--recommended", "--group-size", 32, "--samples", 4, "--context", 32]),
    ("rtn", ["--bits", 8, "--asym"]),
    ("nf4", ["--double-quant"]),
    ("fp4", ["--block-size", 32]),
    ("int8", []),
]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[f"{m}{'-r' if len(o) > 6 else ''}" for m, o in METHODS])
def test_quantize_then_use(capsys, tmp_path, tiny, text_file, method, options):
    out = tmp_path / "out"
    options = [*options, *(["--calibration", text_file] if method == "gptq" else [])]
    found = result(capsys, "quantize", tiny, out, "--method", method, *options)
    assert found["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert found["config"]["method"] == method
    before, after = (result(capsys, "perplexity", model, "--text", text_file, "--context", 64) for model in (tiny, out))
    assert after["ppl"] == pytest.approx(before["ppl"], rel=0.2)


@pytest.fixture(scope="module")
def study_words(tmp_path_factory, tiny) -> list[str]:
    """`quantlab tweeteval …` on a data set of 30 made-up tweets, without energy (its tracker takes seconds)."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "irony"
    folder.mkdir()
    (folder / "mapping.txt").write_text("0\tplain\n1\tironic\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}_text.txt").write_text("".join(f"tweet {i} {'!' * (i % 2)}\n" for i in range(10)))
        (folder / f"{split}_labels.txt").write_text("".join(f"{i % 2}\n" for i in range(10)))
    settings = {"energy": False, "epochs": 2, "timing_repeats": 1, "calibration_rows": 2, "calibration_length": 32}
    (root / "settings.json").write_text(json.dumps({**settings, "perplexity_context": 16}))
    words = ["tweeteval", "--model", tiny, "--task", "irony", "--data-root", root, "--config", root / "settings.json"]
    return [str(word) for word in [*words, "--variants", "fp32", "nf4", "--out", root / "run"]]


def test_tweeteval_then_report(capsys, study_words):
    found = result(capsys, *study_words, "--dry-run")
    cells = {cell["cell"]: cell["status"] for cell in found["cells"]}
    assert cells == dict.fromkeys(["head", "fp32", "nf4"], "to do") and found["model"]["here"]
    told = call(capsys, *study_words, "--dry-run")[1]
    assert "model: " in told and "irony, tweets: 10 train, 10 val, 10 test" in told
    assert not Path(study_words[-1]).exists()
    status, out, err = call(capsys, *study_words)
    assert status == 0 and err == "", err
    assert "nf4: done" in out and "Accuracy, %" in out and "report.html" in out
    status, out, _ = call(capsys, *study_words)  # again: nothing is left to do
    assert status == 0 and "nf4: skipped" in out and "started" not in out
    run = Path(study_words[-1])
    shown = result(capsys, "report", run)
    assert [row["variant"] for row in shown["variants"]] == ["fp32", "nf4"]
    assert all(Path(path).is_file() for path in shown["files"].values())
    status, _, err = call(capsys, *study_words, "--preset", "seed")  # another study in the same place
    assert status == 1 and str(run) in err


def test_lima(capsys, tmp_path, tiny):
    settings = {"energy": False, "calibration_rows": 2, "calibration_length": 16, "max_length": 48, "batches": [1, 2]}
    settings |= {"repeats": 2, "new_tokens": 2, "answer_tokens": 2, "group_size": 16}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    rows = "".join(json.dumps({"conversations": [f"say {i}", f"{i} {i}"]}) + "\n" for i in range(6))
    (tmp_path / "train.jsonl").write_text(rows)
    words = ["lima", "--model", tiny, "--data", tmp_path, "--config", tmp_path / "settings.json", "--limit", 4]
    words += ["--baselines", "fp16", "bnb-bnb", "--out", tmp_path / "run"]
    cells = result(capsys, *words, "--dry-run")["cells"]
    names = ["base-fp16", "base-bnb", "tune-bnb", "merge-bnb", "infer-fp16", "infer-bnb-bnb"]
    assert {cell["cell"]: cell["status"] for cell in cells} == dict.fromkeys(names, "to do")
    status, out, err = call(capsys, *words)
    assert status == 0 and err == "", err
    assert "infer-bnb-bnb: done" in out and "Held-out loss, nat" in out and "report.html" in out
    shown = result(capsys, "report", tmp_path / "run")
    assert [row["baseline"] for row in shown["baselines"]] == ["fp16", "bnb-bnb"]
    status, _, err = call(capsys, "lima", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "other")
    assert status == 2 and "none.jsonl" in err and not (tmp_path / "other").exists()


def test_demo_takes_the_demo_configuration(capsys):
    status, _, err = call(capsys, "demo", "--variants", "gptq-9")
    assert status == 2 and "gptq-9" in err


def one_line(err: str) -> None:
    assert err.startswith("quantlab: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "nothing"),
        (["size"], "config"),
        (["size", "llama-2-7b", "--bits", "5"], "5"),
        (["size", "llama-2-7b", "--bits", "four"], ": --bits: got 'four', expected an integer."),
        (["size", "llama-2-7b", "--bits", "8", "4.5"], "extra argument"),
        (["quantize", "demo", "out", "--damp-percent", "x"], ": --damp-percent: got 'x', expected a number."),
        (["lima", "--out", "run", "--limit", "1"], ": --limit: got '1', expected an integer of at least 2."),
        (["size", "llama-2-7b", "--head", "tail"], "tail"),
        (["size", "no.json"], "no.json"),
        (["info", "--loud"], "--loud"),
        (["perplexity", "demo"], "--text"),
        (["perplexity", "demo", "--text", "/no/such/file"], "/no/such/file"),
        (["quantize", "demo", "out", "--method", "magic"], "magic"),
        (["quantize", "demo", "out", "--method", "nf4", "--bits", "3"], "nf4"),
        (["quantize", "demo", "out", "--method", "int8", "--desc-act"], "desc_act"),
        (["quantize", "demo", "out", "--method", "gptq", "--bits", "7"], "7"),
        (["quantize", "demo", "out", "--damp-percent", "2"], "damp_percent"),
        (["quantize", "demo", "out", "--method", "rtn", "--recommended"], "recommended"),
        (["quantize", "demo", "out", "--recommended", "--desc-act"], "--desc-act: --recommended decides it"),
        (["quantize", "demo", "out", "--recommended", "--block-size", "32"], "block_size"),
        (["quantize", "demo", "out", "--method", "nf4", "--resume-dir", "r"], "--resume-dir"),
        (["quantize", "demo", f"{__file__}/out"], "not a directory"),
        (["size", "llama-2-7b", "--group-size", "0"], "group_size"),
        (["perplexity", "demo", "--text", __file__, "--context", "1"], ": --context: got '1', expected an integer of"),
        (["perplexity", "demo", "--text", __file__, "--max-tokens", "-5"], "--max-tokens"),
        (["perplexity", "demo", "--text", __file__, "--dtype", "half"], ": --dtype: got 'half', expected"),
        (["generate", "demo", "a", "--dtype", "half"], ": --dtype: got 'half', expected"),
        (["generate", "demo", "a", "--device", "tpu"], ": --device: got 'tpu', accepted"),
        (["bench", "add", "--json", "/no/such/folder/x.jsonl"], "/no/such/folder"),
        (["bench", "add", "--json", f"{__file__}/x.jsonl"], "not a directory that can be written to"),
        (["tweeteval", "--task", "poetry", "--out", "run"], "poetry"),
        (["lima", "--baselines", "bnb-poetry", "--out", "run"], "poetry"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_status_2(capsys, words, said):
    status, out, err = call(capsys, *words)
    assert status == 2 and out == "", (status, out, err)
    one_line(err)
    assert said in err and "--help" in err


def test_a_dry_run_foresees_only_models_that_are_there_or_on_the_hub(capsys, tmp_path, study_words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({"model": "/no/such/model", "energy": False}))
    options = study_words[study_words.index("--task") :]
    status, out, err = call(capsys, "tweeteval", "--model", tmp_path / "empty", *options, "--dry-run")
    assert status == 2 and "--model: " in err and "holds no config.json" in err and out == ""
    assert "holds no config.json" in call(capsys, "size", tmp_path / "empty")[2]
    options[options.index("--config") + 1] = str(tmp_path / "settings.json")
    status, out, err = call(capsys, "tweeteval", *options, "--dry-run")
    assert status == 2 and "model: /no/such/model" in err and out == ""


def test_quantize_writes_only_where_nothing_is(capsys, tiny):
    before = sorted(tiny.iterdir())
    status, _, err = call(capsys, "quantize", tiny, tiny, "--method", "nf4")
    assert status == 2 and "exists" in err
    assert sorted(tiny.iterdir()) == before


def test_a_failed_job_is_status_1_and_debug_shows_the_traceback(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    words = ["generate", tmp_path, "hi"]
    status, _, err = call(capsys, *words)
    assert status == 1 and "config.json" in err
    one_line(err)
    for debugged in (["--debug", *words], [*words, "--debug"]):
        status, _, err = call(capsys, *debugged)
        assert status == 1 and "Traceback" in err and err.splitlines()[-1].startswith("quantlab: ")


def test_interrupt_is_status_130(tmp_path):
    endless = save_tiny(tmp_path / "endless", eos_token_id=None, max_position_embeddings=1 << 16)
    words = ["generate", str(endless), "hi", "--max-new-tokens", "50000"]
    command = [sys.executable, "-m", "quantlab.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.read(1)  # it generates
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, b"quantlab: interrupted\n")


def interrupting(function, calls: int):
    """The same function, until Ctrl-C is pressed in a call of it."""
    left = iter(range(calls))

    def interrupted(*arguments, **more):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **more)

    return interrupted


def test_an_interrupt_tells_what_is_kept(capsys, tmp_path, tiny, text_file, study_words, monkeypatch):
    words = ["quantize", tiny, tmp_path / "out", "--calibration", text_file, "--samples", 4, "--context", 32]
    layer_and_a_half = interrupting(quantlab.gptq.quantize_shared, 6)  # four stages a layer
    with monkeypatch.context() as patch:
        patch.setattr(quantlab.gptq, "quantize_shared", layer_and_a_half)
        status, _, err = call(capsys, *words, "--resume-dir", tmp_path / "layers")
        said = f"interrupted; finished layers kept in {tmp_path / 'layers'}: 1; the same call goes on from there"
        assert (status, err) == (130, f"quantlab: {said}\n")
        status, _, err = call(capsys, *words)
        assert status == 130 and "nothing is kept: with --resume-dir" in err
        run = tmp_path / "run"
        status, _, err = call(capsys, *study_words[:-1], run, "--variants", "gptq-4")
        assert status == 130 and f"kept in {run}: the same call goes on" in err
        one_line(err)
    assert call(capsys, *words, "--resume-dir", tmp_path / "layers")[0] == 0
    status, out, _ = call(capsys, *study_words[:-1], run, "--variants", "gptq-4")
    assert status == 0 and "head: skipped" in out


def test_an_interrupt_is_told_on_a_line_of_its_own(capsys, tiny, monkeypatch):
    letters = interrupting(lambda model, tokens: "x" * len(tokens), 3)
    monkeypatch.setattr(quantlab.LlamaForCausalLM, "decode", letters)
    assert call(capsys, "generate", tiny, "abc", "--max-new-tokens", 9) == (130, "xxx\n", "quantlab: interrupted\n")


def test_a_reader_that_leaves_is_no_error(tiny):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "quantlab.cli", "size", str(tiny)], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 1)
