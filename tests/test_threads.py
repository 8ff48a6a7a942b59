"""Threads: the same result for any number of them, after a fork, from many Python threads; how many; Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference as ref

import quantlab as ql
from quantlab import _core

THREADS = (1, 2, 3, 5)
TIMEOUT = 60.0  # seconds: a hang, not a slow machine


def all_ops(rng: np.random.Generator) -> dict[str, Callable[[], np.ndarray]]:
    """Every op, large enough for more tasks than threads; a new output each call."""

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def after(into: Callable, y: np.ndarray, *arguments) -> np.ndarray:
        into(y, *arguments)
        return y

    def flat(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([a.ravel() for a in arrays])

    x, gain, q, k, v = floats(200, 301), floats(301), floats(150, 6, 32), floats(150, 2, 32), floats(150, 2, 32)
    ranges = np.array([0, 100, 150]), np.array([50, 0]), np.array([100, 50])
    positions, angles = np.arange(150, dtype=np.int32), rng.uniform(0, 6, (150, 16)).astype(np.float32)
    targets, lse = rng.integers(0, 301, 200).astype(np.int32), np.full(q.shape[:2], 9, np.float32)
    ops: dict[str, Callable[[], np.ndarray]] = {
        "rmsnorm": lambda: _core.rmsnorm(x, gain, 1e-5),
        "rope": lambda: _core.rope(q, np.cos(angles), np.sin(angles), positions),
        "attention": lambda: _core.attention(q, k, v, *ranges, 0.2),
        "swiglu": lambda: _core.swiglu(x, x[::-1].copy()),
        "add": lambda: after(_core.add_into, x.copy(), x),
        "cross_entropy": lambda: flat(_core.cross_entropy(x, targets, True)),
        "attention_backward": lambda: flat(_core.attention_backward(q, q, k, v, q, lse, *ranges, 0.2)),
        "rmsnorm_backward": lambda: _core.rmsnorm_backward(x, x, gain, x[:, 0].copy()),
        "swiglu_backward": lambda: flat(_core.swiglu_backward(x, x, x)),
        "dropout": lambda: _core.dropout(x, 0.5, 1, 2),
        "adamw": lambda: after(
            _core.adamw, x.ravel().copy(), *[x.ravel() ** 2] * 2, x.ravel(), 1e-3, 0.9, 0.9, 1e-8, 0, 1, 1
        ),
        "gram": lambda: after(_core.gram_into, np.zeros((301, 301), np.float32), x, x, True),
    }
    for format in ref.FORMATS:
        weight = ref.random_weight(rng, format, 190, 301).core()
        dy, ids = floats(200, 190), rng.integers(0, 190, 400).astype(np.int32)
        ops[f"linear {format}"] = lambda w=weight: _core.linear(x, w)
        ops[f"linear, one row, {format}"] = lambda w=weight: _core.linear(x[:1], w)
        ops[f"linear_backward_input {format}"] = lambda w=weight, dy=dy: _core.linear_backward_input(dy, w)
        ops[f"decode {format}"] = lambda w=weight: _core.decode(w, 0, 190)
        ops[f"embedding {format}"] = lambda w=weight, ids=ids: _core.embedding(ids, w)
    for format in ("nf4", "fp4", "int8"):
        quantize = lambda f=format: [a.tobytes() for a in _core.quantize(x, f, 301 if f == "int8" else 64)]  # noqa: E731
        ops[f"quantize {format}"] = lambda q=quantize: np.frombuffer(b"".join(q()), np.uint8)
    return ops


def test_same_bits_for_any_number_of_threads(isa: str, rng: np.random.Generator) -> None:
    for name, op in all_ops(rng).items():
        with ql.backend.use(threads=1):
            alone = op()
        for threads in THREADS[1:]:
            with ql.backend.use(threads=threads):
                assert op().tobytes() == alone.tobytes(), f"{name}: {threads} threads"


def test_concurrent_calls_are_right(isa: str, rng: np.random.Generator) -> None:
    """Python threads call at the same time, each of them with threads of its own."""
    ops = {name: (op, op().tobytes()) for name, op in all_ops(rng).items()}
    wrong: list[str] = []

    def caller(seed: int) -> None:
        for name in np.random.default_rng(seed).permutation(list(ops)):
            op, expected = ops[name]
            if op().tobytes() != expected:
                wrong.append(name)

    with ql.backend.use(threads=2):
        callers = [threading.Thread(target=caller, args=(seed,), daemon=True) for seed in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a call hangs"
    assert wrong == []


def without(name: str) -> dict[str, str]:
    """The environment less one variable."""
    return {key: value for key, value in os.environ.items() if key != name}


def test_pool_under_thread_sanitizer(tmp_path: Path) -> None:
    """tests/pool_race.c: concurrent callers, nested regions and a changing number of threads, without a data race."""
    here = Path(__file__).resolve().parent
    core, compiler = here.parent / "csrc" / "core", shutil.which(os.environ.get("CC", "gcc").split()[0])
    if compiler is None or not core.is_dir():
        pytest.skip("no C compiler, or no source tree beside the tests")
    program, sources = tmp_path / "pool_race", [here / "pool_race.c", core / "parallel.c", core / "topology.c"]
    command = [compiler, "-std=c11", "-O1", "-g", "-fsanitize=thread", *sources, "-o", program, "-lpthread", "-lm"]
    environment = without("LD_PRELOAD")  # another sanitizer's, where the tests run under one
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    if built.returncode != 0:
        pytest.skip(f"this compiler has no ThreadSanitizer: {built.stderr[-200:]}")
    ran = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("ThreadSanitizer cannot run on this kernel")
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr


def test_default_is_the_cores_of_the_affinity_mask() -> None:
    one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    code = f"{one}\nfrom quantlab import _core\nprint(_core.threads())"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=without("QL_THREADS"), timeout=TIMEOUT
    )
    assert ran.stdout == "1\n", ran.stderr


def test_woken_workers_keep_off_the_callers_cpu() -> None:
    """Linux may put a worker on the caller's CPU though another is idle, and leave it there for ten milliseconds."""
    code = """
import os, time
import numpy as np
from quantlab import _core
home = os.sched_getaffinity(0)
x = np.ones((64, 512), np.float32)
def masks():
    _core.rmsnorm(x, np.ones(512, np.float32), 1e-5)
    return [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
_core.set_threads(2)
masks()
for cpu in sorted(home)[:2]:
    time.sleep(0.1)  # the worker sleeps
    os.sched_setaffinity(0, {cpu})
    print(home - {cpu} in masks())
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.stdout == "True\nTrue\n", ran.stdout + ran.stderr


# ---- fork ----------------------------------------------------------------------------------------------------------


def threaded_product() -> bytes:
    rng = np.random.default_rng(0)
    weight = ref.random_weight(rng, "f32", 300, 300).core()
    return _core.linear(rng.standard_normal((100, 300), dtype=np.float32), weight).tobytes()


def wait(pid: int) -> int:
    """The exit status of a child, or a failed test (and a killed child) if it does not end."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")


def test_a_small_stack_is_enough() -> None:
    """256 KiB, as threading.stack_size() or musl gives: what products work in does not stand there."""
    code = """
        import threading
        import numpy as np
        import quantlab as ql
        from quantlab import _core

        rng = np.random.default_rng(0)
        w = rng.standard_normal((300, 6000), dtype=np.float32)
        x, dy = rng.standard_normal((40, 6000), dtype=np.float32), rng.standard_normal((40, 300), dtype=np.float32)
        weights = [ql.QuantWeight.from_array(w)]
        configs = ql.NF4Config(), ql.RTNConfig(3), ql.Int8Config()
        weights += [ql.QuantWeight.from_float(w, config) for config in configs]

        def products():
            for isa, state in _core.isa_info().items():
                if state["usable"] and isa != "scalar":
                    for weight in weights:
                        with ql.backend.use(isa=isa):
                            for m in (1, 4, 5, 16, 40):
                                ql.linear(x[:m], weight)
                            _core.linear_backward_input(dy, weight.handle)
            done.append(True)

        done = []
        threading.stack_size(256 << 10)
        thread = threading.Thread(target=products)
        thread.start()
        thread.join()
        assert done
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=TIMEOUT).returncode == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_computes() -> None:
    with ql.backend.use(threads=2):
        expected = threaded_product()
        for _ in range(3):
            pid = os.fork()
            if pid == 0:  # no pytest in the child, whatever happens
                code = 1
                try:
                    code = 0 if _core.threads() == 1 and threaded_product() == expected else 2
                finally:
                    os._exit(code)
            assert wait(pid) == 0
        assert threaded_product() == expected  # and the parent goes on


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_multiprocessing_fork_computes() -> None:
    with ql.backend.use(threads=2):
        expected = threaded_product()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            results = [pool.apply_async(threaded_product) for _ in range(4)]
            assert [result.get(TIMEOUT) for result in results] == [expected] * 4


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------

LONG_CALLS = {
    "linear": "_core.linear(x, _core.Weight('f32', 32, 2000, 2000, 2000, np.ones((2000, 2000), np.float32)))",
    "gram": "_core.gram_into(np.zeros((2000, 2000), np.float32), x, x, False)",
    "many": "[_core.cross_entropy(x, np.zeros(20000, np.int32)) for _ in range(1000)]",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS)
def test_interrupt_stops_a_long_call(call: str, threads: int) -> None:
    """The call takes minutes; SIGINT ends it within a second, and the next call works."""
    code = f"""
        import time
        import numpy as np
        from quantlab import _core
        _core.isa_select("scalar")
        _core.set_threads({threads})
        x = np.ones((20000, 2000), np.float32)
        print("ready", flush=True)
        try:
            {LONG_CALLS[call]}
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert _core.rmsnorm(np.ones((1, 4), np.float32), np.ones(4, np.float32), 0.0).tolist() == [[1.0] * 4]
        print("went on", flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - sent < 1.0
        assert child.stdout.readline() == "went on\n"
        assert child.wait(TIMEOUT) == 0
    finally:
        child.kill()
        child.wait()


def test_interrupt_reaches_a_child_forked_by_another_thread() -> None:
    """There the thread that forked is the main thread: the one that hears signals."""
    code = """
        import os, signal, threading, warnings
        import numpy as np
        from quantlab import _core
        warnings.simplefilter("ignore")
        _core.isa_select("scalar")
        x = np.ones((20000, 2000), np.float32)
        _core.rmsnorm(x[:1], x[0], 0.0)  # from the main thread of the parent
        def fork():
            pid = os.fork()
            if pid == 0:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                try:
                    _core.gram_into(np.zeros((2000, 2000), np.float32), x, x, False)
                except KeyboardInterrupt:
                    os._exit(0)
                os._exit(1)
            threading.Timer(30.0, os.kill, (pid, signal.SIGKILL)).start()
            status.append(os.waitpid(pid, 0)[1])
        status = []
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        os._exit(status != [0])
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=TIMEOUT).returncode == 0
