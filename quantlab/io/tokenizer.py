"""The tokenizer of a Hugging Face directory: tokenizer.json, or a SentencePiece tokenizer.model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.io.files import MAX_JSON, read_json, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantlab.io.checkpoint import Checkpoint

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def directory_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a directory, without padding or truncation; None where there is none."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return tokenizer_from_json(path.read_bytes(), str(path))
    if (folder / "tokenizer.model").is_file():
        from quantlab.io.sentencepiece import tokenizer_from_model

        return tokenizer_from_model(folder / "tokenizer.model", _config(folder))
    return None


def tokenizer_from_json(content: bytes, where: str) -> Tokenizer:
    """A tokenizer from the content of a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{where}: not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def directory_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of the files of a directory that belong to its tokenizer."""
    found = {}
    for name in FILES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_JSON:
                raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {MAX_JSON} are accepted")
            found[name] = path.read_bytes()
    return found


def files_to_save(checkpoint: Checkpoint | None, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """{name: content} of what is written beside a model for its tokenizer: the files of the checkpoint that it is from,
    or what was read of them where there are none, or their directory is gone."""
    files = dict(checkpoint.tokenizer_files) if checkpoint is not None else {}
    if files or tokenizer is None:
        return files
    files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    if checkpoint is not None and checkpoint.chat_template is not None:
        files["chat_template.jinja"] = checkpoint.chat_template.encode()
    if checkpoint is not None and checkpoint.special_tokens:
        files["tokenizer_config.json"] = dump_config(checkpoint.special_tokens)
    if checkpoint is not None and checkpoint.eos_token_ids is not None:
        files["generation_config.json"] = dump_config({"eos_token_id": checkpoint.eos_token_ids})
    return files


def directory_chat_template(folder: Path) -> str | None:
    """The default chat template of a directory (chat_template.jinja, or the one inside tokenizer_config.json)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, MAX_JSON)
    template = _config(folder).get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def directory_special_tokens(folder: Path) -> dict[str, str]:
    """{"bos_token": text, …} of a directory (tokenizer_config.json, or the older special_tokens_map.json)."""
    older = folder / "special_tokens_map.json"
    tokens = {}
    for name, token in {**(read_json(older) if older.is_file() else {}), **_config(folder)}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name in ("bos_token", "eos_token", "pad_token", "unk_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def dump_config(config: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face libraries lay it out."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
