"""A `tokenizers.Tokenizer` from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantlab.io.sentencepiece import PieceType, sentencepiece_tokenizer
from quantlab.io.tokenizer import dump_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Llama 3's pattern, as in its tokenizer.json and in tiktoken's cl100k
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r")  # each digit alone, then GPT-2's pattern
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
GPT2 = ("gpt-2", "gpt2", "default")


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer, None where the file has none; ValueError where its kind is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{where}: tokenizer.ggml.tokens is missing or no list of strings")
    types = _numbers(metadata, "token_type", len(tokens), where)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens, where)
    elif kind == "llama":
        scores = _numbers(metadata, "scores", len(tokens), where)
        if scores is None or types is None:
            raise ValueError(f"{where}: tokenizer.ggml.scores and token_type are needed for a 'llama' tokenizer")
        pieces = list(zip(tokens, scores, types, strict=True))
        tokenizer = sentencepiece_tokenizer(pieces, add_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True))
    else:
        raise ValueError(f"{where}: tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2', 'llama'")
    _add_special_tokens(tokenizer, tokens, types or [])
    _add_bos(tokenizer, metadata, tokens, kind)
    return tokenizer


def _numbers(metadata: dict[str, Any], name: str, count: int, where: str) -> list[Any] | None:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    if len(values) != count:
        raise ValueError(f"{where}: tokenizer.ggml.{name} has {len(values)} values for {count} tokens")
    return list(values) if isinstance(values, list) else values.tolist()


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in LLAMA3)
    splitter: Any = byte_level
    if pre in DIGIT_SPLITTERS:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in LLAMA3:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), byte_level])
    elif pre not in GPT2:
        known = ", ".join((*GPT2, *DIGIT_SPLITTERS, *LLAMA3))
        raise ValueError(f"{where}: tokenizer.ggml.pre {pre!r} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bad = next((m for m in merges if len(m) != 2 or not {m[0], m[1], m[0] + m[1]} <= vocabulary.keys()), None)
    if bad is not None or not merges:
        raise ValueError(
            f"{where}: tokenizer.ggml.merges has {' '.join(bad) if bad else 'no merges'!r}, expected pairs of tokens"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre in LLAMA3))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for kind, special in ((PieceType.CONTROL, True), (PieceType.UNKNOWN, True), (PieceType.USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, t in zip(tokens, types, strict=False)
            if t == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], kind: str) -> None:
    """Puts the beginning-of-text token first (and the end token last) where the file or the kind's default asks so."""
    from tokenizers import processors

    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3
    template, special = ["$A"], []
    for name, wanted, place in (("bos", default, 0), ("eos", False, len(template) + 1)):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{name}_token", wanted) and token_id is not None and token_id < len(tokens):
            template.insert(place, tokens[token_id])
            special.append((tokens[token_id], token_id))
    if special:
        pair = template + [f"{part}:1" for part in template]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), pair=" ".join(pair).replace("$A:1", "$B:1"), special_tokens=special
        )


def end_tokens(metadata: dict[str, Any]) -> list[int] | None:
    """The end of a text and that of a turn, both of which end what llama.cpp generates; None where they are one."""
    eos, eot = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return [eos, eot] if isinstance(eos, int) and isinstance(eot, int) and eos != eot else None


def tokenizer_files(metadata: dict[str, Any], tokenizer: Tokenizer | None, where: str) -> dict[str, bytes]:
    """The files that a Hugging Face directory would hold for this tokenizer."""
    if tokenizer is None:
        return {}
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length", 2048),
    }  # fmt: skip
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": dump_config(config)}
    ends = end_tokens(metadata)
    return files if ends is None else {**files, "generation_config.json": dump_config({"eos_token_id": ends})}
