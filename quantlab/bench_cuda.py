"""`quantlab bench --device cuda`: the products, attention and conversions of a 7B LLaMA, and the whole model, on a GPU.

An op is recorded over copies of its arrays that the L2 cache cannot hold, and the recorded step is replayed: a time is
that of one launch among others, as in a model (cuda/bench.cu); activations of up to 64 tokens, which a model's op ahead
leaves in that cache, are not copied. Each case stands beside its roof, measured in the same
run: `read`, the time to read as many bytes; `copy`, to read and write as many; `matmul`, cuBLAS' product of bfloat16
matrices of its shape. Records have the fields of quantlab.bench; variant is "cuda", peer_ratio and error are None.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from quantlab import _core, cuda
from quantlab.bench import environment
from quantlab.generate import generation_steps
from quantlab.llama import BATCH_TOKENS, LlamaForCausalLM
from quantlab.llama_config import LINEARS, LlamaConfig
from quantlab.progress import progress
from quantlab.size import KNOWN_CONFIGS
from quantlab.weight import QuantWeight

MODEL = "llama-2-7b"
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
SHAPES = {"o": (HIDDEN, HIDDEN), "gate": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
FORMATS = ("affine4", "nf4", "affine8", "affine3", "affine2", "bf16")
FEW, MANY = (1, 8, 16, 32, 48, 64), (128, 512, 2048, 4096, 8192)
BLOCKS = (1, 2, 3, 4)  # a multiprocessor, of the roofs' kernels: the best counts
SAMPLES = 5
WARM_UP = 0.3  # seconds

Record = dict[str, Any]
Job = Callable[[], list[Record]]


@lru_cache(maxsize=32)
def weight(name: str, n: int, k: int) -> QuantWeight:
    """Random codes and scales: what they say does not matter here, that they are not zero does."""
    rng = np.random.default_rng(n + k)
    if name == "bf16":
        return QuantWeight.from_array((rng.standard_normal((n, k), dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16))
    if name in ("nf4", "fp4"):
        codes, blocks = rng.integers(0, 256, n * k // 2, dtype=np.uint8), n * k // 64
        return QuantWeight(name, 4, (n, k), 64, codes, (0.02 + 0.02 * rng.random(blocks)).astype(np.float32))
    bits = int(name.removeprefix("affine"))
    group = 64 if bits == 2 else 128
    words = rng.integers(0, 1 << 32, (n, k * bits // 32), dtype=np.uint32)
    scales = (0.002 + 0.002 * rng.random((n, k // group))).astype(np.float32)
    return QuantWeight("affine", bits, (n, k), group, words, scales)


@lru_cache
def roof(op: str, nbytes: int) -> float:
    """Seconds that the device needs to read, or to copy, so many bytes in all."""
    return min(float(np.median(_core.cuda_bench(op, n=nbytes // 64 * 64, m=blocks))) for blocks in BLOCKS)


@lru_cache
def matmul(op: str, m: int, n: int, k: int) -> float:
    """Seconds of cuBLAS' product of bfloat16 matrices."""
    return float(np.median(_core.cuda_bench(op, m=m, n=n, k=k)))


def record(
    op: str,
    format: str,
    shape: str,
    samples: Sequence[float] | np.ndarray,
    nbytes: float,
    flops: float,
    beside: tuple[str, float],
) -> Record:
    p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
    device = cuda.describe()["device"]
    return {
        **environment(), "machine": device["name"], "driver": device["driver"], "op": op, "format": format,
        "model": MODEL, "shape": shape, "variant": "cuda", "cold": True, "rounds": len(samples), "median_s": median,
        "p10_s": p10, "p90_s": p90, "gb_per_s": nbytes / median / 1e9, "gflop_per_s": flops / median / 1e9,
        "roof": beside[0], "roof_percent": 100 * beside[1] / median, "peer_ratio": None, "error": None,
    }  # fmt: skip


# ---- cases ---------------------------------------------------------------------------------------------------------

# a fused product: op of _core.cuda_bench, the matrices it takes, and the name of the whole
PRODUCTS = {
    "qkv": ("qkv", ("o", "o", "o")),
    "o": ("residual", ("o",)),
    "gate_up": ("gate_up", ("gate", "gate")),
    "down": ("residual", ("down",)),
}


def fused(format: str, product: str, m: int) -> list[Record]:
    """A product as the model calls it, with its rotation, SwiGLU or residual, on bfloat16 activations: few tokens
    beside the time to read the weights, many beside cuBLAS' product alone of all its matrices side by side."""
    op, parts = PRODUCTS[product]
    weights = [weight(format, *SHAPES[part]) for part in parts]
    sizes: dict[str, Any] = {"hq": HEADS, "hkv": HEADS, "d": HEAD_DIM} if op == "qkv" else {}
    samples = _core.cuda_bench(op, tuple(w.handle for w in weights), SAMPLES, m=m, **sizes)
    nbytes, count = sum(w.nbytes for w in weights), sum(w.shape[0] * w.shape[1] for w in weights)
    k = weights[0].shape[1]
    beside = ("read", roof("read", nbytes)) if m in FEW else ("matmul", matmul("matmul", m, count // k, k))
    return [record("product", format, f"{product} m{m}", samples, nbytes, 2 * m * count, beside)]


def many_tokens(format: str, part: str, m: int, backward: bool) -> list[Record]:
    n, k = SHAPES[part]
    w = weight(format, n, k)
    op = "linear_backward_input" if backward else "linear"
    samples = _core.cuda_bench(op, (w.handle,), SAMPLES, m=m)
    beside = ("matmul", matmul("matmul_backward" if backward else "matmul", m, n, k))
    return [record(op, format, f"{part} m{m}", samples, w.nbytes, 2 * m * n * k, beside)]


def attention(op: str, b: int, queries: int, keys: int) -> list[Record]:
    sizes: dict[str, Any] = {"b": b, "m": queries, "keys": keys, "hq": HEADS, "hkv": HEADS, "d": HEAD_DIM}
    samples = _core.cuda_bench(op, (), SAMPLES, **sizes)
    pairs = b * (queries * (keys - queries) + queries * (queries + 1) // 2)
    nbytes, products = 2 * b * HEADS * HEAD_DIM * (2 * keys + 2 * queries), 2
    if op == "attention_backward":  # of the scores, of q, k, v and of the weights
        nbytes, products = 2 * nbytes, 5
    flops = 2 * products * pairs * HEADS * HEAD_DIM
    beside = ("read", roof("read", nbytes))
    if queries > 1:  # against the rate of a large product
        beside = ("matmul", flops * matmul("matmul", 8192, 8192, 8192) / (2 * 8192**3))
    return [record(op, "bf16", f"b{b} t{queries} s{keys}", samples, nbytes, flops, beside)]


def dequantize(format: str) -> list[Record]:
    n, k = SHAPES["gate"]
    w = weight(format, n, k)
    samples = _core.cuda_bench("dequantize", (w.handle,), SAMPLES, n=n, k=k)
    nbytes = w.nbytes + 2 * n * k
    return [record("dequantize", format, f"n{n} k{k}", samples, nbytes, 0, ("copy", roof("copy", nbytes)))]


def quantize(format: str) -> list[Record]:
    n, k = SHAPES["gate"]
    group = k if format == "int8" else 64
    samples = _core.cuda_bench("quantize", (), SAMPLES, format=format, n=n, k=k, group=group)
    nbytes = 4 * n * k + n * k * (8 if format == "int8" else 4) // 8 + 4 * n * k // group
    return [record("quantize", format, f"n{n} k{k}", samples, nbytes, 0, ("copy", roof("copy", nbytes)))]


# ---- the model -----------------------------------------------------------------------------------------------------


def build_model(format: str) -> LlamaForCausalLM:
    config = LlamaConfig(KNOWN_CONFIGS[MODEL])
    shapes = {"q_proj": "o", "k_proj": "o", "v_proj": "o", "o_proj": "o", "gate_proj": "gate", "up_proj": "gate"}
    shapes["down_proj"] = "down"
    table = weight("bf16", config.vocab_size, HIDDEN)
    weights = {"model.embed_tokens": table, "lm_head": QuantWeight.from_array(table.codes.view(ml_dtypes.bfloat16))}
    ones = np.ones(HIDDEN, np.float32)
    vectors = {"model.norm": ones}
    for layer in range(config.num_hidden_layers):
        for name in LINEARS:
            stored = weight(format, *SHAPES[shapes[name.rsplit(".", 1)[1]]])
            same = (stored.format, stored.bits, stored.shape, stored.group, stored.codes, stored.scales)
            weights[f"model.layers.{layer}.{name}"] = QuantWeight(*same)  # a copy of its own on the device
        vectors |= {f"model.layers.{layer}.{norm}": ones for norm in ("input_layernorm", "post_attention_layernorm")}
    return LlamaForCausalLM(config, weights, vectors, device="cuda")


def seconds_of(run: Callable[[], Any], samples: int = SAMPLES) -> list[float]:
    """Of each of some runs, after so many that weights are packed and the clocks are up."""
    warm = time.perf_counter() + WARM_UP
    run()
    while time.perf_counter() < warm:
        run()
    found = []
    for _ in range(samples):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


def model(format: str) -> list[Record]:
    """Forward passes to each row's last hidden state (tweets one at a time: seconds a tweet), and greedy generation: of
    30 tokens after 2, as the LIMA study does, seconds in all; of 128 tokens after 32, seconds a step, prompts left out.
    gb_per_s counts the layers' weights once a pass."""
    llama = build_model(format)
    nbytes = sum(w.nbytes for name, w in llama.weights.items() if name.startswith("model.layers"))
    matrices = sum(w.shape[0] * w.shape[1] for name, w in llama.weights.items() if name.startswith("model.layers"))
    ids = np.random.default_rng(0).integers(0, 32000, (64, 2048)).astype(np.int32)
    read = ("read", roof("read", nbytes))
    cuda.reset_peak()
    found = []
    for b, t in ((1, 32), (1, 512), (64, 64), (1, 2048)):
        rows, keep = [ids[i, :t] for i in range(b)], np.arange(1, b + 1) * t - 1
        samples = seconds_of(partial(llama.packed_hidden, rows, keep=keep))
        found.append(record("model_forward", format, f"{b}x{t}", samples, nbytes, 2 * b * t * matrices, read))
    rows = tweets()
    samples = seconds_of(lambda: [predict(llama, group) for group in grouped(llama, rows)], 2)
    tokens = sum(map(len, rows))
    one = record("model_tweets", format, f"{len(rows)} rows", samples, nbytes, 2 * tokens * matrices, read)
    found.append({**one, "tokens_per_s": tokens / one["median_s"]})
    few = rows[:256]
    samples = [s / len(few) for s in seconds_of(lambda: [predict(llama, [row]) for row in few], 3)]
    found.append(record("model_tweets", format, "1 row at a time", samples, nbytes, 0, read))
    for b in (1, 2, 4, 8, 16, 32):
        samples = seconds_of(partial(short_generation, llama, [ids[i, :2] for i in range(b)]))
        found.append(
            record("model_generate", format, f"b{b}, 30 tokens", samples, 30 * nbytes, 60 * b * matrices, read)
        )
    for b in (1, 8, 32):
        samples = steps_of(llama, [ids[i, :32] for i in range(b)], 128)
        one = record("model_generate", format, f"b{b}", samples, nbytes, 2 * b * matrices, read)
        found.append({**one, "tokens_per_s": b / one["median_s"], "peak_device_bytes": cuda.memory()["peak"]})
    return found


def tweets(count: int = 12284) -> list[np.ndarray]:
    """Random ids with about the lengths of the study's test tweets: 30 tokens, from 5 to 90."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(27), 0.45, count), 5, 90).astype(int)
    return [rng.integers(0, 32000, length).astype(np.int32) for length in lengths]


def grouped(llama: LlamaForCausalLM, rows: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [[rows[index] for index in group] for group in llama.batches(rows, BATCH_TOKENS)]


def predict(llama: LlamaForCausalLM, rows: list[np.ndarray]) -> np.ndarray:
    return llama.packed_hidden(rows, keep=np.cumsum([len(row) for row in rows]) - 1)


def short_generation(llama: LlamaForCausalLM, prompts: list[np.ndarray]) -> None:
    for _ in generation_steps(llama, prompts, 30):
        pass


def steps_of(llama: LlamaForCausalLM, prompts: list[np.ndarray], tokens: int) -> list[float]:
    """Seconds a step over the last hundred of each of three generations."""
    found = []
    for _ in range(4):
        marks = [time.perf_counter() for _ in generation_steps(llama, prompts, tokens)]
        found.append((marks[-1] - marks[-101]) / 100)
    return found[1:]


# ---- all of it -----------------------------------------------------------------------------------------------------


def product_jobs() -> Iterator[Job]:
    for format in FORMATS:
        for product in PRODUCTS:
            yield from (partial(fused, format, product, m) for m in FEW)
            if format in ("affine4", "nf4"):
                yield from (partial(fused, format, product, m) for m in MANY)


def linear_jobs(backward: bool) -> Iterator[Job]:
    for format in ("affine4", "nf4"):
        for part in SHAPES:
            yield from (partial(many_tokens, format, part, m, backward) for m in MANY[2 * backward :])


OPS: dict[str, Callable[[], Iterator[Job]]] = {
    "product": product_jobs,
    "linear": lambda: linear_jobs(False),
    "linear_backward_input": lambda: linear_jobs(True),
    "attention": lambda: (
        partial(attention, "attention", b, queries, keys)
        for b, queries, keys in (
            (1, 2048, 2048),
            (1, 8192, 8192),
            (64, 64, 64),
            (1, 1, 160),
            (8, 1, 160),
            (32, 1, 160),
            (1, 1, 2048),
        )
    ),
    "attention_backward": lambda: (
        partial(attention, "attention_backward", 1, keys, keys) for keys in (512, 2048, 8192)
    ),
    "dequantize": lambda: (partial(dequantize, format) for format in FORMATS if format != "bf16"),
    "quantize": lambda: (partial(quantize, format) for format in ("nf4", "fp4", "int8")),
    "model": lambda: (partial(model, format) for format in ("affine4", "nf4")),
}


def run(ops: Sequence[str] = (), show_progress: bool = True) -> list[Record]:
    """Times every case of the ops (all without names). ValueError: no such op. CudaError: CUDA cannot be used."""
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"op: got {unknown[0]!r}, expected one of {', '.join(OPS)}")
    cuda.device_number("cuda")
    records: list[Record] = []
    for op in ops or OPS:
        jobs = list(OPS[op]())
        with progress(len(jobs), op, "case", show_progress) as bar:
            for job in jobs:
                records += job()
                bar.advance()
    return records
