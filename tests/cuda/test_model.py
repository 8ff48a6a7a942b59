"""A model on the GPU against the same model on the CPU.

Weights and activations there are rounded to bfloat16, by 2^-9 / sqrt(3) of themselves in root mean square: on the way
through a layer seven weights, the inputs of seven products, queries, keys, values and weights of the attention, 18
times in all, independently, so that the errors add like a random walk. NOISE is three times what comes out of that for
the two layers of the test's model: softmax and SwiGLU may pass on more of an error than they got."""

from __future__ import annotations

import gc
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import tiny_adapter, tiny_model
from training_reference import AdapterParts

import quantlab as ql
from quantlab import _core
from quantlab.generate import generation_steps
from quantlab.llama import KVCache, LlamaForCausalLM

LAYERS = 2
NOISE = 3 * 2.0**-9 / np.sqrt(3) * np.sqrt(18 * LAYERS)

SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 1},
    "larger": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "tied": {"tie_word_embeddings": True},
}


def pair(**changes) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    model = tiny_model(num_hidden_layers=LAYERS, **changes)
    return model, model.to("cuda")


def rows_of(model: LlamaForCausalLM, lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, length).astype(np.int32) for length in lengths]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 17, 3), (33, 64), (200, 7)])
def test_hidden_states(shape: str, lengths: tuple[int, ...]) -> None:
    cpu, gpu = pair(**SHAPES[shape])
    assert gpu.device == "cuda"
    rows = rows_of(cpu, lengths)
    expected, found = cpu.hidden_states(rows), gpu.hidden_states(rows)
    assert relative(found, expected) <= NOISE
    assert found.tobytes() == gpu.hidden_states(rows).tobytes()


CONFIGS = [ql.RTNConfig(4, 32), ql.RTNConfig(3, 32), ql.RTNConfig(8, 32, sym=False), ql.NF4Config(32), ql.Int8Config()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_quantized(config) -> None:
    """Against the CPU with the same codes: what is compared is the arithmetic."""
    cpu = ql.quantize(tiny_model(num_hidden_layers=LAYERS), config, progress=False)
    gpu = cpu.to("cuda")
    for lengths in ((1,), (9, 40, 2)):
        rows = rows_of(cpu, lengths)
        assert relative(gpu.hidden_states(rows), cpu.hidden_states(rows)) <= NOISE


FEW_TOKENS = [  # and the intermediate_size: 704 is not of whole units
    (ql.RTNConfig(4, 128), 704),
    (ql.RTNConfig(4, 128), 768),
    (ql.RTNConfig(3, 64, sym=False), 704),
    (ql.NF4Config(64), 704),
    (ql.NF4Config(64), 768),
]


@pytest.mark.parametrize(("config", "intermediate"), FEW_TOKENS, ids=str)
def test_few_tokens(config, intermediate: int) -> None:
    """Matrices of whole units: what adds to the residual stream prepares the norm behind it, and more than 8 tokens
    pass from attention and SwiGLU to the next product in the order that it takes. A model this wide passes on more of
    an error: rounding its activations alone, as AMX does, moves its states by up to 0.032, half of what is allowed."""
    changes = {"hidden_size": 2304, "num_attention_heads": 18, "head_dim": 128}
    float_model = tiny_model(num_hidden_layers=LAYERS, intermediate_size=intermediate, **changes)
    cpu = ql.quantize(float_model, config, progress=False)
    check_few_tokens(cpu, (1, 2, 7, 8, 9, 16, 17, 24, 32, 33, 40, 48, 49, 64, 65), (3, 8, 12, 20, 40))


LONG_K = 40960  # of few outputs: no cluster has two items, and activations of so long a K go by in slots
LONG_K_CONFIGS = [ql.RTNConfig(4, 128), ql.NF4Config(64), ql.RTNConfig(3, 64), ql.Int8Config()]


@pytest.mark.parametrize("config", LONG_K_CONFIGS, ids=str)
def test_long_k(config) -> None:
    float_model = tiny_model(num_hidden_layers=1, hidden_size=256, intermediate_size=LONG_K)
    cpu = ql.quantize(float_model, config, progress=False)
    check_few_tokens(cpu, (1, 2, 3, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65), (3, 8, 12, 20, 40))


MANY_TOKENS = {  # heads of which an item of 128 outputs has none whole, two, one; outputs of whole items and not
    "small": {"intermediate_size": 256},
    "larger": {**SHAPES["larger"], "hidden_size": 384, "num_attention_heads": 6},
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "wider": {
        "hidden_size": 1152,
        "intermediate_size": 5004,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 128,
    },
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        *((ql.RTNConfig(4, 32), shape) for shape in MANY_TOKENS),
        *((ql.NF4Config(64), shape) for shape in MANY_TOKENS),
        (ql.RTNConfig(4, 128, sym=False), "wide"),
        (ql.RTNConfig(3, 64, sym=False), "larger"),
        (ql.RTNConfig(2, 32), "wide"),
        (ql.RTNConfig(8, 128), "wide"),
        (ql.FP4Config(32), "larger"),
        (ql.Int8Config(), "wide"),
    ],
    ids=str,
)
def test_many_tokens(config, shape: str) -> None:
    """Some products of a layer decode the weight on the way, others once for all tokens, in one band of them, several,
    and one that is not whole (linear_packed.cu)."""
    cpu = ql.quantize(tiny_model(num_hidden_layers=LAYERS, **MANY_TOKENS[shape]), config, progress=False)
    check_few_tokens(cpu, (1025, 2049, 2500) if shape == "wider" else (1025, 2049, 2500, 4400), ())


def test_many_tokens_with_columns_in_another_order() -> None:
    model = tiny_model(num_hidden_layers=LAYERS, **MANY_TOKENS["wide"])
    config = ql.GPTQConfig(4, 128, desc_act=True)
    rows = rows_of(model, (64,) * 8, seed=3)
    check_few_tokens(ql.quantize(model, config, calibration=rows, progress=False), (2100,), ())


def test_many_tokens_of_two_kinds() -> None:
    """gate and up are decoded once and leave columns in the order of down, which decodes on the way."""
    model = tiny_model(num_hidden_layers=LAYERS, **MANY_TOKENS["wide"])
    weights = dict(ql.quantize(model, ql.RTNConfig(4, 32), progress=False).weights)
    tables = ql.quantize(model, ql.NF4Config(64), progress=False).weights
    weights |= {name: w for name, w in tables.items() if name.endswith(("gate_proj", "up_proj"))}
    check_few_tokens(LlamaForCausalLM(model.config, weights, model.vectors), (1500,), ())


@pytest.mark.parametrize("head_dim", [40, 80, 96])
@pytest.mark.parametrize("floats", [(), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)], ids=str)
def test_columns_in_the_order_of_the_product(head_dim: int, floats: tuple[str, ...]) -> None:
    """Attention of heads that no fast kernel knows or that are not of 32 columns, and matrices of two kinds."""
    changes = {"hidden_size": 16 * head_dim, "num_attention_heads": 16, "head_dim": head_dim, "intermediate_size": 768}
    model = tiny_model(num_hidden_layers=LAYERS, **changes)
    weights = dict(ql.quantize(model, ql.RTNConfig(4, 32), progress=False).weights)
    weights |= {name: w for name, w in model.weights.items() if name.endswith(floats)}
    check_few_tokens(LlamaForCausalLM(model.config, weights, model.vectors), (9, 16, 17, 48, 64), (12, 20))


def check_few_tokens(cpu: LlamaForCausalLM, tokens: tuple[int, ...], sequences: tuple[int, ...]) -> None:
    """On the GPU against the CPU: hidden states of so many tokens, and generation for so many sequences."""
    gpu = cpu.to("cuda")
    for count in tokens:
        rows = rows_of(cpu, (count,), seed=count)
        found = gpu.hidden_states(rows)
        with ql.backend.use(precise=True):  # AMX rounds activations too
            expected = cpu.hidden_states(rows)
        assert relative(found, expected) <= 3 * NOISE, count
        assert found.tobytes() == gpu.hidden_states(rows).tobytes()
    for count in sequences:  # a step is recorded, and so is what passes between its products
        prompts = rows_of(cpu, (2,) * count, seed=count)
        for prompt, row in zip(prompts, gpu.generate(prompts, max_new_tokens=12, eos_token_id=[]), strict=True):
            check_greedy(cpu, prompt, row[len(prompt) :].tolist())


def test_logits_losses_and_features() -> None:
    cpu, gpu = pair()
    rows = rows_of(cpu, (40, 7))
    assert relative(gpu(rows), cpu(rows)) <= NOISE
    ids = np.concatenate(rows_of(cpu, (300,), seed=1))
    losses, expected = gpu.losses(ids[:-1], ids[1:]), cpu.losses(ids[:-1], ids[1:])
    spread = np.abs(cpu([ids])).max()  # a loss moves by as much as a logit does, and by what their sum does
    assert np.abs(losses - expected).max() <= 4 * NOISE * spread
    found = gpu.perplexity(ids, context=100)
    assert abs(found["ppl"] / cpu.perplexity(ids, context=100)["ppl"] - 1) <= NOISE * spread


def check_greedy(cpu: LlamaForCausalLM, prompt: np.ndarray, tokens: list[int]) -> None:
    """Each token is the CPU's likeliest one, or as likely but for what bfloat16 does to a logit."""
    ids = np.concatenate([prompt, np.array(tokens, np.int32)])
    logits = cpu([ids])[0, len(prompt) - 1 : -1]
    best, chosen = logits.max(1), logits[np.arange(len(tokens)), tokens]
    assert (best - chosen <= 4 * NOISE * np.abs(logits).max(1)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation(shape: str) -> None:
    """Ragged prompts, beyond the first bound of keys: so the step is recorded twice."""
    cpu, gpu = pair(**SHAPES[shape], max_position_embeddings=1024)
    prompts = rows_of(cpu, (5, 1, 230, 3))
    found = gpu.generate(prompts, max_new_tokens=60, eos_token_id=[])
    for prompt, row in zip(prompts, found, strict=True):
        assert row[: len(prompt)].tobytes() == prompt.tobytes()
        check_greedy(cpu, prompt, row[len(prompt) :].tolist())
    again = gpu.generate(prompts, max_new_tokens=60, eos_token_id=[])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, again, strict=True))


MANY = {
    "heads of 64": (4, 4, 64, 40),
    "grouped": (16, 4, 80, 40),
    "heads of 96": (4, 4, 96, 36),
    "heads of 128": (8, 4, 128, 40),
    "groups of 16": (32, 2, 64, 70),
    "two stages": (32, 32, 64, 26),
    "two stages, heads of 128": (16, 16, 128, 50),
}


@pytest.mark.parametrize("shape", MANY)
@pytest.mark.parametrize("longest", [100, 230])
def test_many_sequences(shape: str, longest: int) -> None:
    """So many that a block takes one (sequence, head) after the other; their keys end anywhere in a tile of 64, and one
    more each step."""
    heads, kv_heads, head_dim, count = MANY[shape]
    changes = {"hidden_size": 64, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    cpu, gpu = pair(**changes)
    sizes = [
        n for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 57, 63, 64, 65, 100, 119, 127, 129, 192, 230) if n <= longest
    ]
    prompts = rows_of(cpu, [sizes[i % len(sizes)] for i in range(count)])
    found = gpu.generate(prompts, max_new_tokens=9, eos_token_id=[])
    for prompt, row in zip(prompts, found, strict=True):
        check_greedy(cpu, prompt, row[len(prompt) :].tolist())
    again = gpu.generate(prompts, max_new_tokens=9, eos_token_id=[])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, again, strict=True))


# ---- beside an adapter ---------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 8},
    "q and v": {"slots": (0, 2), "r": 3},
    "up alone": {"slots": (5,), "r": 17},
    "one layer": {"slots": (1, 3, 4, 6), "layers": (1,), "r": 1},
    "wide": {"r": 64},
    "a rank each": {"r": (3, 17, 1, 8, 64)},
}
BASES = {
    "f32": None,
    "nf4": ql.NF4Config(32),
    "affine4": ql.RTNConfig(4, 32),
    "affine3": ql.RTNConfig(3, 32, sym=False),
    "permuted": ql.GPTQConfig(4, 32, desc_act=True),
}


def adapted(config: ql.QuantizationConfig | None, adapter: dict[str, Any], **changes) -> tuple[Any, Any, AdapterParts]:
    """The model on the CPU and on the GPU beside a random adapter, and its parameters, which the first reads in place:
    what they add is about as large as the weights, whatever the rank."""
    model = tiny_model(num_hidden_layers=LAYERS, **changes)
    if config is not None:
        calibration = rows_of(model, (64,) * 8, seed=9) if isinstance(config, ql.GPTQConfig) else None
        model = ql.quantize(model, config, calibration, progress=False)
    parts = tiny_adapter(model.config, **adapter)
    parts.parameters *= np.float32(np.mean(adapter["r"]) ** -0.25)
    model.adapter = SimpleNamespace(handle=_core.Adapter(parts.parameters, parts.layout, parts.scales))
    model._core = model._build_core()
    return model, model.to("cuda"), parts


@pytest.mark.parametrize("base", ["nf4", "affine3", "permuted"])
def test_norms_between_products_beside_an_adapter(base: str) -> None:
    """A width of whole units: the norm is prepared while the adapter makes its own; columns in another order take the
    residual stream itself."""
    changes = {"hidden_size": 512, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 64}
    cpu, gpu, _ = adapted(BASES[base], ADAPTERS["all"], **changes)
    for lengths in ((3,), (9, 2), (16, 8), (33, 31)):
        rows = rows_of(cpu, lengths)
        with ql.backend.use(precise=True):
            expected = cpu.hidden_states(rows)
        assert relative(gpu.hidden_states(rows), expected) <= 3 * NOISE, lengths


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_hidden_states_beside_an_adapter(base: str, adapter: str) -> None:
    cpu, gpu, _ = adapted(BASES[base], ADAPTERS[adapter])
    for lengths in ((1,), (2,), (9, 2), (33, 31, 1), (200, 7)):  # a kernel each
        rows = rows_of(cpu, lengths)
        found = gpu.hidden_states(rows)
        assert relative(found, cpu.hidden_states(rows)) <= NOISE, lengths
        assert found.tobytes() == gpu.hidden_states(rows).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", ["f32", "nf4", "permuted"])
def test_generation_beside_an_adapter(base: str, shape: str) -> None:
    cpu, gpu, _ = adapted(BASES[base], ADAPTERS["all"], **SHAPES[shape], max_position_embeddings=1024)
    for lengths in ((5,), (5, 1, 230, 3), (4,) * 9, (2,) * 33):
        prompts = rows_of(cpu, lengths)
        found, again = (gpu.generate(prompts, max_new_tokens=40, eos_token_id=[]) for _ in range(2))
        for prompt, row in zip(prompts, found, strict=True):
            check_greedy(cpu, prompt, row[len(prompt) :].tolist())
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, again, strict=True))


def test_recorded_steps_see_new_parameters() -> None:
    """Training changes them where they are: here between two tokens of a generation, whose steps run ahead."""
    ahead, before, after = 4, 20, 20  # the first: STEPS_AHEAD of py_generation.c
    cpu, gpu, parts = adapted(BASES["nf4"], ADAPTERS["all"])
    prompt = rows_of(cpu, (5,))[0]
    steps = generation_steps(gpu, [prompt], before + after)
    tokens = [int(token[0]) for token in islice(steps, before)]
    zeros = [np.zeros_like(parts.parameters) for _ in range(3)]
    trainer = _core.Trainer(gpu._core, gpu.lm_head.handle, zeros[0])
    old = parts.parameters.copy()
    parts.parameters *= -1
    trainer.write(*zeros[1:])
    tokens += [int(token[0]) for token in steps]
    known, cache = np.append(prompt, np.array(tokens, np.int32)), KVCache(cpu.config, 1, 100)
    first = len(prompt) + before + ahead - 2  # tokens that the old ones took in
    new, parts.parameters[:] = parts.parameters.copy(), old
    cpu.packed_hidden([known[:first]], cache)
    parts.parameters[:] = new
    logits = cpu.logits(cpu.packed_hidden([known[first:-1]], cache))
    chosen = logits[np.arange(len(logits)), known[first + 1 :]]
    assert (logits.max(1) - chosen <= 4 * NOISE * np.abs(logits).max(1)).all()
    parts.parameters[:] = old
    unchanged = cpu.logits(cpu.packed_hidden([known[:-1]], KVCache(cpu.config, 1, 100)))[first:]
    assert (unchanged.argmax(1) != known[first + 1 :]).any()


# ---- what else generates -------------------------------------------------------------------------------------------


def test_rows_end_early_and_tokens_come_in_order() -> None:
    _, gpu = pair()
    prompts = rows_of(gpu, (4, 9))
    free = gpu.generate(prompts, max_new_tokens=20, eos_token_id=[])
    stop = int(free[0][4 + 7])
    seen: list[tuple[int, int]] = []
    found = gpu.generate(prompts, max_new_tokens=20, eos_token_id=stop, on_token=lambda *pair: seen.append(pair))
    for row, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        new = free[row][len(prompt) :].tolist()
        expected = new[: new.index(stop) + 1] if stop in new else new
        assert tokens[len(prompt) :].tolist() == expected
        assert [token for at, token in seen if at == row] == expected


def test_sampling_follows_its_seed() -> None:
    _, gpu = pair()
    prompts = rows_of(gpu, (4, 9, 2))
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95}
    options["eos_token_id"] = []
    first, again, other = (gpu.generate(prompts, seed=seed, **options) for seed in (1, 1, 2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_memory_goes_with_the_model() -> None:
    gc.collect()
    before = ql.cuda.memory()["current"]
    cpu, gpu = pair(**SHAPES["larger"])
    gpu.generate(rows_of(gpu, (4,)), max_new_tokens=8)
    assert ql.cuda.memory()["current"] > before
    del gpu
    gc.collect()
    scratch = 256 << 20  # what ops keep for the next call
    assert ql.cuda.memory()["current"] - before <= scratch
    second = cpu.to("cuda")
    assert second.to("cuda") is second and second.to("cpu").device == "cpu"


def test_classifier() -> None:
    from models import tiny_parts

    cpu = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    gpu = cpu.to("cuda")
    rows = rows_of(cpu, (12, 3, 40, 1, 7))
    assert relative(gpu.features(rows, show=False), cpu.features(rows, show=False)) <= NOISE
    assert gpu.num_labels == 3 and gpu.predict(rows, show=False).shape == (5, 3)
