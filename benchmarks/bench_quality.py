"""Perplexity of a model before and after quantization, one JSON line a variant.

    python benchmarks/bench_quality.py --model demo --calibration wiki.valid.txt --test wiki.test.txt \
        --other tweets.txt --variants fp32 gptq-4 gptq-4-r rtn-4 --out benchmarks/results/quality.jsonl

Variants: fp32, nf4, fp4, int8, rtn-B, gptq-B (textbook: symmetric, no act-order), gptq-B-g (the same in
group-aware order, GPTQModel's default), gptq-B-r (GPTQConfig.recommended),
for B bits. Calibration is ROWS rows of CONTEXT tokens spread evenly over its text (`--head`: its first ones);
perplexity is over the first CHUNKS chunks of CONTEXT tokens of each test text (0: all). `--load DIR`
measures a checkpoint that another program quantized.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import quantlab as ql
from quantlab.calibration import spread_rows


def variant_config(name: str, group_size: int) -> object:
    """The quantization config of a variant's name; None for fp32."""
    method, *rest = name.split("-")
    if method in ("nf4", "fp4", "int8"):
        return {"nf4": ql.NF4Config, "fp4": ql.FP4Config, "int8": ql.Int8Config}[method]()
    if method == "rtn":
        return ql.RTNConfig(bits=int(rest[0]), group_size=group_size)
    if method == "gptq" and rest[1:] == ["r"]:
        return ql.GPTQConfig.recommended(int(rest[0]), group_size=group_size)
    if method == "gptq":
        return ql.GPTQConfig(bits=int(rest[0]), group_size=group_size, act_group_aware=rest[1:] == ["g"])
    return None


def measure(model: ql.LlamaForCausalLM, texts: dict[str, np.ndarray], context: int, chunks: int) -> dict[str, dict]:
    limit = chunks * context if chunks else None
    return {name: model.perplexity(ids, context=context, max_tokens=limit) for name, ids in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="a second test text, unlike the calibration text")
    parser.add_argument("--variants", nargs="*", default=["fp32", "gptq-4", "gptq-4-r", "rtn-4"])
    parser.add_argument("--load", nargs="*", default=[], help="checkpoints to measure as they are")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--head", action="store_true", help="calibrate on the first rows of the text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    model = ql.LlamaForCausalLM.from_pretrained(arguments.model)
    ids = model.encode(arguments.calibration.read_text())
    if arguments.head:
        ids = ids[: arguments.rows * arguments.context]
    calibration = spread_rows(ids, arguments.rows, arguments.context)
    texts = {"test": model.encode(arguments.test.read_text())}
    if arguments.other:
        texts["other"] = model.encode(arguments.other.read_text())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in [*arguments.variants, *arguments.load]:
        started = time.monotonic()
        if name in arguments.load:
            quantized, config = ql.LlamaForCausalLM.from_pretrained(name, dtype="auto"), None
        else:
            config = variant_config(name, arguments.group_size)
            quantized = model if config is None else ql.quantize(model, config, calibration=calibration)
        record = {
            "variant": name, "config": None if config is None else config.to_dict(), "model": arguments.model,
            "calibration": {"rows": len(calibration), "tokens": arguments.context, "head": arguments.head},
            "context": arguments.context,
            "quantize_s": round(time.monotonic() - started, 2), "threads": ql.info()["threads"],
            "perplexity": measure(quantized, texts, arguments.context, arguments.chunks),
            "bytes": quantized.size_report()["total"],
        }  # fmt: skip
        with arguments.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(
            name,
            {text: round(result["ppl"], 3) for text, result in record["perplexity"].items()},
            record["quantize_s"],
            "s",
        )


if __name__ == "__main__":
    main()
