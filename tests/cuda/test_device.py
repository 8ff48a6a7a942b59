"""The device under the ops: memory and its peak, running out of it, errors, threads, and the same bits twice."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import quantlab as ql
from quantlab import _core

MIB = 1 << 20


@pytest.fixture
def on_cuda():
    with ql.backend.use(device="cuda"):
        yield


def test_info_names_the_device() -> None:
    found = ql.info()["cuda"]
    assert found["built"] and found["usable"] and found["why_not"] == ""
    assert found["device"]["name"] and found["device"]["memory"] > 0
    assert set(found["libraries"]) == {"cublas", "cusolver"}


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ql.CudaError, match="there is no device 15"), ql.backend.use(device="cuda:15"):
        pass


def test_table_says_what_runs_on_the_device(on_cuda: None) -> None:
    table = ql.backend.table()
    assert table["rmsnorm_forward"]["f32"] == "cuda"
    assert {variant for row in table.values() for variant in row.values()} <= {"cuda", ""}


def test_memory_is_counted_and_released(on_cuda: None) -> None:
    gc.collect()
    before = ql.cuda.memory()["current"]
    ql.cuda.reset_peak()
    x = np.ones((4096, 4096), np.float32)
    _core.swiglu(x, x)  # two inputs and an output of 64 MiB
    after = ql.cuda.memory()
    assert after["current"] == before
    assert 192 * MIB <= after["peak"] - before <= 200 * MIB
    assert 0 < after["free"] < after["total"]


def test_a_weight_stays_on_the_device_while_it_lives(on_cuda: None) -> None:
    gc.collect()
    before = ql.cuda.memory()["current"]
    w = ql.QuantWeight.from_array(np.ones((2048, 2048), np.float32))
    ids = np.zeros(1, np.int32)
    _core.embedding(ids, w.handle)
    held = ql.cuda.memory()["current"]
    assert held > before
    _core.embedding(ids, w.handle)
    assert ql.cuda.memory()["current"] == held
    del w
    gc.collect()
    assert ql.cuda.memory()["current"] == before


def test_out_of_memory_is_an_error_and_no_end(on_cuda: None) -> None:
    """An output larger than the device is refused before any of its pages on the host is touched."""
    total = ql.cuda.memory()["total"]
    rows = total // (1 << 20) + 1  # of a MiB
    page = np.zeros((1, 1 << 18), np.float32)
    with pytest.raises(ql.CudaError, match=r"out of device memory on cuda:0: asked for \d+ bytes; \d+ of \d+ are free"):
        _core.gather_rows_into(np.zeros((rows, 1 << 18), np.float32), page, np.zeros(rows, np.int32))
    x = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(_core.swiglu(np.zeros_like(x), x), 0 * x)
    assert ql.cuda.memory()["current"] < total // 2


def test_an_op_without_a_kernel_says_so(on_cuda: None) -> None:
    missing = [op for op, row in ql.backend.table().items() if op == "linear_forward" and not row["f32"]]
    if not missing:
        pytest.skip("every op has a kernel")
    with pytest.raises(ql.CudaError, match=r"linear_forward.* has no kernel on cuda"):
        _core.linear(np.ones((1, 4), np.float32), ql.QuantWeight.from_array(np.ones((4, 4), np.float32)).handle)


@pytest.mark.parametrize("count", [1, 63, 4096, 3 * MIB, 20 * MIB + 5])
def test_copies_arrive_whole(on_cuda: None, count: int) -> None:
    """Through the pinned staging of 16 MiB, several times over for the largest."""
    y, x = np.arange(count, dtype=np.float32), np.full(count, 0.5, np.float32)
    expected = y + x
    _core.add_into(y, x)
    np.testing.assert_array_equal(y, expected)


def test_threads_do_not_mix(on_cuda: None, rng: np.random.Generator) -> None:
    """Four threads use the device at once: each gets what it gets alone."""
    inputs = [rng.standard_normal((64 + i, 576), dtype=np.float32) for i in range(4)]
    gain = np.ones(576, np.float32)
    alone = [_core.rmsnorm(x, gain, 1e-5).tobytes() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if _core.rmsnorm(inputs[i], gain, 1e-5).tobytes() != alone[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_move(on_cuda: None, rng: np.random.Generator) -> None:
    for t, c in ((1, 1), (7, 33), (130, 576)):
        x, rows = rng.standard_normal((t, c), dtype=np.float32), rng.permutation(2 * t)[:t].astype(np.int32)
        out = np.zeros((2 * t, c), np.float32)
        _core.scatter_rows_into(out, x, rows)
        expected = np.zeros_like(out)
        expected[rows] = x
        np.testing.assert_array_equal(out, expected)
        back = np.zeros_like(x)
        _core.gather_rows_into(back, out, rows)
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("vocabulary", [1, 3, 31, 1000, 32000, 49152])
def test_greedy_choice(on_cuda: None, rng: np.random.Generator, vocabulary: int) -> None:
    logits = np.round(rng.standard_normal((17, vocabulary), dtype=np.float32) * 4)  # with ties: the first one counts
    tokens = _core.sample(logits, np.arange(17, dtype=np.int32), 0, 0.0, 0, 1.0, 0)
    np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (40, 0.5), (1, 1.0)])
def test_draws(on_cuda: None, rng: np.random.Generator, top_k: int, top_p: float) -> None:
    """The same numbers choose the same tokens as the scalar reference, but where its sums end within the rounding of a
    float32 sum of the boundary: one draw in 500 at most."""
    logits = np.ascontiguousarray(np.repeat(rng.standard_normal((4, 1000), dtype=np.float32) * 3, 500, 0))
    streams = np.arange(len(logits), dtype=np.int32)
    tokens = _core.sample(logits, streams, 3, 0.8, top_k, top_p, 11)
    assert tokens.tobytes() == _core.sample(logits, streams, 3, 0.8, top_k, top_p, 11).tobytes()
    with ql.backend.use(device="cpu", isa="scalar"):
        expected = _core.sample(logits, streams, 3, 0.8, top_k, top_p, 11)
    assert (tokens != expected).mean() <= 1 / 500
    assert (tokens != _core.sample(logits, streams, 4, 0.8, top_k, top_p, 11)).any() or top_k == 1


def test_the_same_bits_twice(on_cuda: None, rng: np.random.Generator) -> None:
    x, gain = rng.standard_normal((300, 577), dtype=np.float32), rng.standard_normal(577, dtype=np.float32)
    h = [np.zeros((577, 577), np.float32) for _ in range(2)]
    for each in h:
        _core.gram_into(each, x, x, True)
    assert h[0].tobytes() == h[1].tobytes()
    assert _core.rmsnorm(x, gain, 1e-5).tobytes() == _core.rmsnorm(x, gain, 1e-5).tobytes()
