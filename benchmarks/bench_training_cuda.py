"""LoRA training steps of LLaMA-2-7B's shapes on a GPU: seconds, tokens a second, peak device memory; and steps of
generation beside an adapter and without one; JSON lines.

    python benchmarks/bench_training_cuda.py                                  # all cases
    python benchmarks/bench_training_cuda.py --bases nf4 --cases 2048:none    # one of them
    python benchmarks/bench_training_cuda.py --cases --batches 1 32           # generation alone
    python benchmarks/bench_training_cuda.py --layers 2

A step of training is a batch of one row, its gradient and AdamW; r 8 on q, k, v and o, no dropout. A step of generation
is a token more for each of a batch's rows, after prompts of 32. The layers' weights are random, of the same codes, each
layer with a copy of its own on the device; embedding and head are bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import ml_dtypes
import numpy as np
from bench_gptq_cuda import SEVEN_B

import quantlab as ql
from quantlab import _core, bench
from quantlab.bench_cuda import steps_of
from quantlab.llama import LlamaForCausalLM
from quantlab.llama_config import LINEARS, LlamaConfig
from quantlab.lora import Adapter

BASES = {"nf4": ql.NF4Config(64, double_quant=True), "affine4 g128": ql.RTNConfig(4, 128)}
BATCHES = (1, 32)  # of generation
# the cases with least memory first: what ops work in only grows
CASES = ((512, "none"), (512, "full"), (2048, "full"), (2048, "selective"), (2048, "none"))
LORA = ql.LoraConfig(r=8, lora_alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
OPTIONS = (2e-4, 0.9, 0.999, 1e-8, 0.0)  # lr, beta1, beta2, eps, weight_decay


def random_model(base: str, layers: int) -> LlamaForCausalLM:
    """On the device, with a fresh adapter."""
    rng, config = np.random.default_rng(0), LlamaConfig({**SEVEN_B, "num_hidden_layers": layers})
    c, f = config.hidden_size, config.intermediate_size
    shapes = {"gate_proj": (f, c), "up_proj": (f, c), "down_proj": (c, f)}
    made = {
        shape: ql.QuantWeight.from_float(0.02 * rng.standard_normal(shape, np.float32), BASES[base])
        for shape in ((c, c), (f, c), (c, f))
    }
    table = (0.02 * rng.standard_normal((config.vocab_size, c), np.float32)).astype(ml_dtypes.bfloat16)
    weights = {name: ql.QuantWeight.from_array(table.copy()) for name in ("model.embed_tokens", "lm_head")}
    vectors = {"model.norm": np.ones(c, np.float32)}
    for layer in range(layers):
        for linear in LINEARS:
            shape = shapes.get(linear.rsplit(".", 1)[-1], (c, c))
            weights[f"model.layers.{layer}.{linear}"] = dataclasses.replace(made[shape])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            vectors[f"model.layers.{layer}.{norm}"] = np.ones(c, np.float32)
    model = LlamaForCausalLM(config, weights, vectors, device="cuda")
    return model.with_adapter(Adapter.fresh(LORA, model, 0))


class Steps:
    """Training steps over one random row."""

    def __init__(self, model: LlamaForCausalLM, tokens: int, policy: str):
        rng = np.random.default_rng(1)
        ids = rng.integers(0, SEVEN_B["vocab_size"], tokens).astype(np.int32)
        self.batch, self.targets = model.packed([ids]), np.append(ids[1:], np.int32(-100))
        self.policy, self.tokens, self.done = policy, tokens, 0
        vectors = [np.zeros_like(model.adapter.parameters) for _ in range(3)]
        self.moments = vectors[:2]
        self.trainer = _core.Trainer(model._core, model.lm_head.handle, vectors[2])

    def step(self) -> float:
        """Its seconds; the norm of the gradients comes back last, so the device has done it all."""
        started = time.perf_counter()
        self.trainer.zero()
        self.trainer.accumulate(*self.batch, self.targets, 1 / (self.tokens - 1), self.done, self.policy)
        self.done += 1
        self.trainer.step(*self.moments, *OPTIONS, self.done, 1.0)
        return time.perf_counter() - started


def measure(model: LlamaForCausalLM, base: str, tokens: int, policy: str, rounds: int) -> dict[str, Any]:
    ql.cuda.reset_peak()
    steps = Steps(model, tokens, policy)
    for _ in range(3):
        steps.step()
    seconds = [steps.step() for _ in range(rounds)]
    return {**facts("training", model, base, seconds, tokens), "tokens": tokens, "recompute": policy}


def facts(op: str, model: LlamaForCausalLM, base: str, seconds: list[float], tokens: int) -> dict[str, Any]:
    """What every record has; tokens: of a step."""
    p10, median, p90 = (float(value) for value in np.percentile(seconds, (10, 50, 90)))
    return {
        "op": op,
        "model": "llama-2-7b",
        "device": ql.info()["cuda"]["device"]["name"],
        "commit": bench._commit(),
        "layers": model.config.num_hidden_layers,
        "base": base,
        "r": LORA.r,
        "seconds": {"median": median, "p10": p10, "p90": p90},
        "tokens_per_second": tokens / median,
        "peak_bytes": ql.cuda.memory()["peak"],
    }


def generation(model: LlamaForCausalLM, base: str, batch: int) -> dict[str, Any]:
    rows = np.random.default_rng(2).integers(0, SEVEN_B["vocab_size"], (batch, 32)).astype(np.int32)
    ql.cuda.reset_peak()
    record = facts("generation", model, base, steps_of(model, list(rows), 128), batch)
    return {**record, "batch": batch, "adapter": model.adapter is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--cases", nargs="*", default=[f"{tokens}:{policy}" for tokens, policy in CASES])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    for base in options.bases:
        model = random_model(base, options.layers)
        for case in options.cases:
            tokens, policy = case.split(":")
            print(json.dumps(measure(model, base, int(tokens), policy, options.rounds)), flush=True)
        for batch in options.batches:
            print(json.dumps(generation(model, base, batch)), flush=True)
        model = model.without_adapter()
        for batch in options.batches:
            print(json.dumps(generation(model, base, batch)), flush=True)
        del model


if __name__ == "__main__":
    main()
