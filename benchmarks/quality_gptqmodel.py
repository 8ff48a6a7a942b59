"""Quantizes a plain checkpoint with GPTQModel, on quantlab's calibration rows, for bench_quality.py to measure.

    python benchmarks/quality_gptqmodel.py plain-dir calibration.txt out-dir --bits 4 --group-aware
    python benchmarks/bench_quality.py ... --load out-dir

Runs in an environment of its own: GPTQModel asks for more than it needs, so `pip install --no-deps gptqmodel` beside
torch, with GPTQMODEL_CPU_WORKERS=2 on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--group-aware", action="store_true", help="GPTQModel's default order of columns")
    parser.add_argument("--head", action="store_true", help="calibrate on the first rows of the text")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    import gptqmodel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    ids = tokenizer(arguments.calibration.read_text())["input_ids"]
    rows = [ids[i : i + arguments.context] for i in range(0, len(ids) - arguments.context + 1, arguments.context)]
    chosen = range(arguments.rows) if arguments.head else np.linspace(0, len(rows) - 1, arguments.rows).astype(int)
    rows = [rows[i] for i in chosen]  # as quantlab.calibration.spread_rows has it
    config = gptqmodel.QuantizeConfig(
        bits=arguments.bits, group_size=arguments.group_size, sym=True, desc_act=False,
        act_group_aware=arguments.group_aware, damp_percent=arguments.damp,
    )  # fmt: skip
    model = gptqmodel.GPTQModel.load(str(arguments.source), config)
    started = time.perf_counter()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    seconds = time.perf_counter() - started
    model.save(str(arguments.out))
    print(json.dumps({"gptqmodel": gptqmodel.__version__, "bits": arguments.bits, "quantize_s": round(seconds, 1)}))


if __name__ == "__main__":
    main()
