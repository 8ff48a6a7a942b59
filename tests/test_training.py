"""The gradient of an adapter against the derivative of a float64 model, and what holds for every pass: the same bits
for each recompute policy and any number of threads."""

from __future__ import annotations

import signal
import threading
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
from models import tiny_adapter, tiny_model
from training_reference import Oracle

import quantlab as ql
from quantlab import _core

POLICIES = ("none", "selective", "full")
SMALL = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 33}
LENGTHS = (7, 1, 17, 3)
PLACES = 8  # parameters of each matrix whose derivative is compared

# name -> changes of the model, of the adapter, dropout
CASES = {
    "all matrices": ({}, {}, 0.0),
    "dropout": ({}, {}, 0.3),
    "a rank each": ({}, {"r": (1, 5, 2, 9, 3)}, 0.1),
    "q and v": ({}, {"slots": (0, 2), "r": 3}, 0.0),
    "the upper layer alone": ({"num_hidden_layers": 3}, {"layers": (1, 2), "slots": (3, 4)}, 0.0),
    "no shared heads": ({"num_key_value_heads": 4}, {"slots": (1, 5, 6), "r": 1}, 0.1),
    "wide heads": ({"head_dim": 16, "num_key_value_heads": 1}, {"slots": (0, 3)}, 0.0),
    "tied": ({"tie_word_embeddings": True}, {"slots": (2, 6), "r": 9}, 0.0),
}


class Setting:
    """A model, its adapter, packed sequences, targets of which some do not count; and the trainer of all that."""

    def __init__(self, changes=None, adapter=None, dropout=0.0, lengths=LENGTHS, config=None):
        rng = np.random.default_rng(5)
        self.model = tiny_model(**{**SMALL, **(changes or {})})
        if config is not None:
            weights = {name: ql.QuantWeight.from_float(w.dequantize(), config) for name, w in self.model.weights.items()
                       if "layers" in name}  # fmt: skip
            self.model = self.model.replace(weights)
        self.parts = tiny_adapter(self.model.config, **(adapter or {}))
        self.parts.dropout, self.parts.seed = dropout, 11
        handle = _core.Adapter(self.parts.parameters, self.parts.layout, self.parts.scales)
        self.model.adapter = SimpleNamespace(handle=handle)
        self.core = self.model._core = self.model._build_core()
        vocabulary = self.model.config.vocab_size
        self.sequences = [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
        self.targets = rng.integers(0, vocabulary, sum(lengths)).astype(np.int32)
        self.targets[rng.random(len(self.targets)) < 0.3] = -100
        self.gradients = np.zeros_like(self.parts.parameters)
        ends = sorted([*self.parts.layout[:, 3], *self.parts.layout[:, 4], len(self.gradients)])
        self.places = np.array([rng.integers(start, end, PLACES) for start, end in pairwise(ends)])
        self.trainer = _core.Trainer(
            self.core, self.model.lm_head.handle, self.gradients, dropout=dropout, seed=self.parts.seed
        )

    def accumulate(self, factor=1.0, call=3, recompute="none"):
        """(sum of the losses, gradient) of one pass."""
        self.gradients[:] = 0
        batch = self.model.packed(self.sequences)
        loss = self.trainer.accumulate(*batch, self.targets, factor, call, recompute)
        return loss, self.gradients.copy()

    def expected(self, call=3):
        """Loss, and the derivatives by some parameters of each matrix, `places` (matrices, some)."""
        rows = np.flatnonzero(self.targets != -100)
        head = self.model.lm_head.dequantize().astype(np.float64)
        return Oracle(self.model, self.parts, self.sequences, call).gradient(
            rows, self.targets[rows], head, self.places.ravel()
        )


@lru_cache
def expected(case):
    return Setting(*CASES[case]).expected()


def close(gradient, wanted, setting, bound):
    """The derivatives of each matrix to `bound` of its largest: sums of float32 products of both signs. Attention's
    backward pass on AMX multiplies bfloat16 parts, which err by 2^-17 and not by 2^-24."""
    bound *= 8 if _core.isa_selected() == "amx" else 1
    wanted = wanted.reshape(setting.places.shape)
    error = np.abs(gradient[setting.places] - wanted).max(1)
    largest = np.abs(wanted).max(1) + 1e-3 * np.abs(wanted).max()
    assert (error <= bound * largest).all(), error / largest


@pytest.mark.parametrize("case", CASES)
def test_gradient_matches_float64(isa, case):
    setting = Setting(*CASES[case])
    loss, gradient = setting.accumulate()
    wanted_loss, wanted = expected(case)
    assert loss == pytest.approx(wanted_loss, rel=3e-6)
    # sums of some hundred float32 products through two or three layers: a few hundred EPS (6e-8)
    close(gradient, wanted, setting, 3e-5)


@pytest.mark.parametrize("case", CASES)
def test_policies_and_threads_have_the_same_bits(isa, case):
    setting = Setting(*CASES[case])
    loss, gradient = setting.accumulate()
    for policy in POLICIES:
        for threads in (1, 3):
            with ql.backend.use(threads=threads):
                again = setting.accumulate(recompute=policy)
            assert again[0] == loss, policy
            np.testing.assert_array_equal(again[1], gradient, err_msg=policy)


BASES = {
    "nf4": ql.NF4Config(32),
    "nf4 double": ql.NF4Config(32, double_quant=True),
    "fp4": ql.FP4Config(64),
    "int8": ql.Int8Config(),
    "affine 4": ql.RTNConfig(4, 8),
    "affine 3": ql.RTNConfig(3, 8, sym=False),
}


@lru_cache
def quantized(base):
    setting = Setting(config=BASES[base])
    return setting, setting.expected()


@pytest.mark.parametrize("base", BASES)
def test_quantized_bases(isa, base):
    """The gradient beside the values that the base's codes stand for; on AMX, attention's backward splits floats in two
    bfloat16 (2^-16)."""
    setting, (wanted_loss, wanted) = quantized(base)
    with ql.backend.use(precise=True):
        loss, gradient = setting.accumulate()
        for policy in POLICIES:
            np.testing.assert_array_equal(setting.accumulate(recompute=policy)[1], gradient)
    assert loss == pytest.approx(wanted_loss, rel=2e-5)
    close(gradient, wanted, setting, 1e-4)


@lru_cache
def sized(size):
    changes = {
        "hidden_size": 2 * size,
        "intermediate_size": size,
        "vocab_size": size + 1,
        "head_dim": 2 * (size // 4 + 1),
    }
    setting = Setting({**changes, "num_hidden_layers": 1}, {"r": min(size, 5)}, 0.0, lengths=(size, 2))
    return setting, setting.expected()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33])
def test_hard_sizes(isa, size):
    setting, (wanted_loss, wanted) = sized(size)
    loss, gradient = setting.accumulate(recompute="full")
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    close(gradient, wanted, setting, 1e-4)


@lru_cache
def large():
    """Large enough for the kernels of AMX."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 200, "num_hidden_layers": 1}
    setting = Setting(changes, {"r": 4}, 0.05, lengths=(150, 130))
    return setting, setting.expected()


def test_long_sequences_and_chunks_of_losses(isa):
    """More tokens than logits are held for. Some ISAs round to bfloat16 in each product unless asked not to."""
    setting, (wanted_loss, wanted) = large()
    for precise in (True, False):
        with ql.backend.use(precise=precise):
            loss, gradient = setting.accumulate()
        rough = isa in ref.ROUNDING and not precise
        assert loss == pytest.approx(wanted_loss, rel=1e-3 if rough else 1e-5)
        close(gradient, wanted, setting, 5e-2 if rough else 1e-4)


@pytest.mark.parametrize("slots", [range(7), (0, 2)], ids=str)
def test_forward_with_an_adapter(isa, slots):
    """Hidden states, losses and generation of the unmerged adapter; a row does not depend on the rows beside it."""
    setting = Setting(adapter={"slots": slots})
    model, parts = setting.model, setting.parts
    oracle = Oracle(model, parts, setting.sequences).hidden(parts.parameters[None].astype(np.float64))[0]
    hidden = model.packed_hidden(setting.sequences)
    np.testing.assert_allclose(hidden, oracle, atol=3e-5, rtol=3e-5)
    np.testing.assert_array_equal(model.packed_hidden(setting.sequences[1:2]), hidden[7:8])
    losses = setting.core.losses(*model.packed(setting.sequences), model.lm_head.handle, setting.targets)
    assert losses.astype(np.float64).sum() == pytest.approx(setting.accumulate()[0], rel=1e-6)
    for row, out in zip(setting.sequences, model.generate(setting.sequences, 5, eos_token_id=[]), strict=True):
        for end in range(len(row), len(out)):
            assert out[end] == model.logits(model.packed_hidden([out[:end]])[-1:])[0].argmax()


def test_passes_add_up():
    setting = Setting(dropout=0.3)
    batch = setting.model.packed(setting.sequences)
    loss, gradient = setting.accumulate(factor=0.25)
    other_loss, other = setting.accumulate(factor=0.5, call=4)
    assert other_loss != loss  # another mask
    setting.gradients[:] = 1
    for factor, call in ((0.25, 3), (0.5, 4)):
        setting.trainer.accumulate(*batch, setting.targets, factor, call, "selective")
    np.testing.assert_allclose(setting.gradients, 1 + gradient + other, rtol=1e-5, atol=1e-6)
    full = setting.accumulate()[1]
    np.testing.assert_allclose(gradient, full / 4, rtol=1e-5, atol=1e-7)


def test_parameters_are_read_at_each_call():
    setting = Setting()
    before = setting.accumulate()[0]
    setting.parts.parameters *= 2
    assert setting.accumulate()[0] != before
    assert setting.accumulate()[0] == pytest.approx(setting.expected()[0], rel=3e-6)


def test_no_targets_cost_nothing():
    setting = Setting()
    setting.targets[:] = -100
    assert setting.accumulate() == (0.0, pytest.approx(np.zeros_like(setting.gradients)))


# ---- classification --------------------------------------------------------------------------------------------------


def test_pooled_losses_and_their_head(isa):
    """The last token of each sequence under a small head, which learns too; a label that does not count."""
    setting = Setting(dropout=0.1)
    rng = np.random.default_rng(1)
    pooled = np.cumsum(LENGTHS).astype(np.int32) - 1
    labels = np.array([2, 0, -100, 1], np.int32)
    score = rng.standard_normal((3, SMALL["hidden_size"])).astype(np.float32)
    score_gradient = np.ones_like(score)
    batch = setting.model.packed(setting.sequences)
    results = []
    for policy in POLICIES:
        setting.gradients[:], score_gradient[:] = 0, 1
        loss = setting.trainer.accumulate_pooled(*batch, pooled, labels, score, score_gradient, 0.5, 3, policy)
        results.append((loss, setting.gradients.copy(), score_gradient - 1))
        for array, first in zip(results[-1], results[0], strict=True):
            np.testing.assert_array_equal(array, first)
    oracle = Oracle(setting.model, setting.parts, setting.sequences, 3)
    rows, classes = pooled[labels >= 0], labels[labels >= 0]
    wanted_loss, wanted = oracle.gradient(rows, classes, score.astype(np.float64), setting.places.ravel())
    hidden = oracle.hidden(setting.parts.parameters[None].astype(np.float64))[0, rows]
    logits = hidden @ score.T.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert results[0][0] == pytest.approx(wanted_loss, rel=3e-6)
    close(results[0][1], wanted / 2, setting, 3e-5)
    np.testing.assert_allclose(results[0][2], (p - np.eye(3)[classes]).T @ hidden / 2, rtol=1e-4, atol=1e-5)


# ---- memory, bad input, Ctrl-C ---------------------------------------------------------------------------------------


def test_policies_trade_memory():
    setting = Setting({"num_hidden_layers": 4})
    sizes = [setting.trainer.activation_bytes(100, policy) for policy in POLICIES]
    assert sizes[0] > sizes[1] > sizes[2] > 4 * 100 * 24 * 4  # four layers' inputs
    assert setting.trainer.activation_bytes(0, "none") >= 0
    few = Setting({"num_hidden_layers": 4}, {"layers": (3,)})
    assert few.trainer.activation_bytes(100, "none") < sizes[0] / 2  # the layers below are not kept


def changed(batch, place, value):
    return [*batch[:place], np.asarray(value, batch[place].dtype), *batch[place + 1 :]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, b: run(s, changed(b, 0, [40] * 28)), "input_ids: got 40"),
        (lambda s, b: run(s, changed(b, 1, [-1] * 28)), "positions: got -1"),
        (lambda s, b: run(s, changed(b, 3, [0, 0, 8, 25])), "sequence 1 does not"),
        (lambda s, b: run(s, changed(b, 4, [7, 1, 18, 3])), "sequence 2 does not"),
        (lambda s, b: run(s, changed(b, 2, [0, 7, 8, 25, 27])), "q_start: does not"),
        (lambda s, b: run(s, b, targets=s.targets[1:]), "targets: dimension 0 is 27, expected 28"),
        (lambda s, b: run(s, b, targets=s.targets + 33), "targets: got .*, expected 0 to 32, or -100"),
        (lambda s, b: run(s, b, call=-1), "call: got -1"),
        (lambda s, b: run(s, b, recompute="some"), "recompute: got 'some', expected none, selective"),
        (lambda s, b: s.trainer.activation_bytes(-1, "none"), "t: got -1"),
        (lambda s, b: run(s, b, _core.Trainer(s.core, None, s.gradients)), "head: .* without"),
        (lambda s, b: _core.Trainer(s.core, None, s.gradients[1:]), "gradients: dimension 0 is 1439, expected 1440"),
        (lambda s, b: _core.Trainer(s.core, None, s.gradients, dropout=1.0), "dropout: expected 0 or more, below 1"),
        (lambda s, b: _core.Trainer(tiny_model()._core, None, s.gradients), "llama: it has no adapter"),
        (lambda s, b: _core.Trainer(s.core, tiny_model().lm_head.handle, s.gradients), "head: it has 64 columns"),
        (lambda s, b: pooled(s, b, [3, 3]), "pooled: got 3, expected rows of the 28 tokens in ascending"),
        (lambda s, b: pooled(s, b, [3, 28]), "pooled: got 28"),
        (lambda s, b: pooled(s, b, [-1, 3]), "pooled: got -1"),
        (lambda s, b: pooled(s, b, [3, 5], labels=(0, 3)), "labels: got 3, expected 0 to 2"),
        (lambda s, b: pooled(s, b, [3, 5], classes=2), "score_gradient: dimension 0 is 3, expected 2"),
        (lambda s, b: attached(s, layer=2), "adapter: layer 2, the model has 2"),
        (lambda s, b: attached(s, slot=7), "layout: row 0 has layer 0, slot 7, rank 1"),
        (lambda s, b: attached(s, r=0), "layout: row 0 has layer 0, slot 0, rank 0"),
        (lambda s, b: attached(s, a=25), "adapter: layer 0 q_proj: A lies outside"),
        (lambda s, b: attached(s, b=-1), "adapter: layer 0 q_proj: B lies outside"),
        (lambda s, b: attached(s, r=2**62), "layout: row 0 .* rank"),
        (lambda s, b: attached(s, r=2**31 - 1), "A lies outside"),
        (lambda s, b: attached(s, twice=True), "adapter: layer 0 q_proj: has two adapters"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, message):
    setting = Setting()
    with pytest.raises(ValueError, match=message):
        call(setting, setting.model.packed(setting.sequences))
    assert not setting.gradients.any()


def run(setting, batch, trainer=None, targets=None, call=0, recompute="none"):
    targets = setting.targets if targets is None else targets
    return (trainer or setting.trainer).accumulate(*batch, targets, 1, call, recompute)


def pooled(setting, batch, rows, labels=(0, 1), classes=3):
    rows, labels = np.array(rows, np.int32), np.array(labels, np.int32)
    score = np.ones((classes, 24), np.float32)
    return setting.trainer.accumulate_pooled(*batch, rows, labels, score, np.ones((3, 24), np.float32), 1, 0, "none")


def attached(setting, layer=0, slot=0, r=1, a=0, b=24, twice=False):
    """The model with an adapter of one matrix (two, where `twice`) of 48 parameters."""
    layout = np.array([(layer, slot, r, a, b)] * (1 + twice), np.int64)
    handle = _core.Adapter(np.zeros(48, np.float32), layout, np.ones(len(layout), np.float32))
    setting.model.adapter = SimpleNamespace(handle=handle)
    return setting.model._build_core()


def test_wrong_types_are_told():
    setting = Setting()
    setting.model.adapter = SimpleNamespace(handle=3)
    with pytest.raises(TypeError, match=r"adapter: got int, expected a _core\.Adapter"):
        setting.model._build_core()
    with pytest.raises(TypeError, match="gradients: got dtype float64, expected float32"):
        _core.Trainer(setting.core, None, setting.gradients.astype(np.float64))
    setting.gradients.flags.writeable = False
    with pytest.raises(ValueError, match="gradients: not writeable"):
        _core.Trainer(setting.core, None, setting.gradients)


def test_interrupt_stops_a_pass():
    """SIGINT ends a pass of minutes within a second, and the trainer goes on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    setting = Setting({"max_position_embeddings": 8192}, lengths=(8000,))
    with ql.backend.use(isa="scalar"), pytest.raises(KeyboardInterrupt):
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        try:
            setting.accumulate()
        finally:
            timer.join()
            signal.signal(signal.SIGINT, before)
    setting.sequences, setting.targets = [setting.sequences[0][:9]], setting.targets[:9]
    assert np.isfinite(setting.accumulate()[0])
