"""quantlab beside its peers in one process: same machine, same threads, same weights, interleaved rounds.

    python benchmarks/bench_peers.py --device cpu --q4_0 SmolLM2-Q4_0.gguf --out benchmarks/results/peers-cpu.jsonl

Needs the extra `peers` (torch, transformers, peft, bitsandbytes, llama-cpp-python). gcc 12 builds a llama.cpp that
crashes in its AMX path, and clang 14 one without that path; `, AMX` in its name says that it is there. So:

    CC=clang-16 CXX=clang++-16 CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON \\
        -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_AVX_VNNI=ON -DGGML_AMX_TILE=ON -DGGML_AMX_INT8=ON \\
        -DGGML_AMX_BF16=ON" pip install --no-binary llama-cpp-python llama-cpp-python

`--cases` chooses among products, nf4, hidden_states, llama_cpp and training; a peer that is not installed is left out
and said. `--q4_0` is the demo's model as Q4_0, for llama.cpp; without it, it is made here.

One JSON line a case and peer: the median, 10th and 90th percentile of both in seconds, the median, least and largest
ratio of a round (peer / quantlab: above 1, quantlab is faster), and the roofs of the machine measured in the same run.
`--keep` keeps the lines of the cases that are not run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import quantlab as ql
from quantlab import _core, bench
from quantlab.generate import generation_steps
from quantlab.lora import Adapter

SETTLE_S = 0.25  # OpenMP's threads spin this long after a call: nobody is timed beside another's spinning
PROMPT, GENERATED, BATCH = 512, 128, 32
DEPTH, STEPS = 4096, 16  # tokens before those that are timed, and how many these are
Call = Callable[[], object]


def seconds(call: Call, times: int = 1) -> float:
    time.sleep(SETTLE_S)
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def spread(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))}


@lru_cache
def roofs(threads: int) -> dict[str, float]:
    with ql.backend.use(threads=threads):
        measured = bench.roofs()
    return {"read_gb_per_s": measured.read / 1e9, "fma_gflop_per_s": measured.fma / 1e9}


def compare(
    case: str, ours: Call, peers: dict[str, Call], rounds: int, threads: int, times: int = 1, **facts: object
) -> list[dict[str, Any]]:
    """Times ours and each peer in turn, `times` calls at once, after one warm-up each: a record a peer. facts: tokens,
    flops or bytes of one call make its rate."""
    roof = roofs(threads)
    with ql.backend.use(threads=threads):
        for call in (ours, *peers.values()):
            call()
        timed = np.array([[seconds(call, times) for call in (ours, *peers.values())] for _ in range(rounds)])
    records = []
    for column, peer in enumerate(peers, start=1):
        ratios = timed[:, column] / timed[:, 0]
        ratio = {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())}
        record = {
            "case": case, "peer": peer, **facts, "rounds": rounds, "quantlab_s": spread(timed[:, 0]),
            "peer_s": spread(timed[:, column]), "ratio": ratio, "version": ql.info()["version"], "threads": threads,
            "isa": _core.isa_selected(), "roofs": roof,
        }  # fmt: skip
        print(f"{case}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}) {peer}", flush=True)
        records.append(record)
    return records


# ---- single products -----------------------------------------------------------------------------------------------


def products(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """y = x W^T at 4096 x 4096 in 4 bits, one token, 8 and 512, on one thread and on all."""
    import torch
    from bitsandbytes.nn import Linear4bit

    n = k = 4096
    dense = np.random.default_rng(0).standard_normal((n, k), np.float32) / 64
    weights = {"affine4": ql.RTNConfig(4, 64), "nf4": ql.NF4Config(64)}
    quantized = {name: ql.QuantWeight.from_float(dense, config) for name, config in weights.items()}
    matrix = torch.from_numpy(dense).to(torch.bfloat16)
    layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data = torch.from_numpy(dense)
    layer = layer.to("cpu").eval()
    for threads in sorted({1, arguments.threads}):
        torch.set_num_threads(threads)
        for m in (1, 8, PROMPT):
            x = np.random.default_rng(1).standard_normal((m, k), np.float32)
            half = torch.from_numpy(x).to(torch.bfloat16)

            def torch_bf16(half: Any = half) -> None:
                with torch.no_grad():
                    torch.nn.functional.linear(half, matrix)

            def bnb(half: Any = half) -> None:
                with torch.no_grad():
                    layer(half)

            for name, weight in quantized.items():
                ours = lambda w=weight.handle, x=x: _core.linear(x, w)  # noqa: E731  a new output a call, as theirs
                yield compare(
                    f"linear {name}, m {m}", ours, {f"torch {torch.__version__} bf16": torch_bf16, bnb_name(): bnb},
                    arguments.rounds, threads, 1 if m == PROMPT else 20, flops=2 * m * n * k, bytes=weight.nbytes,
                )  # fmt: skip


def bnb_name() -> str:
    import bitsandbytes

    return f"bitsandbytes {bitsandbytes.__version__} nf4"


def nf4(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """4096 x 4096 float32 to NF4 and back, block 64."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    tensor = torch.from_numpy(w)
    theirs, state = quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    ours = ql.QuantWeight.from_float(w, ql.NF4Config(block_size=64))
    torch.set_num_threads(arguments.threads)
    cases: dict[str, tuple[Call, Call]] = {
        "nf4 quantize": (
            lambda: ql.QuantWeight.from_float(w, ql.NF4Config(block_size=64)),
            lambda: quantize_4bit(tensor, blocksize=64, quant_type="nf4"),
        ),
        "nf4 dequantize": (ours.dequantize, lambda: dequantize_4bit(theirs, state)),
    }
    for case, (mine, peer) in cases.items():
        yield compare(case, mine, {bnb_name(): peer}, 2 * arguments.rounds, arguments.threads, bytes=w.nbytes)


# ---- hidden states -------------------------------------------------------------------------------------------------


def hidden_states(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Last hidden states of tweets in batches sorted by length, our weights in float32 and in bfloat16; transformers
    with float32 weights and a mask, and its fastest way: bfloat16 without a mask."""
    import torch
    import transformers

    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    models = {
        name: ql.LlamaForSequenceClassification.from_pretrained("demo", num_labels=3, dtype=dtype)
        for name, dtype in dtypes.items()
    }
    path = models["fp32"].checkpoint.path
    torch.set_num_threads(arguments.threads)
    rows = sorted((models["fp32"].encode(text) for text in tweets(arguments)), key=len)

    def peer(dtype: Any, masked: bool) -> Call:
        theirs = transformers.AutoModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        theirs = theirs.to(dtype).eval()

        def run() -> None:
            with torch.no_grad():
                for start in range(0, len(rows), BATCH):
                    ids, mask = padded(rows[start : start + BATCH])
                    theirs(input_ids=ids, attention_mask=mask if masked else None, use_cache=False)

        return run

    peers = {
        f"transformers {transformers.__version__} {name}": peer(dtype, masked)
        for name, dtype, masked in (("fp32", torch.float32, True), ("bf16", torch.bfloat16, False))
        if name in arguments.dtypes
    }
    facts = {"texts": len(rows), "tokens": sum(len(row) for row in rows)}
    for name, model in models.items():
        ours = lambda model=model: model.features(rows, show=False)  # noqa: E731
        yield compare(
            f"hidden states of tweets, ours {name}", ours, peers, arguments.rounds, arguments.threads, **facts
        )


def tweets(arguments: argparse.Namespace) -> list[str]:
    if arguments.texts:
        return arguments.texts.read_text().splitlines()[: arguments.limit]
    from quantlab.io.datasets import load_demo_tweets

    return load_demo_tweets()[0][: arguments.limit]


def padded(rows: list[np.ndarray]) -> tuple[Any, Any]:
    """Token ids and mask of a batch, padded on the right."""
    import torch

    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row.astype(np.int64))
        mask[index, : len(row)] = 1
    return ids, mask


# ---- llama.cpp -----------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp on the same tokens, greedy: the calls of its C interface, without Python's sampling."""

    def __init__(self, path: Path, threads: int, context: int):
        import llama_cpp

        self.lib = llama_cpp
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        self.vocabulary = self.llama.n_vocab()

    def next(self, tokens: list[int]) -> int:
        """The likeliest token after `tokens`, which go on from those before."""
        context = self.llama._ctx.ctx
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(context, self.lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, -1), (self.vocabulary,))
        return int(logits.argmax())

    def steps(self, prompt: list[int]) -> Iterator[int]:
        """Token after token that follows the prompt."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.llama._ctx.ctx), True)
        while True:
            for first in range(0, len(prompt), PROMPT):
                token = self.next(prompt[first : first + PROMPT])
            yield token
            prompt = [token]

    def generate(self, prompt: list[int], count: int) -> list[int]:
        return list(islice(self.steps(prompt), count))


def make_q4_0(source: Path, target: Path) -> None:
    import ctypes

    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def llama_cpp(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A prompt of 512 tokens, 128 tokens after one, and tokens after 4,096, in a context of that size: 4-bit weights of
    4.5 bits, output matrix in 8 bits, both."""
    import llama_cpp as library

    model = ql.LlamaForCausalLM.from_pretrained("demo")
    embedding = ql.QuantWeight.from_float(model.weights["model.embed_tokens"].dequantize(), ql.Int8Config())
    ours = ql.quantize(model, ql.RTNConfig(4, 64, sym=True), progress=False).replace({"model.embed_tokens": embedding})
    ids = np.resize(np.concatenate([model.encode(text) for text in tweets(arguments)[:100]]), PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.q4_0
        if path is None:
            path = Path(folder) / "q4_0.gguf"
            make_q4_0(model.checkpoint.path, path)
        theirs = LlamaCpp(path, arguments.threads, PROMPT + GENERATED)
        prompt, start = [int(token) for token in ids], [int(ids[0])]
        system = library.llama_print_system_info().decode()
        name = f"llama.cpp ({library.__version__}) Q4_0{', AMX' if 'AMX_INT8 = 1' in system else ''}"
        for case, tokens, mine, peer in (
            ("prompt", PROMPT, lambda: ours.generate(ids, 1), lambda: theirs.generate(prompt, 1)),
            ("generation", GENERATED, lambda: ours.generate(ids[:1], GENERATED, eos_token_id=[]),
             lambda: theirs.generate(start, GENERATED)),
        ):  # fmt: skip
            yield compare(
                f"{case}, {tokens} tokens", mine, {name: peer}, arguments.rounds, arguments.threads, tokens=tokens
            )
        deep = np.resize(ids, DEPTH)
        deeper = LlamaCpp(path, arguments.threads, DEPTH + 2 * STEPS * (arguments.rounds + 1))
        after = (generation_steps(ours, [deep], DEPTH), deeper.steps(deep.tolist()))
        mine, peer = (lambda steps=steps: next(steps) for steps in after)
        yield compare(
            f"generation after {DEPTH:,} tokens",
            mine,
            {name: peer},
            arguments.rounds,
            arguments.threads,
            STEPS,
            tokens=1,
        )


# ---- training ------------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def training(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A step of LoRA (r 8, q k v o, no dropout) on one row of 512 tokens: forward, backward, clipping, AdamW."""
    import peft
    import torch
    import transformers

    model = ql.LlamaForCausalLM.from_pretrained("demo")
    ids = np.resize(np.concatenate([model.encode(text) for text in tweets(arguments)[:100]]), PROMPT).astype(np.int32)
    torch.set_num_threads(arguments.threads)

    def peer(dtype: Any) -> Call:
        path = model.checkpoint.path
        base = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=TARGETS)
        tuned = peft.get_peft_model(base.to(dtype), config).train()
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer, row = (
            torch.optim.AdamW(trained, 2e-4, weight_decay=0.0),
            torch.from_numpy(ids.astype(np.int64))[None],
        )

        def step() -> None:
            tuned(input_ids=row, labels=row).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    versions = f"transformers {transformers.__version__} + PEFT {peft.__version__}"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peers = {f"{versions} {name}": peer(dtypes[name]) for name in arguments.dtypes}
    bases = {"bf16": ql.LlamaForCausalLM.from_pretrained("demo", dtype="bfloat16")}
    # the rest in bf16, as bitsandbytes has it
    bases["NF4"] = ql.quantize(bases["bf16"], ql.NF4Config(), progress=False)
    for name, base in bases.items():
        case = f"training step, {PROMPT} tokens, ours over {name}"
        yield compare(case, step_of(base, ids), peers, arguments.rounds, arguments.threads, tokens=PROMPT)


def step_of(base: ql.LlamaForCausalLM, ids: np.ndarray) -> Call:
    """Our step: what `ql.finetune` does between two entries of its log."""
    adapter = Adapter.fresh(ql.LoraConfig(8, 32, 0.0, TARGETS), base)
    tuned = base.with_adapter(adapter)
    gradients, mean, square = (np.zeros_like(adapter.parameters) for _ in range(3))
    trainer = _core.Trainer(tuned._core, tuned.lm_head.handle, gradients)
    batch, targets = tuned.packed([ids]), np.append(ids[1:], np.int32(-100)).astype(np.int32)

    def step() -> None:
        gradients.fill(0.0)
        trainer.accumulate(*batch, targets, 1 / (len(ids) - 1), 0, "none")
        _core.adamw(adapter.parameters, mean, square, gradients, 2e-4, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)

    return step


CASES = {
    "products": products, "nf4": nf4, "hidden_states": hidden_states, "llama_cpp": llama_cpp, "training": training,
}  # fmt: skip


def kept(path: Path, cases: list[str], keep: bool) -> dict[str, list[dict[str, Any]]]:
    """The records at hand of each group of cases that is not run again."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    if keep and path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["group"] not in cases:
                found[record["group"]].append(record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--texts", type=Path, help="one text a line; default: the demo's tweets")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument(
        "--dtypes", nargs="*", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="of transformers"
    )
    parser.add_argument("--q4_0", type=Path, help="the demo's model as Q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_core.threads())
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    groups = kept(arguments.out, arguments.cases, arguments.keep)
    for name in arguments.cases:
        try:
            for records in CASES[name](arguments):
                groups[name] += [{"group": name, **record} for record in records]
        except ImportError as error:
            print(f"{name}: left out: {error}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for found in groups.values() for record in found))


if __name__ == "__main__":
    main()
