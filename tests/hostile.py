"""Checkpoints that are broken on purpose: each maker takes the path of a good one and breaks it in one way.

`SAFETENSORS`, `CONFIGS` and `TOKENIZERS` break a directory, `GGUFS` writes a file; the values are (maker, what the
error must say).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Breaker = Callable[[Path], None]
EMBEDDING = "model.embed_tokens.weight"


# ---- safetensors -------------------------------------------------------------------------------------------------


def read_parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_parts(file: Path, header: Any, data: bytes, size: int | None = None) -> None:
    """Writes a safetensors file; `header` is text as it is or an object; `size`: the length that the file claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def header_edit(edit: Callable[[dict[str, Any]], Any]) -> Breaker:
    """Breaks the header: `edit` changes it in place, or returns what stands in its place."""

    def break_it(folder: Path) -> None:
        header, data = read_parts(folder / "model.safetensors")
        changed = edit(header)
        write_parts(folder / "model.safetensors", header if changed is None else changed, data)

    return break_it


def entry_edit(**fields: Any) -> Breaker:
    """Breaks the entry of the embedding."""
    return header_edit(lambda header: header[EMBEDDING].update(fields))


def tensor_edit(edit: Callable[[dict[str, np.ndarray]], object]) -> Breaker:
    """Writes a valid file that holds other tensors."""

    def break_it(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return break_it


def bytes_edit(edit: Callable[[bytes], bytes]) -> Breaker:
    def break_it(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return break_it


def huge_header(folder: Path) -> None:
    """A sparse file of 1 GB whose header claims to fill it."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", (1 << 30) - 8))
        file.truncate(1 << 30)


def twice(folder: Path) -> None:
    header, data = read_parts(folder / "model.safetensors")
    text = json.dumps(header)
    entry = json.dumps({EMBEDDING: header[EMBEDDING]})[1:-1]
    write_parts(folder / "model.safetensors", (text[:-1] + "," + entry + "}").encode(), data)


def write_index(weight_map: Any) -> Breaker:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SAFETENSORS: dict[str, tuple[Breaker, str]] = {
    "empty file": (bytes_edit(lambda raw: b""), "0 bytes"),
    "seven bytes": (bytes_edit(lambda raw: raw[:7]), "7 bytes"),
    "header length of 2^63": (bytes_edit(lambda raw: struct.pack("<Q", 1 << 63) + raw[8:]), "header claims"),
    "header longer than the file": (bytes_edit(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]), "header claims"),
    "header of 1 GB": (huge_header, "header claims"),
    "header that is no JSON": (bytes_edit(lambda raw: raw[:8] + b"?" + raw[9:]), "not JSON"),
    "header that is no UTF-8": (bytes_edit(lambda raw: raw[:10] + b"\xff\xfe" + raw[12:]), "not JSON"),
    "header nested 50,000 deep": (header_edit(lambda header: b"[" * 50000 + b"]" * 50000), "header"),
    "header that is a list": (header_edit(lambda header: [1, 2]), "list"),
    "cut short": (bytes_edit(lambda raw: raw[:-100]), "cut short"),
    "bytes behind the last tensor": (bytes_edit(lambda raw: raw + b"x" * 64), "64 bytes follow"),
    "offsets beyond the file": (entry_edit(data_offsets=[0, 1 << 50]), EMBEDDING),
    "offsets backwards": (entry_edit(data_offsets=[64, 0]), EMBEDDING),
    "offsets below zero": (entry_edit(data_offsets=[-64, 0]), EMBEDDING),
    "overlapping tensors": (header_edit(lambda h: h["lm_head.weight"].update(h[EMBEDDING])), "lm_head"),
    "a tensor named twice": (twice, "twice"),
    "a size below zero": (entry_edit(shape=[-1, 64]), EMBEDDING),
    "sizes whose product overflows": (entry_edit(shape=[1 << 40, 1 << 40]), EMBEDDING),
    "a shape that is not the bytes'": (entry_edit(shape=[3, 3]), EMBEDDING),
    "an unknown dtype": (entry_edit(dtype="F3"), "F3"),
    "a tensor without offsets": (
        header_edit(lambda header: header[EMBEDDING].pop("data_offsets") * 0 or None),
        EMBEDDING,
    ),
    "a matrix of another shape": (tensor_edit(lambda t: t.update({EMBEDDING: t[EMBEDDING].T.copy()})), EMBEDDING),
    "a matrix of integers": (tensor_edit(lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(np.int32)})), "I32"),
    "a matrix of one dimension": (tensor_edit(lambda t: t.update({EMBEDDING: t[EMBEDDING].ravel()})), EMBEDDING),
    "a missing tensor": (
        tensor_edit(lambda t: t.pop(EMBEDDING) and None if False else t.pop(EMBEDDING)),
        "embed_tokens",
    ),
    "a tensor nobody asked for": (tensor_edit(lambda t: t.update(extra=np.zeros(3, np.float32))), "extra"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "pickled weights": (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "pickled"),
    "a missing shard": (write_index({EMBEDDING: "model-00002.safetensors"}), "model-00002.safetensors"),
    "a shard outside of the directory": (write_index({EMBEDDING: "../model.safetensors"}), "../model.safetensors"),
    "an index that is a list": (write_index([]), "weight_map"),
}


# ---- config.json, tokenizer.json -----------------------------------------------------------------------------------


def config_edit(**fields: Any) -> Breaker:
    def break_it(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return break_it


def write(name: str, data: bytes) -> Breaker:
    return lambda folder: (folder / name).write_bytes(data) and None


CONFIGS: dict[str, tuple[Breaker, str]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "empty config.json": (write("config.json", b""), "JSON"),
    "config.json that is a list": (write("config.json", b"[]"), "list"),
    "binary config.json": (write("config.json", b"\xff\x00\xfe"), "JSON"),
    "another architecture": (config_edit(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "GPT2LMHeadModel"),
    "no hidden_size": (config_edit(hidden_size=None), "hidden_size"),
    "hidden_size as text": (config_edit(hidden_size="64"), "hidden_size"),
    "hidden_size below zero": (config_edit(hidden_size=-64), "hidden_size"),
    "hidden_size of another model": (config_edit(hidden_size=128), "shape"),
    "a layer too many": (config_edit(num_hidden_layers=3), "layers.2"),
    "layers without end": (config_edit(num_hidden_layers=1 << 40), "num_hidden_layers"),
    "a vocabulary of 2^40": (config_edit(vocab_size=1 << 40), "vocab_size"),
    "heads that do not divide": (config_edit(num_attention_heads=7), "num_attention_heads"),
    "key-value heads that do not divide": (config_edit(num_key_value_heads=3), "num_key_value_heads"),
    "heads of 2^60": (config_edit(num_attention_heads=1 << 60, head_dim=64), "num_attention_heads"),
    "an odd head size": (config_edit(head_dim=15), "head_dim"),
    "an epsilon that is text": (config_edit(rms_norm_eps="tiny"), "rms_norm_eps"),
    "unknown rope": (config_edit(rope_scaling={"rope_type": "spiral"}), "spiral"),
    "biases": (config_edit(attention_bias=True), "attention_bias"),
    "unknown quantization": (config_edit(quantization_config={"quant_method": "magic"}), "magic"),
    "GPTQ without its tensors": (config_edit(quantization_config={"quant_method": "gptq", "bits": 5}), "bits"),
}

TOKENIZERS: dict[str, tuple[Breaker, str]] = {
    "empty tokenizer.json": (write("tokenizer.json", b""), "tokenizer"),
    "tokenizer.json of another kind": (write("tokenizer.json", b'{"model": 3}'), "tokenizer"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
}


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(tensors: int = 0, pairs: int = 0, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> Breaker:
    """A file of this start and this body, filled up to 4 KiB."""
    raw = magic + struct.pack("<IQQ", version, tensors, pairs) + body
    return lambda path: path.write_bytes(raw.ljust(4096, b"\0")) and None


ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def tensor_info(
    name: str = "token_embd.weight", sizes: tuple[int, ...] = (64, 64), kind: int = 0, offset: int = 0
) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def one_tensor(**fields: Any) -> Breaker:
    return gguf(1, 1, ARCHITECTURE + tensor_info(**fields))


GGUFS: dict[str, tuple[Breaker, str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "0 bytes"),
    "another magic": (gguf(magic=b"GGML"), "GGML"),
    "version 99": (gguf(version=99), "99"),
    "2^60 tensors": (gguf(tensors=1 << 60), "claims"),
    "2^60 metadata values": (gguf(pairs=1 << 60), "claims"),
    "a key of 2^60 bytes": (gguf(pairs=1, body=struct.pack("<Q", 1 << 60)), "cut short"),
    "a value of 2^60 bytes": (gguf(pairs=1, body=text("a") + struct.pack("<IQ", 8, 1 << 60)), "cut short"),
    "an array of 2^60 numbers": (gguf(pairs=1, body=text("a") + struct.pack("<IIQ", 9, 4, 1 << 60)), "cut short"),
    "an array of 2^60 strings": (gguf(pairs=1, body=text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)), "claims"),
    "a value of type 77": (gguf(pairs=1, body=pair("a", 77, b"")), "77"),
    "another architecture": (gguf(pairs=1, body=pair("general.architecture", 8, text("gpt2"))), "gpt2"),
    "no metadata": (gguf(), ""),
    "a tensor of unknown type": (one_tensor(kind=1000), "1000"),
    "a tensor beyond the file": (one_tensor(offset=1 << 40), "token_embd"),
    "a tensor whose size overflows": (one_tensor(sizes=(1 << 40, 1 << 40)), "token_embd"),
    "a tensor of 2^31 dimensions": (
        gguf(1, 1, ARCHITECTURE + text("token_embd.weight") + struct.pack("<I", 1 << 31)),
        "dimensions",
    ),
    "a tensor at an odd offset": (one_tensor(offset=7), "token_embd"),
}


def full_disk(bytes_left: int) -> Callable[[], None]:
    """For subprocess's preexec_fn: no file of the child grows beyond this: a full disk (EFBIG for ENOSPC)."""

    def limit() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))

    return limit


def snapshot(folder: Path) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {
        os.path.relpath(os.path.join(where, name), folder): os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
    }
