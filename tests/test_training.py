"""The gradient of an adapter against the derivative of a float64 model, and what holds for every pass: the same bits
for each recompute policy and any number of threads."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from models import tiny_adapter, tiny_model
from training_reference import Oracle

import quantlab as ql
from quantlab import _core

POLICIES = ("none", "selective", "full")
SMALL = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 33}
LENGTHS = (7, 1, 17, 3)

# name -> changes of the model, of the adapter, dropout
CASES = {
    "all matrices": ({}, {}, 0.0),
    "dropout": ({}, {}, 0.3),
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
        rows = np.flatnonzero(self.targets != -100)
        head = self.model.lm_head.dequantize().astype(np.float64)
        return Oracle(self.model, self.parts, self.sequences, call).gradient(rows, self.targets[rows], head)


@lru_cache
def expected(case):
    return Setting(*CASES[case]).expected()


def close(actual, wanted, parts, bound):
    """Each matrix of the gradient to `bound` of its largest element: sums of float32 products of both signs."""
    for layer, slot, r, a_at, b_at in parts.layout.tolist():
        ends = sorted([*parts.layout[:, 3], *parts.layout[:, 4], len(actual)])
        for at in (a_at, b_at):
            here = slice(at, ends[ends.index(at) + 1])
            error = np.abs(actual[here] - wanted[here]).max() / np.abs(wanted[here]).max()
            assert error <= bound, f"layer {layer} slot {slot} rank {r}: {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_gradient_matches_float64(isa, case):
    setting = Setting(*CASES[case])
    loss, gradient = setting.accumulate()
    wanted_loss, wanted = expected(case)
    assert loss == pytest.approx(wanted_loss, rel=3e-6)
    # sums of some hundred float32 products through two or three layers: a few hundred EPS (6e-8)
    close(gradient, wanted, setting.parts, 3e-5)


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
