"""quantlab beside its peers in one process: same machine, same threads, same weights, interleaved rounds.

    python benchmarks/bench_peers.py --device cpu --texts tweets.txt --out benchmarks/results/peers-cpu.jsonl

Needs the extra `parity` (torch, transformers, bitsandbytes). One JSON line a case: the median, 10th and 90th
percentile of both in seconds, and the median, least and largest ratio of a round (peer / quantlab: above 1,
quantlab is faster).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import quantlab as ql
from quantlab import _core


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(case: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, **facts: object) -> dict:
    """Times both in turn after one warm-up each."""
    ours(), theirs()
    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(rounds)])
    ratios = pairs[:, 1] / pairs[:, 0]

    def spread(values: np.ndarray) -> dict[str, float]:
        return {name: float(np.percentile(values, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))}

    return {
        "case": case, **facts, "rounds": rounds, "quantlab_s": spread(pairs[:, 0]), "peer_s": spread(pairs[:, 1]),
        "ratio": {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())},
        "version": ql.info()["version"], "threads": _core.threads(), "isa": _core.isa_selected(),
    }  # fmt: skip


def hidden_states_case(texts: list[str], rounds: int) -> dict:
    """Last hidden states of texts in batches sorted by length: SmolLM2 in float32 against transformers in float32."""
    import torch
    import transformers

    model = ql.LlamaForSequenceClassification.from_pretrained("demo", num_labels=3)
    path = model.checkpoint.path
    peer = transformers.AutoModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    rows = sorted((model.encode(text) for text in texts), key=len)
    tokens = sum(len(row) for row in rows)

    def theirs(batch: int = 32) -> None:
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                group = rows[start : start + batch]
                ids = torch.zeros((len(group), max(map(len, group))), dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for index, row in enumerate(group):
                    ids[index, : len(row)] = torch.tensor(row.astype(np.int64))
                    mask[index, : len(row)] = 1
                peer(input_ids=ids, attention_mask=mask, use_cache=False)

    facts = {"peer": f"transformers {transformers.__version__} fp32", "texts": len(rows), "tokens": tokens}
    return compare("hidden_states", lambda: model.features(rows, show=False), theirs, rounds, **facts)


def nf4_cases(rounds: int) -> list[dict]:
    """4096 x 4096 float32 to NF4 and back, block 64."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    theirs, state = quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4")
    ours = ql.QuantWeight.from_float(w, ql.NF4Config(block_size=64))
    facts = {"peer": f"bitsandbytes {bitsandbytes.__version__} cpu", "shape": [4096, 4096]}
    return [
        compare(
            "nf4_quantize",
            lambda: ql.QuantWeight.from_float(w, ql.NF4Config(block_size=64)),
            lambda: quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4"),
            rounds, **facts,
        ),
        compare("nf4_dequantize", ours.dequantize, lambda: dequantize_4bit(theirs, state), rounds, **facts),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--texts", type=Path, help="one text a line; default: the demo's tweets")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(_core.threads())
    if arguments.texts:
        texts = arguments.texts.read_text().splitlines()[: arguments.limit]
    else:
        from quantlab.io.datasets import load_demo_tweets

        texts = load_demo_tweets()[0][: arguments.limit]
    records = [*nf4_cases(4 * arguments.rounds), hidden_states_case(texts, arguments.rounds)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        ratio = record["ratio"]
        print(f"{record['case']}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}) {record['peer']}")


if __name__ == "__main__":
    main()
