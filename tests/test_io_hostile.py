"""Damaged, lying and foreign files: one clear error each that names the file, no large allocation, nothing written."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import save_tiny, tiny_tensors
from gguf_files import save_gguf

import quantlab as ql
from quantlab.io import open_checkpoint, save_checkpoint
from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.gguf import GGUFFile
from quantlab.io.safetensors import SafetensorsFile
from quantlab.io.sentencepiece import tokenizer_from_model

Q_PROJ = "model.layers.0.self_attn.q_proj"

# ---- safetensors -------------------------------------------------------------------------------------------------


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


EIGHT = bytes(8)
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "expected at least 8"),
    "seven bytes": (b"\0" * 7, "expected at least 8"),
    "header longer than the file": (with_header(one(), EIGHT, length=10**6), "claims 1000000 bytes"),
    "header of 2^63 bytes": (with_header(one(), EIGHT, length=2**63), "claims 9223372036854775808"),
    "header that is not JSON": (with_header(b"{not json", EIGHT), "not JSON"),
    "header that is not UTF-8": (with_header(b'{"\xff": 1}', EIGHT), "not JSON"),
    "header nested a million deep": (with_header(b"[" * 10**6), "not JSON"),
    "header that is a list": (with_header([1, 2]), "list"),
    "a name twice": (
        with_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"\0"), "names 'a' twice"
    ),
    "entry that is a number": (with_header({"a": 3}), "lacks dtype"),
    "entry without offsets": (with_header({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "lacks dtype"),
    "unknown dtype": (with_header(one(dtype="F31"), EIGHT), "'F31'"),
    "dtype that is a list": (with_header(one(dtype=["F32"]), EIGHT), "accepted"),
    "negative size": (with_header(one(shape=[-2]), EIGHT), "shape"),
    "fractional size": (with_header(one(shape=[2.0]), EIGHT), "shape"),
    "sizes whose product overflows 64 bits": (with_header(one(shape=[2**40, 2**40]), EIGHT), "expected"),
    "shape larger than its bytes": (with_header(one(shape=[3]), EIGHT), "expected 12"),
    "offsets backwards": (with_header(one(data_offsets=[8, 0]), EIGHT), "data_offsets"),
    "one offset": (with_header(one(data_offsets=[0]), EIGHT), "data_offsets"),
    "offsets beyond the end": (with_header(one(data_offsets=[0, 8]), b"\0" * 7), "cut short"),
    "offsets of 2^70": (with_header(one(data_offsets=[2**70, 2**70 + 8]), EIGHT), "ends at byte"),
    "overlapping tensors": (
        with_header({**one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)), "overlaps"
    ),
    "a hole between tensors": (with_header(one(data_offsets=[8, 16]), bytes(16)), "hole"),
    "bytes after the last tensor": (with_header(one(), bytes(9)), "follow"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}, **one()}, EIGHT), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, tmp_path: Path) -> None:
    content, expected = SAFETENSORS[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refuses(lambda: SafetensorsFile(path), path.name, expected, tmp_path)


def refuses(call: Callable[[], Any], name: str, expected: str, folder: Path) -> None:
    """`call` raises one error of one line that holds `name` and `expected`, takes no memory, and writes nothing."""
    before = sorted(folder.rglob("*"))
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError)) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert name in message and expected in message, message
    assert "\n" not in message and len(message) < 600, message
    assert peak < 64 << 20
    assert sorted(folder.rglob("*")) == before


# ---- directories: each case changes a good one ---------------------------------------------------------------------


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def gptq_config(**changes: Any) -> Callable[[Path], None]:
    return change_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, **changes})


def change_tensors(**changes: Any) -> Callable[[Path], None]:
    """Replaces the tensors of these names (None: leaves them out)."""

    def change(folder: Path) -> None:
        tensors = {**tiny_tensors()[1], **{name.replace("__", "."): array for name, array in changes.items()}}
        tensors = {name: array for name, array in tensors.items() if array is not None}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return change


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count]) and None


def index(weight_map: Any) -> Callable[[Path], None]:
    return write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


GAIN, MATRIX = np.ones(64, np.float32), np.zeros((64, 64), np.float32)
DIRECTORIES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (drop("config.json"), "", "config.json"),
    "config cut short": (cut("config.json", 5), "config.json", "not a JSON file"),
    "config that is a list": (write("config.json", "[]"), "config.json", "expected an object"),
    "config of binary bytes": (write("config.json", b"\xff\xfe\0"), "config.json", "not a JSON file"),
    "another architecture": (
        change_config(architectures=["BertModel"], model_type="bert"), "config.json", "BertModel of model_type"
    ),
    "Mistral": (change_config(architectures=["MistralForCausalLM"], model_type="mistral"), "config.json", "not supp"),
    "a biased attention": (change_config(attention_bias=True), "config.json", "attention_bias"),
    "a biased MLP": (change_config(mlp_bias=True), "config.json", "mlp_bias"),
    "another activation": (change_config(hidden_act="gelu"), "config.json", "'gelu'"),
    "longrope": (change_config(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "config.json", "'longrope'"),
    "longrope, new spelling": (change_config(rope_parameters={"rope_type": "longrope"}), "config.json", "'longrope'"),
    "partial rotation": (
        change_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "config.json", "partial"
    ),
    "no layers": (change_config(num_hidden_layers=0), "config.json", "num_hidden_layers"),
    "a billion layers": (change_config(num_hidden_layers=10**9), "config.json", "num_hidden_layers"),
    "a text for a size": (change_config(hidden_size="64"), "config.json", "hidden_size"),
    "a vocabulary of 10^12": (change_config(vocab_size=10**12), "config.json", "vocab_size"),
    "heads that do not divide": (change_config(num_attention_heads=3, num_key_value_heads=2), "config.json", "divide"),
    "heads of odd size": (change_config(head_dim=15), "config.json", "head_dim"),
    "an infinite epsilon": (change_config(rms_norm_eps=float("inf")), "config.json", "rms_norm_eps"),
    "more layers than tensors": (change_config(num_hidden_layers=3), "", "model.layers.2.input_layernorm.weight"),
    "fewer layers than tensors": (change_config(num_hidden_layers=1), "", "not one of a Llama model"),
    "another hidden size": (change_config(hidden_size=128, head_dim=16), "model.safetensors", "has shape"),
    "no weights": (drop("model.safetensors"), "", "no safetensors file"),
    "pickled weights": (pickled, "", "pytorch_model.bin"),
    "two files and no index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "b.safetensors")
        and write("a.safetensors", with_header({}))(folder), "", "2 safetensors files",
    ),
    "weights cut short": (cut("model.safetensors", 9), "model.safetensors", "cut short"),
    "a tensor missing": (change_tensors(**{f"{Q_PROJ}.weight": None}), "", Q_PROJ),
    "a head missing": (change_tensors(**{"lm_head.weight": None}), "", "lm_head.weight"),
    "a matrix of integers": (
        change_tensors(**{f"{Q_PROJ}.weight": MATRIX.astype(np.int32)}), "model.safetensors", "I32, accepted: F32"
    ),
    "a matrix of float64": (change_tensors(**{f"{Q_PROJ}.weight": MATRIX.astype(float)}), "model.safetensors", "F64"),
    "a matrix of the wrong shape": (
        change_tensors(**{f"{Q_PROJ}.weight": MATRIX[:32]}), "model.safetensors", "(32, 64), expected (64, 64)"
    ),
    "a vector for a matrix": (change_tensors(**{f"{Q_PROJ}.weight": GAIN}), "model.safetensors", "(64,), expected"),
    "a bias": (change_tensors(**{f"{Q_PROJ}.bias": GAIN}), "", "bias"),
    "a foreign tensor": (change_tensors(**{"model.vision.weight": GAIN}), "", "model.vision.weight"),
    "an index of a missing shard": (index({"a": "model-00001-of-00002.safetensors"}), "00001-of-00002", "missing"),
    "an index that leads out": (index({"a": "../model.safetensors"}), "index.json", "beside the index"),
    "an index of numbers": (index({"a": 3}), "index.json", "beside the index"),
    "an empty index": (index({}), "index.json", "weight_map"),
    "an index naming a tensor elsewhere": (index({"nope": "model.safetensors"}), "index.json", "'nope'"),
    "an unknown quantization": (change_config(quantization_config={"quant_method": "awq"}), "config.json", "'awq'"),
    "a quantization that is a text": (change_config(quantization_config="gptq"), "config.json", "expected an object"),
    "GPTQ of 5 bits": (
        gptq_config(bits=5), "config.json", "bits is 5"
    ),
    "GPTQ without bits": (gptq_config(bits=None), "config.json", "bits"),
    "GPTQ, group size 0": (
        gptq_config(group_size=0), "config.json", "group_size"
    ),
    "GPTQ, marlin": (
        gptq_config(checkpoint_format="marlin"),
        "config.json", "'marlin'",
    ),
    "GPTQ, planar": (
        gptq_config(format="gptq_p"),
        "config.json", "'gptq_p'",
    ),
    "GPTQ, 64-bit words": (
        gptq_config(pack_dtype="int64"),
        "config.json", "pack_dtype",
    ),
    "GPTQ, broken pattern": (
        gptq_config(dynamic={"+:(": {}}),
        "config.json", "pattern",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directory(case: str, tmp_path: Path) -> None:
    damage, name, expected = DIRECTORIES[case]
    folder = save_tiny(tmp_path / "model")
    damage(folder)
    refuses(lambda: open_checkpoint(folder), name or str(folder), expected, tmp_path)


# ---- GPTQ and bitsandbytes directories: each case changes one tensor -------------------------------------------------


def quantized(folder: Path, config: Any) -> None:
    """A tiny quantized checkpoint."""
    values, tensors = tiny_tensors()
    shapes = module_shapes(check_config(values, "tiny"))
    weights, vectors = {}, {}
    for module, shape in shapes.items():
        array = tensors[f"{module}.weight"]
        if len(shape) == 1:
            vectors[module] = array
        else:
            quantize = "layers" in module
            weights[module] = ql.QuantWeight.from_float(array, config) if quantize else ql.QuantWeight.from_array(array)
    save_checkpoint(folder, values, weights, vectors)


def state(**changes: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(json.dumps({**json.loads(array.tobytes()), **changes}).encode(), np.uint8)

    return change


def replace(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.frombuffer(content, np.uint8)


RTN, NF4, NF4_DOUBLE, INT8 = ql.RTNConfig(4, 32), ql.NF4Config(), ql.NF4Config(double_quant=True), ql.Int8Config()
STATE = "weight.quant_state.bitsandbytes__nf4"
QUANTIZED: dict[str, tuple[Any, str, Callable[[np.ndarray], np.ndarray | None], str]] = {
    "qweight of the wrong shape": (RTN, "qweight", lambda a: a[:4], "expected (8, 64)"),
    "qweight of floats": (RTN, "qweight", lambda a: a.astype(np.float32), "accepted: I32"),
    "qzeros missing": (RTN, "qzeros", lambda a: None, "lacks tensor"),
    "qzeros of the wrong shape": (RTN, "qzeros", lambda a: a[:, :4], "expected (2, 8)"),
    "scales of the wrong group size": (RTN, "scales", lambda a: a[:1], "expected (2, 64)"),
    "scales of NaN": (RTN, "scales", lambda a: a * np.float16("nan"), "NaN"),
    "g_idx of the wrong length": (RTN, "g_idx", lambda a: a[:5], "expected (64,)"),
    "g_idx out of range": (RTN, "g_idx", lambda a: a + 1, "expected 0 to 1"),
    "g_idx negative": (RTN, "g_idx", lambda a: a - 1, "expected 0 to 1"),
    "codes cut short": (NF4, "weight", lambda a: a[:-1], "expected 2048 bytes"),
    "absmax cut short": (NF4, "weight.absmax", lambda a: a[:-1], "expected (64,)"),
    "quant_map of the wrong size": (NF4, "weight.quant_map", lambda a: a[:8], "expected (16,)"),
    "another code table": (NF4, "weight.quant_map", lambda a: a * 2, "not the table of nf4"),
    "quant_state missing": (NF4, STATE, lambda a: None, "quant_state"),
    "quant_state not JSON": (NF4, STATE, replace(b"{"), "not JSON"),
    "quant_state a list": (NF4, STATE, replace(b"[]"), "quant_type"),
    "quant_state of a megabyte": (NF4, STATE, replace(bytes(1 << 20)), "at most"),
    "block size 48": (NF4, STATE, state(blocksize=48), "blocksize"),
    "another shape": (NF4, STATE, state(shape=[32, 128]), "shape"),
    "another type": (NF4, STATE, state(quant_type="fp4"), "quant_type"),
    "unknown field": (NF4, STATE, state(extra=1), "unknown fields"),
    "nested offset NaN": (NF4_DOUBLE, STATE, state(nested_offset=float("nan")), "nested_offset"),
    "nested offset a text": (NF4_DOUBLE, STATE, state(nested_offset="x"), "nested_offset"),
    "nested map missing": (NF4_DOUBLE, "weight.nested_quant_map", lambda a: None, "lacks tensor"),
    "nested absmax cut short": (NF4_DOUBLE, "weight.nested_absmax", lambda a: a[:0], "expected (1,)"),
    "SCB of the wrong size": (INT8, "SCB", lambda a: a[:3], "expected (64,)"),
    "int8 codes of uint8": (INT8, "weight", lambda a: a.view(np.uint8), "accepted: I8"),
    "an old int8 row order": (INT8, "weight_format", lambda a: np.array(2, np.uint8), "weight_format"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_directory(case: str, tmp_path: Path) -> None:
    config, suffix, change, expected = QUANTIZED[case]
    folder = tmp_path / "model"
    quantized(folder, config)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    changed = change(tensors.pop(f"{Q_PROJ}.{suffix}"))
    if changed is not None:
        tensors[f"{Q_PROJ}.{suffix}"] = np.ascontiguousarray(changed)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    refuses(lambda: open_checkpoint(folder).weight(Q_PROJ), str(folder), expected, tmp_path)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def tiny_gguf(path: Path) -> Path:
    values, tensors = tiny_tensors()
    config = check_config(values, "tiny")
    return save_gguf(path, config, {module: tensors[f"{module}.weight"] for module in module_shapes(config)})


def patch(offset: int, code: str, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + struct.pack("<" + code, value) + data[offset + struct.calcsize(code) :]


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


def header(*pairs: bytes, tensors: bytes = b"", tensor_count: int = 0) -> Callable[[bytes], bytes]:
    return lambda data: (
        b"GGUF" + struct.pack("<IQQ", 3, tensor_count, len(pairs)) + b"".join(pairs) + tensors + bytes(64)
    )


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda data: b"", "expected at least 24"),
    "another magic": (patch(0, "4s", b"GGML"), "begins with b'GGML'"),
    "version 1": (patch(4, "I", 1), "version 1"),
    "big-endian": (patch(4, "I", 0x03000000), "version 50331648"),
    "2^60 tensors": (patch(8, "Q", 2**60), "claims"),
    "2^60 metadata values": (patch(16, "Q", 2**60), "claims"),
    "a name of 2^62 bytes": (patch(24, "Q", 2**62), "cut short"),
    "cut in the metadata": (lambda data: data[:900], "cut short"),
    "cut in the data": (lambda data: data[:-500], "cut short"),
    "an array of 2^62 numbers": (header(text(b"a") + struct.pack("<IIQ", 9, 4, 2**62)), "cut short"),
    "an array of 2^62 texts": (header(text(b"a") + struct.pack("<IIQ", 9, 8, 2**62)), "claims"),
    "an array of arrays": (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "type 9"),
    "a value of type 77": (header(text(b"a") + struct.pack("<I", 77)), "type 77"),
    "a key twice": (header(*2 * [text(b"a") + struct.pack("<II", 4, 1)]), "names 'a' twice"),
    "an alignment of 0": (header(text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "a tensor of 9 dimensions": (header(tensors=info(b"t", (1,) * 9), tensor_count=1), "9 dimensions"),
    "a tensor of 2^64 elements": (header(tensors=info(b"t", (2**40, 2**40)), tensor_count=1), "cut short"),
    "a tensor of no elements": (header(tensors=info(b"t", (0,)), tensor_count=1), "shape"),
    "a tensor of an unknown type": (header(tensors=info(b"t", (4,), 99), tensor_count=1), "type 99"),
    "a row of half a block": (header(tensors=info(b"t", (16,), 8), tensor_count=1), "rows of k * 32"),
    "an offset beyond the end": (header(tensors=info(b"t", (4,), 0, 2**50), tensor_count=1), "cut short"),
    "an unaligned offset": (header(tensors=info(b"t", (4,), 0, 3), tensor_count=1), "bytes"),
    "a tensor twice": (header(tensors=2 * info(b"t", (4,)), tensor_count=2), "twice"),
    "overlapping tensors": (header(tensors=info(b"t", (4,)) + info(b"u", (4,)), tensor_count=2), "overlaps"),
    "no metadata": (header(), "general.architecture is None"),
    "a part of a model": (
        header(text(b"split.count") + struct.pack("<IH", 2, 3)),
        "one of the 3 files of a split model",
    ),
    "another architecture": (swap(text(b"llama"), text(b"qwen2")), "'qwen2'"),
    "a tensor missing": (swap(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"), "blk.0.attn_x.weight"),
    "a layer out of order": (swap(b"blk.1.attn_q.weight", b"blk.7.attn_q.weight"), "blk.1.attn_q.weight"),
    "another head size": (
        swap(b"llama.embedding_length\x04\0\0\0\x40", b"llama.embedding_length\x04\0\0\0\x20"),
        "dimension_count",
    ),
    "another inner size": (
        swap(b"feed_forward_length\x04\0\0\0\x60", b"feed_forward_length\x04\0\0\0\x20"),
        "has shape",
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case: str, tmp_path: Path) -> None:
    change, expected = GGUF[case]
    path = tiny_gguf(tmp_path / "bad.gguf")
    path.write_bytes(change(path.read_bytes()))
    refuses(lambda: open_checkpoint(path), path.name, expected, tmp_path)


# ---- sources, tokenizers, random damage ------------------------------------------------------------------------------

SOURCES = {
    "no-such-directory": "no such file",
    "/no/such/directory": "no such file",
    "no-such-file.gguf": "no such file",
    "owner/na me": "not the name of anything",
}


@pytest.mark.parametrize("source", SOURCES)
def test_source(source: str, tmp_path: Path) -> None:
    refuses(lambda: open_checkpoint(source, local_files_only=True), source, SOURCES[source], tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    refuses(lambda: open_checkpoint(tmp_path / "a.txt"), "a.txt", "accepted", tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"version":"1.0","model":{"type":"?"}}'])
def test_tokenizer_json(content: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(content)
    refuses(lambda: open_checkpoint(folder).tokenizer, "tokenizer.json", "not a tokenizer", tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x7f", b"\x07", b"", b"\x0a\x02\x0a\x05", b"\x0b"]
)
def test_tokenizer_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    refuses(lambda: tokenizer_from_model(path, {}), path.name, "sentencepiece model", tmp_path)


@pytest.mark.parametrize("reader", [SafetensorsFile, GGUFFile])
def test_random_damage(reader: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Three random bytes of the header changed, or a random cut: the file opens, or it is a ValueError."""
    if reader is GGUFFile:
        good = tiny_gguf(tmp_path / "good").read_bytes()
    else:
        good = (save_tiny(tmp_path / "model") / "model.safetensors").read_bytes()
    path = tmp_path / "bad"
    for trial in range(300):
        data = bytearray(good)
        for place in rng.integers(0, 2200, 3):
            data[place] = rng.integers(0, 256) if trial % 2 else data[place] ^ (1 << rng.integers(0, 8))
        path.write_bytes(data if trial % 5 else data[: rng.integers(0, len(data))])
        try:
            file = reader(path)
            for name in list(file.tensors)[:3]:
                (file.decode if reader is GGUFFile else file.array)(name)
        except ValueError as error:
            assert str(path) in str(error)
