"""The ops of a generation, and `_core.Generation`, which a model on a device generates with, on the CPU's table."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import save_tiny
from models import tiny_model

import quantlab as ql
from quantlab import _core
from quantlab.generate import generation_steps, read_steps
from quantlab.llama import KVCache

I32 = np.int32


def endless(new: list[int]) -> bool:
    """Rows do not stop."""
    return False


def sample(logits, step=0, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> np.ndarray:
    return _core.sample(logits, np.arange(len(logits), dtype=I32), step, temperature, top_k, top_p, seed)


def test_temperature_zero_takes_the_largest(rng: np.random.Generator) -> None:
    logits = np.round(rng.standard_normal((50, 33), dtype=np.float32) * 3)  # with ties: the first one counts
    np.testing.assert_array_equal(sample(logits, temperature=0.0), logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(rng: np.random.Generator, temperature: float) -> None:
    row, draws = rng.standard_normal(40).astype(np.float32) * 2, 40_000
    share = np.exp(row.astype(np.float64) / temperature)
    share /= share.sum()
    found = np.bincount(sample(np.tile(row, (draws, 1)), temperature=temperature), minlength=40) / draws
    assert (np.abs(found - share) <= 5 * np.sqrt(share * (1 - share) / draws) + 1e-9).all()  # five standard deviations


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.6), (7, 0.6), (0, 1e-6), (100, 1.0)])
def test_draws_stay_in_their_set(rng: np.random.Generator, top_k: int, top_p: float) -> None:
    row = rng.standard_normal(40).astype(np.float32) * 2
    order = np.argsort(-row, kind="stable")[: top_k or None]
    share = np.exp(row[order].astype(np.float64))
    kept = order[: np.searchsorted(np.cumsum(share / share.sum()), top_p) + 1] if top_p < 1 else order
    found = sample(np.tile(row, (20_000, 1)), top_k=top_k, top_p=top_p)
    assert set(found) <= set(kept) and len(set(found)) >= min(len(kept), 5)


def test_equals_of_the_last_one_belong_to_the_set() -> None:
    logits = np.tile(np.array([2, 1, 1, 1, 0], np.float32), (5000, 1))
    assert set(sample(logits, top_k=2)) == {0, 1, 2, 3}


def test_a_draw_depends_on_seed_stream_and_step_alone(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((9, 500), dtype=np.float32)
    tokens = sample(logits, 4, seed=7)
    assert sample(logits[:3], 4, seed=7).tobytes() == tokens[:3].tobytes()
    alone = _core.sample(logits[8:], np.array([8], I32), 4, 1.0, 0, 1.0, 7)
    assert alone[0] == tokens[8]
    assert (sample(logits, 5, seed=7) != tokens).any() and (sample(logits, 4, seed=8) != tokens).any()


def test_top_k_and_top_p() -> None:
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (300, 1))
    sets = (({}, {0, 1, 2, 3}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.4}, {0}))
    for options, expected in sets:
        assert set(sample(logits, **options)) == expected


@pytest.mark.parametrize("v", [1, 7, 8, 16, 17, 63, 64, 65, 129, 1000, 49152])
def test_vectors_choose_what_the_reference_does(isa: str, rng: np.random.Generator, v: int) -> None:
    """Weights are float32 there and float64 here: at most one draw in a thousand ends within their difference."""
    rows = 2000 if v < 1000 else 60
    logits = np.round(rng.standard_normal((rows, v), dtype=np.float32) * 3, 1)  # with equals
    logits[rng.random((rows, v)) < 0.05] = -np.inf
    logits[:, rng.integers(v)] = 2.5
    if v > 1:
        logits[:: rows // 20, (v // 2) :: max(1, v // 3)] = np.nan
        logits[1 :: rows // 20, 0] = np.nan
    for options in ((0.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (0.9, 0, 0.8), (1.0, 40, 0.9), (1e-3, 0, 1.0)):
        chosen = _core.sample(logits, np.arange(rows, dtype=I32), 3, *options, 11)
        with ql.backend.use(isa="scalar"):
            expected = _core.sample(logits, np.arange(rows, dtype=I32), 3, *options, 11)
        assert (chosen != expected).sum() <= (rows // 1000 if options[0] else 0), options


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_still_gives_a_token(isa: str, bad: float) -> None:
    for v in (1, 5, 40):
        logits = np.full((3, v), bad, np.float32)
        for temperature in (0.0, 1.0):
            tokens = sample(logits, temperature=temperature, top_k=3, top_p=0.5)
            assert ((tokens >= 0) & (tokens < v)).all()
            if isa != "cuda":
                with ql.backend.use(isa="scalar"):
                    assert (sample(logits, temperature=temperature, top_k=3, top_p=0.5) == tokens).all()


def test_a_draw_stays_in_its_set_where_sums_round(isa: str) -> None:
    """Two weights of 1, a tail that only some orders of adding see, and the number 1/2, where the first ends."""
    half = 18163963  # the step whose number is 1/2 for seed 0 and stream 0
    for lanes in (8, 16):
        logits = np.full((1, 2 * lanes), -36.75, np.float32)
        logits[0, 0], logits[0, lanes:], logits[0, lanes + 3] = 0.0, -np.inf, 0.0
        assert np.isfinite(logits[0, sample(logits, half)[0]])


def test_sample_refuses() -> None:
    logits = np.zeros((1, 4), np.float32)
    for options in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="temperature, top_k or top_p: out of range"):
            sample(logits, **options)


def test_rows_move(rng: np.random.Generator) -> None:
    x, rows = rng.standard_normal((7, 33), dtype=np.float32), rng.permutation(20)[:7].astype(I32)
    out, back = np.zeros((20, 33), np.float32), np.zeros((7, 33), np.float32)
    _core.scatter_rows_into(out, x, rows)
    _core.gather_rows_into(back, out, rows)
    assert back.tobytes() == x.tobytes() and np.count_nonzero(out.any(1)) == 7
    with pytest.raises(ValueError, match="rows: got 20 at position 0, expected 0 to 19"):
        _core.gather_rows_into(back, out, np.full(7, 20, I32))


def prompts_of(model: ql.LlamaForCausalLM, lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.config.vocab_size, length).astype(I32) for length in lengths]


def test_steps_are_those_of_generate() -> None:
    model = tiny_model()
    prompts = prompts_of(model, (5, 1, 17))
    steps = read_steps(generation_steps(model, prompts, 12), 3, endless, None)
    expected = model.generate(prompts, max_new_tokens=12, eos_token_id=[])
    assert [row[len(prompt) :].tolist() for row, prompt in zip(expected, prompts, strict=True)] == steps


def test_steps_of_long_prompts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompts = prompts_of(model, (40, 3, 21, 9))
    whole = read_steps(generation_steps(model, prompts, 5), 4, endless, None)
    monkeypatch.setattr("quantlab.generate.BATCH_TOKENS", 40)  # all of the first prompt, then the others
    assert read_steps(generation_steps(model, prompts, 5), 4, endless, None) == whole


def test_dynamic_angles_follow_the_tokens_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that may come: whatever max_new_tokens, each token is that of a cache that grows by one."""
    model = tiny_model(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16)
    for length in (3, 16, 21):  # 16 tokens: the type's angles begin to change
        prompt = prompts_of(model, (length,))
        cache = KVCache(model.config, 1, length + 30)
        tokens = [model.logits(model.packed_hidden(prompt, cache))[-1].argmax()]
        while len(tokens) < 30:
            tokens.append(model.logits(model.packed_hidden([np.array(tokens[-1:], I32)], cache))[-1].argmax())
        for most in (1, 10, 30):
            assert read_steps(generation_steps(model, prompt, most), 1, endless, None) == [tokens[:most]]
        monkeypatch.setattr("quantlab.generate.BATCH_TOKENS", 7)  # a prompt in parts is one prompt
        assert read_steps(generation_steps(model, prompt, 30), 1, endless, None) == [tokens]


def test_sampled_rows_do_not_depend_on_their_neighbours() -> None:
    model = tiny_model()
    prompts = prompts_of(model, (5, 4, 17))
    options = (12, 0.9, 10, 0.9, 3)
    together = read_steps(generation_steps(model, prompts, *options), 3, endless, None)
    assert read_steps(generation_steps(model, prompts[:2], *options), 2, endless, None) == together[:2]
    assert read_steps(generation_steps(model, prompts, *options), 3, endless, None) == together


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_that_end_do_not_change_the_others(do_sample: bool) -> None:
    """They leave the batch; each row ends where it ends alone, with the tokens it has where none does."""
    model = tiny_model()
    prompts = prompts_of(model, (5, 4, 17, 3, 9, 6))
    options = {"max_new_tokens": 40, "do_sample": do_sample, "temperature": 2.0, "seed": 5}
    whole = model.generate(prompts, eos_token_id=[], **options)
    stops = [int(row[len(prompt) + at]) for row, prompt, at in zip(whole, prompts, (0, 3, 9, 9, 20, 38), strict=True)]
    for stop in (stops[:1], stops[1:3], stops):
        seen: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
        found = model.generate(
            prompts, eos_token_id=stop, on_token=lambda row, token, seen=seen: seen[row].append(token), **options
        )
        for index, (prompt, row, tokens) in enumerate(zip(prompts, whole, found, strict=True)):
            new = row[len(prompt) :].tolist()
            end = min((new.index(token) + 1 for token in stop if token in new), default=len(new))
            assert tokens.tolist() == [*prompt.tolist(), *new[:end]]
            assert seen[index] == new[:end]


def test_weights_are_packed_once_few_rows_are_left() -> None:
    if _core.gemv_rows() == 0:
        pytest.skip("packed weights are for vector kernels")
    model = ql.quantize(tiny_model(hidden_size=64, intermediate_size=128), ql.NF4Config(64), progress=False)
    steps = generation_steps(model, prompts_of(model, (3,) * (_core.gemv_rows() + 1)), 4)
    weight = model.weights["model.layers.0.mlp.gate_proj"].handle
    assert len(next(steps)) == _core.gemv_rows() + 1 and weight.packed_nbytes == 0
    assert len(steps.send([1])) == 1 and weight.packed_nbytes > 0


def test_generation_refuses() -> None:
    model = tiny_model()
    tables = model.rope(16)
    lengths = np.array([3], np.int64)
    head = model.lm_head.handle
    with pytest.raises(ValueError, match=r"lengths: 1 sequences of up to \d+ tokens are not accepted"):
        _core.Generation(model._core, head, lengths, len(tables[0]), *tables)
    with pytest.raises(ValueError, match="lengths: got 0"):
        _core.Generation(model._core, head, np.zeros(1, np.int64), 4, *tables)
    generation = _core.Generation(model._core, head, lengths, 1, *tables)
    batch = model.packed(prompts_of(model, (3,)), np.zeros(1, np.int64), generation.capacity)
    with pytest.raises(ValueError, match="ends: out of range"):
        generation.prefill(*batch, np.array([3], I32))
    generation.prefill(*batch, np.array([2], I32))
    with pytest.raises(ValueError, match="rows: expected ascending places"):
        generation.keep(np.zeros(1, I32))  # no step was done
    assert generation.next().shape == (1,)
    for rows in ([], [1], [-1], [0, 0]):
        with pytest.raises(ValueError, match="rows: expected ascending places"):
            generation.keep(np.array(rows, I32))
    with pytest.raises(ValueError, match="next: all 1 steps are done"):
        generation.next()


def test_losses() -> None:
    model = tiny_model()
    ids = prompts_of(model, (300,))[0]  # more rows of logits than are held at once
    logits = model([ids])[0].astype(np.float64)
    expected = np.log(np.exp(logits).sum(1))[:-1] - logits[np.arange(299), ids[1:]]
    np.testing.assert_allclose(model.losses(ids[:-1], ids[1:]), expected, rtol=1e-5)
    assert model.losses(ids, np.full(300, -100, I32)).tolist() == [0.0] * 300
    with pytest.raises(ValueError, match="targets: got 100000"):
        model.losses(ids, np.full(300, 100_000, I32))


@pytest.mark.parametrize("named", [None, 7, [7, 9]])
def test_generation_config_says_what_ends_a_text(tmp_path, named):
    """As in transformers: its tokens go before the config's, and stay where its directory is gone."""
    path = save_tiny(tmp_path / "tiny", eos_token_id=5)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": named}))
    model = ql.LlamaForCausalLM.from_pretrained(path)
    shutil.rmtree(path)
    ends = [5] if named is None else np.atleast_1d(named).tolist()
    assert model.eos_token_ids == ends and model.config.eos_token_id == 5
    rows = prompts_of(model, (4,) * 40)
    for row, whole in zip(model.generate(rows), model.generate(rows, eos_token_id=[]), strict=True):
        at = next((i for i, token in enumerate(whole.tolist()) if i >= 4 and token in ends), len(whole) - 1)
        assert row.tolist() == whole[: at + 1].tolist()
    model.save_pretrained(tmp_path / "again")
    assert ql.LlamaForCausalLM.from_pretrained(tmp_path / "again").eos_token_ids == ends


def test_a_generation_config_that_names_no_tokens(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    (path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is '</s>', expected a token id"):
        ql.LlamaForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("do_sample", [False, True])
def test_stop_strings_end_a_row(tmp_path, do_sample):
    model = ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny"))
    prompt = model.encode("hello")
    options = {"max_new_tokens": 30, "eos_token_id": [], "do_sample": do_sample, "seed": 4, "temperature": 3.0}
    whole = model.generate(prompt, **options)[0][len(prompt) :].tolist()
    string = model.tokenizer.decode(whole[10:13], skip_special_tokens=False)
    stopped = model.generate(prompt, **options, stop_strings=[string, "never there"])[0][len(prompt) :].tolist()
    assert stopped == whole[: len(stopped)] and len(stopped) <= 13
    assert string in model.tokenizer.decode(stopped, skip_special_tokens=False)
    assert string not in model.tokenizer.decode(stopped[:-1], skip_special_tokens=False)


def test_stop_strings_that_cannot_be_found():
    with pytest.raises(ValueError, match=r"^stop_strings: got \['', 'a'\], expected texts"):
        tiny_model().generate([5], stop_strings=["", "a"])
    with pytest.raises(ValueError, match=r"^stop_strings: this checkpoint has no tokenizer"):
        tiny_model().generate([5], stop_strings="a")
