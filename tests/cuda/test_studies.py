"""Both studies with their models on a device: every cell is done, and measures what the CPU's run measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import save_tiny
from test_experiments import settings as tweet_settings
from test_experiments import write_tiny
from test_lima import settings as lima_settings
from test_lima import write_conversations

from quantlab.experiments import lima, tweeteval
from quantlab.report import build_report

VARIANTS = ("fp32", "bf16", "gptq-4", "gptq-3-r", "nf4", "int8")
BASELINES = ("fp16", "bnb-bnb", "gptq-gptq", "bnb-gptq", "gptq-bnb")


def test_tweeteval(tmp_path: Path) -> None:
    tiny, cells = write_tiny(tmp_path), {}
    for device in ("cpu", "cuda"):
        config = tweet_settings(tiny, variants=VARIANTS, device=device, energy=True)
        outcome = tweeteval.run(config, tmp_path / device, progress=False)
        assert outcome.failed == [], [outcome.cells[name]["error"]["traceback"] for name in outcome.failed]
        cells[device] = outcome.cells
    for name in VARIANTS:
        here, there = cells["cpu"][name]["metrics"], cells["cuda"][name]["metrics"]
        assert here["size_checkpoint"]["value"] == there["size_checkpoint"]["value"]
        # activations are bfloat16 there, with 8 bits: a few units in the last place of logits of a random model
        assert there["perplexity"]["value"] == pytest.approx(here["perplexity"]["value"], rel=0.05)
        assert cells["cuda"][name]["memory"]["peak_device"]["evaluation"]["value"] > 0
    assert cells["cuda"]["fp32"]["energy"]["evaluation"]["method"]["gpu"].startswith("counter")
    build_report(tmp_path / "cuda")
    assert "Peak on the device, MB" in (tmp_path / "cuda" / "report.html").read_text()


def test_lima(tmp_path: Path) -> None:
    tiny = {"model": str(save_tiny(tmp_path / "model", max_position_embeddings=256))}
    tiny["data"], cells = str(write_conversations(tmp_path / "train.jsonl")), {}
    for device in ("cpu", "cuda"):
        config = lima_settings(tiny, baselines=BASELINES, device=device, lora_dropout=0.0)
        outcome = lima.run(config, tmp_path / device, progress=False)
        assert outcome.failed == [], [outcome.cells[name]["error"]["traceback"] for name in outcome.failed]
        cells[device] = outcome.cells
    for name in ("base-fp16", "base-bnb", "base-gptq"):  # tuned with so high a rate, roundings lead elsewhere
        here, there = (cells[device][name]["metrics"]["eval_loss"]["value"] for device in ("cpu", "cuda"))
        assert there == pytest.approx(here, rel=0.05), name
    for name in BASELINES[1:]:
        after = cells["cuda"][f"infer-{name}"]["metrics"]["eval_loss"]["value"]
        before = cells["cuda"][f"base-{name.rpartition('-')[2]}"]["metrics"]["eval_loss"]["value"]
        assert after < 0.9 * before, name
    assert cells["cuda"]["tune-bnb"]["memory"]["peak_device"]["training"]["value"] > 0
    build_report(tmp_path / "cuda")
    assert "Peak on the device, MB" in (tmp_path / "cuda" / "report.html").read_text()
