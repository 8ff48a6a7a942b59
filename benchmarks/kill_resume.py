"""kill -9 at random moments of a quantization and of a study; each resumed run must end as one that was never stopped.

    python benchmarks/kill_resume.py --kills 20

Every kill has a run directory of its own: the run is killed at a moment drawn from the time that a whole run takes, run
again to its end, and compared: the codes of every matrix byte by byte, the cells by their measures. Uses the tiny model
of the tests. Prints one JSON line a part; exits 1 at the first difference.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
QUANTIZE = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import quantlab as ql
from test_quantize_model import killed_model, killed_rows
print("ready", flush=True)
config = ql.GPTQConfig.recommended(3, group_size=32)
model = ql.quantize(killed_model(), config, killed_rows(), progress=False, resume_dir=sys.argv[2])
digest = hashlib.sha256()
for module in sorted(model.weights):
    weight = model.weights[module]
    for part in (weight.codes, weight.scales, weight.zeros):
        digest.update(b"" if part is None else part.tobytes())
print(digest.hexdigest(), flush=True)
"""
STUDY = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from quantlab.experiments import tweeteval
from test_experiments import comparable
config = tweeteval.TweetEvalConfig.from_file(sys.argv[3])
print("ready", flush=True)
tweeteval.run(config, sys.argv[2], progress=False)
cells = json.dumps(comparable(Path(sys.argv[2])), sort_keys=True, default=str)
print(hashlib.sha256(cells.encode()).hexdigest(), flush=True)
"""


def whole(command: list[str]) -> tuple[str, float]:
    """The digest that an undisturbed run prints, and its seconds from `ready` to the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            sys.exit("the run did not start")
        started = time.monotonic()
        digest = process.stdout.read().strip()
    if process.returncode != 0:
        sys.exit(f"the run failed with status {process.returncode}")
    return digest, time.monotonic() - started


def killed(command: list[str], delay: float) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)


def part(name: str, code: str, extra: list[str], kills: int, folder: Path) -> None:
    def command(run: Path) -> list[str]:
        return [sys.executable, "-c", code, str(TESTS), str(run), *extra]

    expected, seconds = whole(command(folder / f"{name}-whole"))
    moments = random.Random(0)
    for index in range(kills):
        run = folder / f"{name}-{index}"
        killed(command(run), moments.uniform(0.0, seconds))
        digest, _ = whole(command(run))
        if digest != expected:
            sys.exit(f"{name}: after kill {index} the resumed run ended differently")
        shutil.rmtree(run, ignore_errors=True)
    print(json.dumps({"case": name, "kills": kills, "equal": kills, "whole_s": round(seconds, 2), "sha256": expected}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        part("quantization", QUANTIZE, [], arguments.kills, folder)
        config = study_config(folder)
        part("study", STUDY, [str(config)], arguments.kills, folder)


def study_config(folder: Path) -> Path:
    """A small study on the tests' tiny checkpoint and tweets."""
    from test_experiments import settings, write_tiny

    path = folder / "study.json"
    tiny = write_tiny(folder / "tiny")
    path.write_text(json.dumps(settings(tiny, variants=("fp32", "gptq-4", "nf4")).to_dict()))
    return path


if __name__ == "__main__":
    main()
