"""GPTQ on the GPU: the CPU's codes from one and the same Hessian; a model end to end beside the CPU; resuming."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from models import tiny_model
from test_gptq import OPTIONS, codes_of, layer

import quantlab as ql
from quantlab import _core, device_calibration
from quantlab.config import GPTQConfig
from quantlab.gptq import Hessian, quantize


def bits_of(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def floats_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- one matrix ----------------------------------------------------------------------------------------------------


def both(w: np.ndarray, hessian: Hessian, config: GPTQConfig, **corrections) -> tuple:
    with ql.backend.use(device="cuda"):
        found = quantize(w, hessian, config, **corrections)
    return found, quantize(w, hessian, config, **corrections)


def differing_rows(found: ql.QuantWeight, expected: ql.QuantWeight) -> int:
    """Rows with another code, scale or zero. A weight on the tie between two codes may go either way, and with it what
    follows in its row."""
    differ = (codes_of(found) != codes_of(expected)).any(1) | (found.scales != expected.scales).any(1)
    if expected.zeros is not None:
        differ |= (found.zeros != expected.zeros).any(1)
    return int(differ.sum())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_options_give_the_codes_of_the_cpu(options: dict) -> None:
    """Both compute in float64: no code of these lies so close to a tie that their rounding could decide it."""
    for seed, group_size in [(1, 32), (2, 48), (3, -1), (4, 200)]:
        w, hessian = layer(seed)
        (found, report), (expected, wanted) = both(w, hessian, GPTQConfig(group_size=group_size, **options))
        assert differing_rows(found, expected) == 0
        assert report.loss == pytest.approx(wanted.loss, rel=1e-9)
        assert report.damp_percent == wanted.damp_percent and report.dead_columns == wanted.dead_columns
        assert (found.perm is None) == (expected.perm is None)


@pytest.mark.parametrize("k", [1, 2, 3, 127, 128, 129, 255, 256, 257])
def test_sizes_around_the_block(k: int) -> None:
    w, hessian = layer(k, n=33, k=k)
    for group_size in (-1, 64):
        (found, _), (expected, _) = both(w, hessian, GPTQConfig(bits=4, group_size=group_size, sym=False))
        assert differing_rows(found, expected) == 0


@pytest.mark.parametrize(("n", "k"), [(300, 4096), (96, 11008)])
def test_real_shapes(n: int, k: int, rng: np.random.Generator) -> None:
    """At most one row in a thousand may meet a tie."""
    w = (0.02 * rng.standard_normal((n, k))).astype(np.float32)
    x = rng.standard_normal((2048, k), np.float32) * np.exp(0.5 * rng.standard_normal(k, np.float32))
    x[:, 1:] += 0.5 * x[:, :-1]
    hessian = Hessian(k)
    hessian.add(x)
    for config in (GPTQConfig(), GPTQConfig.recommended(4, group_size=128)):
        (found, _), (expected, _) = both(w, hessian, config)
        assert differing_rows(found, expected) <= n // 1000


def test_corrections_give_the_codes_of_the_cpu_but_for_ties(rng: np.random.Generator) -> None:
    """The corrected weights are float32 sums in another order: a code in a thousand may be decided by their last bits,
    and the next columns of its row with it."""
    w, hessian = layer(7, n=60, k=300)
    drift = 0.05 * rng.standard_normal((300, 300), np.float32) * hessian.sum.diagonal().mean()
    residual = 0.05 * rng.standard_normal((60, 300), np.float32) * hessian.sum.diagonal().mean()
    config = GPTQConfig.recommended(3)
    plain = quantize(w, hessian, config)[0]
    for corrections in ({"drift": drift}, {"residual": residual}, {"drift": drift, "residual": residual}):
        (found, _), (expected, _) = both(w, hessian, config, **corrections)
        assert differing_rows(found, expected) <= 3
        assert differing_rows(expected, plain) > 30


def test_damping_rises_and_errors_name_the_matrix() -> None:
    w, hessian = layer(3, n=8, k=40)
    hessian.sum = -hessian.sum  # no damping helps
    with ql.backend.use(device="cuda"):
        with pytest.raises(ql.NumericError, match="weight: its Hessian is not positive definite"):
            quantize(w, hessian, GPTQConfig(group_size=-1))
        hessian.sum[5, 5] = np.inf
        with pytest.raises(ql.NumericError, match="weight: the inputs of this layer hold NaN"):
            quantize(w, hessian, GPTQConfig(group_size=-1))
        w, hessian = layer(3, n=8, k=40)
        w[3, 7] = np.nan
        with pytest.raises(ql.NumericError, match=r"weight: nan at \[3, 7\]"):
            quantize(w, hessian, GPTQConfig(group_size=-1))
    w, hessian = layer(4, n=8, k=40)
    hessian.sum[np.arange(20), np.arange(20)] *= 0.9  # the lower ones of correlated inputs: indefinite without damping
    (found, report), (expected, wanted) = both(w, hessian, GPTQConfig(group_size=-1, damp_percent=0.0))
    assert report.damp_percent == wanted.damp_percent
    assert differing_rows(found, expected) == 0


# ---- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "k"), [(1, 1), (7, 3), (33, 31), (100, 257), (65, 2049), (3, 2100)])
def test_moments(t: int, k: int, rng: np.random.Generator) -> None:
    """Products of bfloat16 are exact in float32; a sum of t of them and what is there errs by t + 1 roundings."""
    bits, other = bits_of(rng.standard_normal((t, k))), bits_of(rng.standard_normal((t, 5)))
    x, y = floats_of(bits).astype(np.float64), floats_of(other).astype(np.float64)
    start = rng.standard_normal((k, k), np.float32)
    h = _core.device_array(0, start)
    _core.device_gram(h, _core.device_array(0, bits), _core.device_array(0, bits), True)
    bound = (t + 1) * 2.0**-23 * (np.abs(x).T @ np.abs(x) + np.abs(start))
    assert (np.abs(h.numpy() - (start + x.T @ x)) <= bound)[np.tril_indices(k)].all()
    m = _core.device_zeros(0, 5, k)
    _core.device_gram(m, _core.device_array(0, other), _core.device_array(0, bits), False)
    assert (np.abs(m.numpy() - y.T @ x) <= (t + 1) * 2.0**-23 * (np.abs(y).T @ np.abs(x))).all()


def test_differences(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 33, 17), np.float32)
    found = _core.device_difference(_core.device_array(0, a), _core.device_array(0, b), True)
    np.testing.assert_array_equal(found.numpy(), bits_of(a - b))
    a, b = bits_of(a), bits_of(b)
    found = _core.device_difference(_core.device_array(0, a), _core.device_array(0, b), False)
    np.testing.assert_array_equal(found.numpy(), bits_of(floats_of(a) - floats_of(b)))


def test_arrays_on_the_device(rng: np.random.Generator) -> None:
    gc.collect()
    before = ql.cuda.memory()["current"]
    x = rng.standard_normal((1000, 77), np.float32)
    there = _core.device_array(0, x)
    other = there.copy()
    assert (there.shape, there.dtype, there.nbytes, len(there)) == ((1000, 77), "float32", x.nbytes, 1000)
    del there
    np.testing.assert_array_equal(other.numpy(), x)
    del other
    assert ql.cuda.memory()["current"] == before
    with pytest.raises(TypeError, match="a: got float32, expected bfloat16"):
        _core.device_gram(_core.device_array(0, x[:1]), _core.device_array(0, x), _core.device_array(0, x), True)


# ---- a model -------------------------------------------------------------------------------------------------------


def rows(count: int = 24, length: int = 50) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 128, length + i % 5).astype(np.int32) for i in range(count)]


CONFIGS = [
    GPTQConfig(group_size=32),
    GPTQConfig(group_size=32, desc_act=True, true_sequential=False),
    GPTQConfig(group_size=-1, act_group_aware=True, scale_search="mse"),
    GPTQConfig(group_size=48),  # no kernel: a group goes over the end of a block
    GPTQConfig.recommended(4, group_size=32),
    GPTQConfig.recommended(3, group_size=32),
    GPTQConfig.recommended(2, group_size=16),
]


def error(model, original) -> float:
    states, wanted = model.hidden_states(rows(4)), original.hidden_states(rows(4))
    return float(np.linalg.norm(states - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_model_beside_the_cpu(config: GPTQConfig) -> None:
    """The inputs differ by the rounding to bfloat16, 2^-9 of each at most, and with them some codes near ties: so the
    losses differ, together and the errors of the hidden states by less than a tenth. A single matrix is so small here
    that few codes are much of its loss: the CPU's own paths, scalar and AMX, differ by 13 % in one of them."""
    model = tiny_model()
    expected = ql.quantize(model, config, rows(), progress=False)
    found = ql.quantize(model, config, rows(), progress=False, device="cuda")
    assert found.device == "cpu"
    for ours, theirs in zip(found.quantization_report, expected.quantization_report, strict=True):
        assert ours["module"] == theirs["module"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    losses = [sum(module["loss"] for module in each.quantization_report) for each in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert error(found, model) == pytest.approx(error(expected, model), rel=0.1)
    again = ql.quantize(model, config, rows(), progress=False, device="cuda")
    assert all(found.weight(name).equals(again.weight(name)) for name in found.weights)


def test_inputs_that_are_not_kept_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(), GPTQConfig.recommended(3, group_size=32)
    monkeypatch.setattr(device_calibration, "CHUNK_TOKENS", 128)
    kept = ql.quantize(model, config, rows(), progress=False, device="cuda")
    for room in (0, 40_000):
        monkeypatch.setattr(device_calibration, "HOLD_BYTES", room)
        found = ql.quantize(model, config, rows(), progress=False, device="cuda")
        assert all(found.weight(name).equals(kept.weight(name)) for name in kept.weights)


def test_a_model_on_the_device() -> None:
    model = tiny_model().to("cuda")
    found = ql.quantize(model, GPTQConfig(group_size=32), rows(), progress=False)
    assert found.device == "cuda"
    expected = ql.quantize(tiny_model(), GPTQConfig(group_size=32), rows(), progress=False, device="cuda")
    assert all(found.weight(name).equals(expected.weight(name)) for name in expected.weights)
    with pytest.raises(ValueError, match="device: got 'cuda', but only GPTQ"):
        ql.quantize(model, ql.NF4Config(), progress=False, device="cuda")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, config = tiny_model(), GPTQConfig.recommended(3, group_size=32)

    def run(device: str = "cuda"):
        return ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path, device=device)

    whole = run()
    (tmp_path / "layer-00001.safetensors").unlink()
    resumed = run()
    assert all(whole.weight(name).equals(resumed.weight(name)) for name in whole.weights)
    assert [r["loss"] for r in whole.quantization_report] == [r["loss"] for r in resumed.quantization_report]
    with pytest.raises(ValueError, match="holds a run with another device"):
        run("cpu")


def test_memory_is_free_after_it() -> None:
    gc.collect()
    ql.quantize(tiny_model(), GPTQConfig(group_size=32), rows(), progress=False, device="cuda")
    gc.collect()
    before = ql.cuda.memory()["current"]  # scratch memory stays
    ql.quantize(tiny_model(), GPTQConfig(group_size=32), rows(), progress=False, device="cuda")
    gc.collect()
    assert ql.cuda.memory()["current"] == before
