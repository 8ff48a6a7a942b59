"""Adapters in peft's layout: what is written is read back; what is damaged or not supported is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantlab.config import LoraConfig
from quantlab.io.peft import CONFIG, TENSORS, read_adapter, read_base_format, write_adapter

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}"


def matrices(rng, r=3, n=7, k=16):
    a, b = rng.standard_normal((r, k)), rng.standard_normal((n, r))
    return {MODULE: (a.astype(np.float32), b.astype(np.float32))}


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    write_adapter(tmp_path / "adapter", LoraConfig(r=3, target_modules=["q_proj"]), matrices(rng))
    return tmp_path / "adapter"


def test_round_trip(tmp_path, rng):
    config = LoraConfig(r=3, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj"], task_type="SEQ_CLS")
    written, score = matrices(rng), rng.standard_normal((3, 16)).astype(np.float32)
    sizes = write_adapter(tmp_path, config, written, score, base="demo")
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    found, read, head = read_adapter(tmp_path)
    assert found == config
    assert [read[MODULE][i].tobytes() for i in (0, 1)] == [part.tobytes() for part in written[MODULE]]
    np.testing.assert_array_equal(head, score)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["modules_to_save"] == ["classifier", "score"] and fields["base_model_name_or_path"] == "demo"


def test_the_format_of_the_base_is_kept(folder, tmp_path, rng):
    assert read_base_format(folder) is None  # as of an adapter by peft
    write_adapter(tmp_path / "ours", LoraConfig(r=3, target_modules=["q_proj"]), matrices(rng), base_format="nf4")
    assert read_base_format(tmp_path / "ours") == "nf4"


def test_half_precision_is_read(folder):
    tensors = load_file(folder / TENSORS)
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, folder / TENSORS)
    _, read, _ = read_adapter(folder)
    assert read[MODULE][0].dtype == np.float32


def test_targets_by_pattern_are_the_modules_of_the_tensors(folder):
    edit(folder, target_modules=r".*\.q_proj")
    config, _, _ = read_adapter(folder)
    assert config.target_modules == (MODULE,)


@pytest.mark.parametrize("fields", [{"exclude_modules": ["k_proj"]}, {"layers_to_transform": 0}])
def test_targets_that_another_field_narrows_are_the_modules_of_the_tensors(folder, fields):
    edit(folder, target_modules="all-linear", **fields)
    config, _, _ = read_adapter(folder)
    assert config.target_modules == (MODULE,)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_by_pattern(folder, use_rslora):
    fields = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r".*\.0\..*": 12}, "use_rslora": use_rslora}
    edit(folder, r=8, lora_alpha=16, **fields)
    config, read, _ = read_adapter(folder)
    assert read[MODULE][0].shape == (3, 16)
    assert (config.rank(MODULE), config.scale(MODULE)) == (3, 12 / (3**0.5 if use_rslora else 3))
    write_adapter(folder, config, read)
    assert read_adapter(folder)[0] == config
    edit(folder, rank_pattern=None, alpha_pattern=None, r=3)  # as older files have it
    assert read_adapter(folder)[0].scale(MODULE) == 16 / (3**0.5 if use_rslora else 3)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "expected rank 4"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern, 'q_proj': got '4'"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: got ['q_proj']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is"),
        ({"modules_to_save": 3}, "modules_to_save is"),
        ({"something_new": 1}, "something_new is 1"),
        ({"r": 4}, "expected rank 4"),
        ({"r": "many"}, "r: got 'many'"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"target_modules": 3}, "target_modules: got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused(folder, fields, says):
    edit(folder, **fields)
    if "use_dora" in fields:  # its tensors are not named before the field that says what they are
        save_file({**load_file(folder / TENSORS), f"{KEY}.lora_magnitude_vector": np.ones(7, "f")}, folder / TENSORS)
    with pytest.raises(ValueError) as caught:
        read_adapter(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), "lora_B alone"),
        (lambda t: t.clear(), "holds no lora_A and lora_B"),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector": np.ones((7, 1), np.float32)}), "magnitude"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": np.ones((2, 16), np.float32)}), "expected rank 3"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": np.ones((3, 16), np.int32)}), "expected a float matrix"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": np.ones(3, np.float32)}), "expected a float matrix"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, says):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match=says):
        read_adapter(folder)


def test_the_setting_is_named_before_the_tensors_that_it_brings(folder):
    edit(folder, use_dora=True)
    save_file({**load_file(folder / TENSORS), f"{KEY}.lora_magnitude_vector": np.ones(7, np.float32)}, folder / TENSORS)
    with pytest.raises(ValueError, match="use_dora is True, which is not supported"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_damaged_file_is_named(folder, name):
    (folder / name).write_bytes(b"{ not a file")
    with pytest.raises(ValueError, match=name):
        read_adapter(folder)


def test_a_failed_save_leaves_the_older_adapter(folder, rng, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("quantlab.io.peft.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_adapter(folder, LoraConfig(r=3), matrices(rng))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
