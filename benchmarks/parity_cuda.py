"""Codes that a GPU gives beside those of the CPU, over all linear matrices of a model; one JSON line a method.

    python benchmarks/parity_cuda.py --model demo --out benchmarks/results/cuda-h100-codes.jsonl

GPTQ starts from one and the same Hessian on both: the second moments of what enters the matrix when the float model
reads the demo's tweets. A weight on the tie between two codes may go either way, and with it the later columns of its
row: `rows` counts the rows of such ties, `codes` all codes that differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import quantlab as ql
from quantlab import bench, gptq
from quantlab.calibration import STAGES, Activations, advance, chunks_of
from quantlab.io.datasets import load_demo_tweets

GPTQ = {
    "gptq-4": ql.GPTQConfig(4, 64),
    "gptq-3": ql.GPTQConfig(3, 64),
    "gptq-8": ql.GPTQConfig(8, 64),
    "gptq-4 asymmetric, act-order": ql.GPTQConfig(4, 64, sym=False, desc_act=True),
    "gptq-4-r": ql.GPTQConfig.recommended(4, group_size=64),
}
OTHERS = {"nf4": ql.NF4Config(), "fp4": ql.FP4Config(), "int8": ql.Int8Config(), "rtn-4": ql.RTNConfig(4, 64)}


def matrices(model: ql.LlamaForCausalLM, rows: list[np.ndarray]) -> Iterator[tuple[np.ndarray, gptq.Hessian]]:
    """The values (n, k) and the Hessian of every linear matrix."""
    run = Activations(model.config, chunks_of(rows), model.weight("model.embed_tokens").handle)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        norms = tuple(model.vector(f"{prefix}{name}") for name in ("input_layernorm", "post_attention_layernorm"))
        steps = run.layer(norms)
        inputs = next(steps)
        for stage in STAGES:
            weights = {module: model.weight(prefix + module) for module in stage}
            hessian = gptq.Hessian(next(iter(weights.values())).shape[1])
            for chunk in range(len(run.chunks)):
                hessian.add(inputs(chunk))
            for weight in weights.values():
                yield weight.dequantize(), hessian
            inputs = advance(steps, {module: weight.handle for module, weight in weights.items()})


def quantized(name: str, w: np.ndarray, hessian: gptq.Hessian) -> ql.QuantWeight:
    return gptq.quantize(w, hessian, GPTQ[name])[0] if name in GPTQ else ql.QuantWeight.from_float(w, OTHERS[name])


def differing(found: ql.QuantWeight, expected: ql.QuantWeight) -> tuple[int, int]:
    """Rows that differ in a code, a scale or a zero point, and codes that differ."""
    codes = found.stored_codes() != expected.stored_codes()
    rows = codes.any(1)
    for name in ("scales", "zeros"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if mine is not None:
            rows |= (np.asarray(mine) != np.asarray(theirs)).reshape(len(rows), -1).any(1)
    return int(rows.sum()), int(codes.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=16, help="of 256 tokens")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = ql.LlamaForCausalLM.from_pretrained(arguments.model)
    ids = np.concatenate([model.encode(text) for text in load_demo_tweets()[0]])
    rows = list(ids[: arguments.rows * 256].reshape(-1, 256))
    counts = {name: np.zeros(4, np.int64) for name in (*GPTQ, *OTHERS)}
    for w, hessian in matrices(model, rows):
        for name in counts:
            expected = quantized(name, w, hessian)
            with ql.backend.use(device=arguments.device):
                found = quantized(name, w, hessian)
            counts[name] += (1, w.size, *differing(found, expected))
    facts = {"model": arguments.model, "device": (ql.info()["cuda"]["device"] or {}).get("name")}
    facts["commit"] = bench.environment()["commit"]
    with arguments.out.open("w") as out:
        for name, (count, size, differing_rows, codes) in counts.items():
            record = {"method": name, "matrices": int(count), "values": int(size), "rows": int(differing_rows)}
            line = json.dumps({**record, "codes": int(codes), **facts})
            out.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
