"""GPTQ of LLaMA-2-7B's shapes on a GPU, from host memory to codes: seconds, peak device memory, one JSON line.

    python benchmarks/bench_gptq_cuda.py                                # 32 layers, 128 x 2048 tokens, W4 g128
    python benchmarks/bench_gptq_cuda.py --layers 2 --phases            # 2 layers; also the seconds of each step
    python benchmarks/bench_gptq_cuda.py --layers 2 --recommended 3

Weights are random bfloat16, one set of a layer's matrices that every layer shares: what is read, copied and computed is
that of a whole model. --phases runs the layers a second time and waits after each call, which adds some time itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from typing import Any

import ml_dtypes
import numpy as np

import quantlab as ql
from quantlab import _core, bench
from quantlab.llama_config import LINEARS, LlamaConfig

SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "model_type": "llama",
}
PRIME = 16_777_213  # numbers that the matrices repeat


class RandomModel:
    """A source whose layers are all the same."""

    tokenizer = None

    def __init__(self, layers: int, seed: int = 0):
        self.config = LlamaConfig({**SEVEN_B, "num_hidden_layers": layers})
        rng = np.random.default_rng(seed)
        c, f = self.config.hidden_size, self.config.intermediate_size

        values = (0.02 * rng.standard_normal(PRIME, np.float32)).astype(ml_dtypes.bfloat16)

        def matrix(n: int, k: int) -> ql.QuantWeight:
            return ql.QuantWeight.from_array(np.resize(values, (n, k)))

        shapes = {"gate_proj": (f, c), "up_proj": (f, c), "down_proj": (c, f)}
        self.linears = {linear: matrix(*shapes.get(linear.rsplit(".", 1)[-1], (c, c))) for linear in LINEARS}
        self.table = matrix(self.config.vocab_size, c)
        self.gain = np.ones(c, np.float32)

    def weight(self, module: str) -> ql.QuantWeight:
        return self.linears[module.split(".", 3)[-1]] if module.startswith("model.layers.") else self.table

    def vector(self, module: str) -> np.ndarray:
        return self.gain

    def has(self, module: str) -> bool:
        return True


def run(model: RandomModel, config: ql.GPTQConfig, rows: np.ndarray) -> float:
    started = time.perf_counter()
    ql.quantize(model, config, rows, progress=False, device="cuda")
    return time.perf_counter() - started


def phases(model: RandomModel, config: ql.GPTQConfig, rows: np.ndarray) -> dict[str, float]:
    """Seconds by call, each waited for."""
    seconds: dict[str, float] = defaultdict(float)
    small = _core.device_zeros(0, 1, 1)
    kept = {name: getattr(_core, name) for name in dir(_core) if name.startswith("device_") or name == "DeviceWeight"}

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            small.numpy()
            seconds[name] += time.perf_counter() - started
            return result

        return call

    for name in ("device_select", "device_selected", "device_gptq_supports"):
        kept.pop(name, None)
    try:
        for name, function in kept.items():
            setattr(_core, name, timed(name, function))
        total = run(model, config, rows)
    finally:
        for name, function in kept.items():
            setattr(_core, name, function)
    seconds["else"] = total - sum(seconds.values())
    return {name: round(value, 4) for name, value in sorted(seconds.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--recommended", type=int, metavar="BITS", help="GPTQConfig.recommended at these bits")
    parser.add_argument("--phases", action="store_true")
    options = parser.parse_args()
    config = ql.GPTQConfig.recommended(options.recommended) if options.recommended else ql.GPTQConfig()
    model = RandomModel(options.layers)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, SEVEN_B["vocab_size"], (options.rows, options.length)).astype(np.int32)
    ql.cuda.reset_peak()
    seconds = run(model, config, rows)
    memory = ql.cuda.memory()
    record = {
        "op": "gptq",
        "model": "llama-2-7b",
        "device": ql.info()["cuda"]["device"]["name"],
        "commit": bench._commit(),
        "layers": options.layers,
        "tokens": rows.size,
        "config": config.to_dict(),
        "seconds": round(seconds, 3),
        "peak_bytes": memory["peak"],
        "held_bytes": memory["held"],
    }
    if options.phases:
        record["phases"] = phases(model, config, rows)
        for name, value in record["phases"].items():
            print(f"{value:9.3f} s  {name}")
    peak, held = memory["peak"] / 1e9, memory["held"] / 1e9
    print(f"{seconds:.2f} s for {options.layers} layers; peak {peak:.2f} GB, held {held:.2f} GB")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
