"""GGUF files: tensors of every type, the q/k row order, metadata, tokenizers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import tiny_tensors
from gguf_files import TYPES, add_tensor, base_writer, finish, gguf_name, save_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import quantlab as ql
from quantlab import _core
from quantlab.io import open_checkpoint
from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.gguf import DECODED, GGUFFile
from quantlab.io.gguf_tokenizer import LLAMA3_PATTERN
from quantlab.io.sentencepiece import tokenizer_from_model

TEXTS = [
    "", " ", "Hello world", "  two  spaces 12 34567", "don't we'll I'M", "x=12.5e-3;\t\ty\r\n\r\n  z",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7", "日本語テキスト 123",
    "مرحبا بالعالم", "\u00a0nbsp\u2003em", "a" * 200, "e\u0301 é", "@user #tag http://t.co/x …", "\x00\x01",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    values, tensors = tiny_tensors(hidden_size=64, intermediate_size=96)
    config = check_config(values, "tiny")
    return config, {module: tensors[f"{module}.weight"] for module in module_shapes(config)}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_reads_every_matrix(kind: str, tmp_path: Path, parts: Any) -> None:
    """What comes out is the library's own rounding of what went in, rows in Hugging Face's order."""
    config, arrays = parts
    checkpoint = open_checkpoint(save_gguf(tmp_path / "M.GGUF", config, arrays, TYPES[kind]))
    assert checkpoint.modules == list(arrays)
    for module, array in arrays.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(checkpoint.vector(module), array)
            continue
        expected = gguf.dequantize(gguf.quantize(array, TYPES[kind]), TYPES[kind])
        weight = checkpoint.weight(module)
        assert weight.format == {"F16": "f16", "BF16": "bf16"}.get(kind, "f32")
        np.testing.assert_array_equal(weight.dequantize(), expected)
    assert checkpoint.kept_dtype == ("bfloat16" if kind == "BF16" else "float16")
    sizes = {module: len(gguf.quantize(array, TYPES[kind]).tobytes()) for module, array in arrays.items()}
    sizes |= {module: array.nbytes for module, array in arrays.items() if array.ndim == 1}
    assert {module: checkpoint.stored(module)[1] for module in arrays} == sizes


HALVES = {  # where a block has its float16 scales
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"), (0,)), **dict.fromkeys(("Q4_1", "Q5_1"), (0, 2)),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Random bytes, their scales any finite float16: denormal, zero and negative ones too."""
    raw = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[TYPES[kind]][1]), dtype=np.uint8)
    for offset in HALVES[kind]:
        high = raw[:, offset + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40
    raw[: count // 7, HALVES[kind][0] : HALVES[kind][0] + 2] = [0, 128]  # -0.0: the signs of zeros must be right, too
    return raw


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 15, 17, 257, 6151])
def test_decodes_every_bit(kind: str, count: int, rng: np.random.Generator) -> None:
    """The library's decoding bit for bit, for counts of blocks that no task divides."""
    raw = random_blocks(rng, kind, count)
    expected = gguf.dequantize(raw.reshape(1, -1), TYPES[kind]) if count else np.empty(0, np.float32)
    for threads in (1, 3):
        with ql.backend.use(threads=threads):
            got = _core.gguf_decode(raw, kind)
        assert got.shape == (count, gguf.GGML_QUANT_SIZES[TYPES[kind]][0]) and got.dtype == np.float32
        np.testing.assert_array_equal(got.view(np.uint32).ravel(), expected.view(np.uint32).ravel())


def test_decode_checks_its_blocks() -> None:
    with pytest.raises(ValueError, match=r"Q9_0.*Q4_K"):
        _core.gguf_decode(np.zeros((1, 144), np.uint8), "Q9_0")
    with pytest.raises(ValueError, match=r"blocks.*144"):
        _core.gguf_decode(np.zeros((1, 143), np.uint8), "Q4_K")
    with pytest.raises(TypeError, match="blocks"):
        _core.gguf_decode(np.zeros((1, 144), np.int8), "Q4_K")


@pytest.mark.parametrize("kind", DECODED)
def test_decodes_random_blocks(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A tensor of a file, with scales that are NaN and infinite among them, against one call of the library."""
    block, nbytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = rng.integers(0, 256, (1701, 3 * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=TYPES[kind])
    finish(writer)
    got = GGUFFile(tmp_path / "k.gguf").decode("t")
    assert got.shape == (1701, 3 * block)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, gguf.dequantize(raw, TYPES[kind]))


def test_config(tmp_path: Path, parts: Any) -> None:
    config, arrays = parts
    got = open_checkpoint(save_gguf(tmp_path / "m.gguf", config, arrays)).config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "vocab_size", "head_dim", "tie_word_embeddings", "model_type", "rope_theta"):  # fmt: skip
        assert got[name] == config[name], name
    assert got["rms_norm_eps"] == pytest.approx(1e-5) and got["rope_scaling"] is None


def test_tied_embedding(tmp_path: Path, parts: Any) -> None:
    config, arrays = parts
    arrays = {module: array for module, array in arrays.items() if module != "lm_head"}
    checkpoint = open_checkpoint(save_gguf(tmp_path / "m.gguf", config, arrays))
    assert checkpoint.config["tie_word_embeddings"] and not checkpoint.has("lm_head")


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """As transformers' _compute_llama3_parameters divides the frequencies."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    wavelength = 2 * np.pi / frequency
    low, high, original = 1.0, 4.0, 8192
    smooth = (original / wavelength - low) / (high - low)
    middle = 1.0 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, middle))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again(factor: float, tmp_path: Path, parts: Any) -> None:
    config, arrays = parts
    writer = base_writer(tmp_path / "m.gguf", config)
    writer.add_tensor("rope_freqs.weight", llama3_factors(16, 10000.0, factor).astype(np.float32))
    for module, array in arrays.items():
        add_tensor(writer, gguf_name(module), array, TYPES.F32)
    finish(writer)
    scaling = open_checkpoint(tmp_path / "m.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == pytest.approx(factor)
    assert scaling["original_max_position_embeddings"] == 8192


def test_foreign_rope_factors_are_refused(tmp_path: Path, parts: Any) -> None:
    config, arrays = parts
    writer = base_writer(tmp_path / "m.gguf", config)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))
    for module, array in arrays.items():
        add_tensor(writer, gguf_name(module), array, TYPES.F32)
    finish(writer)
    with pytest.raises(ValueError, match="rope_freqs"):
        open_checkpoint(tmp_path / "m.gguf")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def byte_level(pre: str) -> Tokenizer:
    """A byte-level BPE trained on TEXTS with the pre-tokenizer that `pre` stands for, as its model's authors set it."""
    from tokenizers import Regex

    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")],
        "gpt-2": [],
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=byte.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_byte_level_bpe(pre: str, tmp_path: Path, parts: Any) -> None:
    import json

    source = byte_level(pre)
    model = json.loads(source.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    config, arrays = parts
    config, arrays = dict(config, vocab_size=len(tokens)), dict(arrays)
    for module in ("model.embed_tokens", "lm_head"):
        arrays[module] = np.zeros((len(tokens), 64), np.float32)
    writer = base_writer(tmp_path / "m.gguf", config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for module, array in arrays.items():
        add_tensor(writer, gguf_name(module), array, TYPES.F32)
    finish(writer)

    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    tokenizer = checkpoint.tokenizer
    bos = [1] if pre == "llama-bpe" else []  # what llama.cpp takes where the file does not say
    for text in [*TEXTS, "<|start|>user\nhi<|end|>"]:
        assert tokenizer.encode(text).ids == bos + source.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == "<|start|>" * len(bos) + text
    assert checkpoint.chat_template == "{{ messages }}" and checkpoint.config["eos_token_id"] == 0
    assert checkpoint.eos_token_ids == [0, 2]  # a turn's end too
    assert json.loads(checkpoint.tokenizer_files["generation_config.json"]) == {"eos_token_id": [0, 2]}
    assert {"tokenizer.json", "tokenizer_config.json"} < checkpoint.tokenizer_files.keys()
    again = Tokenizer.from_str(checkpoint.tokenizer_files["tokenizer.json"].decode())
    assert again.encode(TEXTS[5]).ids == tokenizer.encode(TEXTS[5]).ids


def test_sentencepiece_bpe(tmp_path: Path, parts: Any) -> None:
    """The library's own ids, from a tokenizer.model and from the same pieces in a GGUF file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[2:] * 3), model_writer=model, vocab_size=450, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = oracle.get_piece_size()
    kinds = [
        2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in range(size)
    ]
    config, arrays = parts
    config, arrays = dict(config, vocab_size=size), dict(arrays)
    for module in ("model.embed_tokens", "lm_head"):
        arrays[module] = np.zeros((size, 64), np.float32)
    writer = base_writer(tmp_path / "m.gguf", config)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([oracle.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([oracle.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    for module, array in arrays.items():
        add_tensor(writer, gguf_name(module), array, TYPES.F32)
    finish(writer)
    readers = tokenizer_from_model(tmp_path / "tokenizer.model", {}), open_checkpoint(tmp_path / "m.gguf").tokenizer
    for tokenizer in readers:
        for text in TEXTS:
            assert tokenizer.encode(text).ids == [1, *oracle.encode(text)], text
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---- the demo's file -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Any:
    try:
        return open_checkpoint("demo")
    except ConnectionError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")


def test_demo(demo: Any) -> None:
    assert (demo.config["hidden_size"], demo.config["num_hidden_layers"], demo.config["vocab_size"]) == (576, 30, 49152)
    assert demo.config["tie_word_embeddings"] and demo.config["rope_theta"] == 100000.0
    ids = demo.tokenizer.encode("<|im_start|>user\nWhat is 12  34?<|im_end|>").ids
    assert (
        ids[0] == 1
        and ids[-1] == 2
        and demo.tokenizer.decode(ids, skip_special_tokens=False).endswith("12  34?<|im_end|>")
    )
    assert "<|im_start|>" in demo.chat_template
