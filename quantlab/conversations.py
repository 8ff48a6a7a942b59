"""Conversations and chat templates: what was said by whom, the text and the tokens that a model sees of it.

A template is Jinja, with the names that transformers gives it (https://huggingface.co/docs/transformers/chat_templating);
it runs in a sandbox, since it comes with a model from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quantlab.io.datasets import read_lines
from quantlab.llama_config import token_ids
from quantlab.token_rows import text_ids

if TYPE_CHECKING:
    from quantlab.llama import Llama

Message = dict[str, str]  # role: system, user or assistant; content
Span = tuple[int, int]  # characters of a text, [begin, end)

ROLES = ("system", "user", "assistant")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ end_of_turn }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_END = "<|im_end|>"


# ---- what was said -------------------------------------------------------------------------------------------------


def conversation_of(item: Any, where: str) -> list[Message]:
    """The messages of a conversation: {"role", "content"} in a list, strings of a user and an assistant by turns (as
    LIMA has them), or an object that holds either under "messages" or "conversations". ValueError, beginning with
    `where`, for one that is empty, one-sided or has an empty turn."""
    if isinstance(item, Mapping):
        found = [name for name in ("messages", "conversations") if name in item]
        if len(found) != 1:
            fields = ", ".join(map(str, item))
            raise ValueError(f"{where}: has the fields {fields}, expected messages or conversations, or text: a string")
        item = item[found[0]]
    if isinstance(item, str) or not isinstance(item, Sequence):
        raise ValueError(f"{where}: got {type(item).__name__}, expected a list of turns")
    messages = [_message(turn, i, where) for i, turn in enumerate(item)]
    missing = [role for role in ("user", "assistant") if role not in {message["role"] for message in messages}]
    if missing:
        problem = f"has no turn of the {missing[0]}" if messages else "is empty"
        raise ValueError(f"{where}: the conversation {problem}, expected turns of a user and of an assistant")
    return messages


def _message(turn: Any, index: int, where: str) -> Message:
    message = {"role": ROLES[1 + index % 2], "content": turn} if isinstance(turn, str) else turn
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise ValueError(f"{where}: turn {index + 1} is {str(turn)[:60]!r}, expected a role of {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}: turn {index + 1}, of the {message['role']}, is empty, expected text")
    return {"role": message["role"], "content": content}


def read_json_lines(path: str | Path) -> list[Any]:
    """The values of a JSON-lines file, blank lines passed over; ValueError naming the line that is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: {path}: no such file")
    values = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            if line.strip():
                values.append(json.loads(line))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: line {number} is not JSON: {line[:40]!r}") from None
    if not values:
        raise ValueError(f"{path}: holds no lines")
    return values


# ---- templates -----------------------------------------------------------------------------------------------------


class ChatTemplate:
    """Messages to text. `name` says where the template is from: "model", "chatml" (the fallback) or "given"."""

    def __init__(self, source: str, name: str, **tokens: str):
        self.name, self._tokens = name, tokens
        self._template = _compile(source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with the beginning of the assistant's next turn."""
        from jinja2 import TemplateError

        given = {"messages": list(messages), "tools": None, "documents": None}  # transformers' names
        try:
            return self._template.render(**given, add_generation_prompt=add_generation_prompt, **self._tokens)
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"chat_template: it does not take this conversation: {error}") from None

    def render_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and what of it the assistant says: each of its turns to the end of turn, which it says too."""
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = self.render(messages[: i + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError(
                    "assistant_only_loss: this chat template changes earlier turns by what follows, so what the "
                    "assistant says cannot be told apart; learn from all turns, or use chat_template='chatml'"
                )
            spans.append((len(before), len(after.rstrip())))
        return text, spans

    def end_of_turn(self) -> str:
        """What follows an assistant's words, without white space."""
        said = "\N{MEDIUM WHITE CIRCLE}"  # a sign that templates do not use
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        return self.render(messages).rpartition(said)[2].strip()


def _compile(source: str) -> Any:
    """A Jinja template with what transformers adds: raise_exception, strftime_now, tojson without HTML's escapes,
    break and continue, and the mark {% generation %} around what the assistant says, which is passed through."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"chat_template: not a Jinja template: {error}") from None


def chat_template(model: Llama, choice: str = "auto") -> ChatTemplate:
    """The template of a model. choice: "auto" (its own, else ChatML), "chatml", or a Jinja template."""
    tokenizer = model.require_tokenizer()
    own = model.checkpoint.chat_template if model.checkpoint is not None else None
    tokens = {f"{kind}_token": special_token(model, kind) for kind in ("bos", "eos", "pad", "unk")}
    if choice not in ("auto", "chatml"):
        if "{" not in choice:
            raise ValueError(f"chat_template: got {choice!r}, expected 'auto', 'chatml', 'joined' or a Jinja template")
        return ChatTemplate(choice, "given", **tokens)
    if choice == "auto" and own is not None:
        return ChatTemplate(own, "model", **tokens)
    end = IM_END if tokenizer.token_to_id(IM_END) is not None else tokens["eos_token"]
    return ChatTemplate(CHATML, "chatml", end_of_turn=end, **tokens)


def special_token(model: Llama, kind: Literal["bos", "eos", "pad", "unk"]) -> str:
    """The text of a special token: as the tokenizer's files name it, else the config by its id (the first of several);
    "" where there is none."""
    tokenizer = model.require_tokenizer()
    named = model.checkpoint.special_tokens.get(f"{kind}_token") if model.checkpoint is not None else None
    if named is not None and tokenizer.token_to_id(named) is not None:
        return named
    ids = token_ids(model.config, f"{kind}_token_id")
    return (tokenizer.id_to_token(ids[0]) or "") if ids else ""


# ---- tokens --------------------------------------------------------------------------------------------------------


def chat_ids(model: Llama, messages: Sequence[Message], add_generation_prompt: bool = True) -> np.ndarray:
    """Token ids of a conversation in the model's template, int32 (t,)."""
    wanted = 'expected a list of {"role": "user", "content": text}'
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or len(messages) == 0:
        got = "text" if isinstance(messages, str) else f"{messages!r:.60}"
        raise ValueError(f"messages: got {got}, {wanted}")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise ValueError(f"messages: number {number} is {message!r:.60}, {wanted}")
    text = chat_template(model).render(messages, add_generation_prompt)
    return text_ids(model.require_tokenizer(), text, add_special_tokens=False, name="messages")


def stop_ids(model: Llama, template: ChatTemplate) -> list[int]:
    """Tokens that end an assistant's turn: those that end a text, and the template's end of turn if it is one token."""
    found = model.require_tokenizer().token_to_id(template.end_of_turn())
    return sorted({*model.eos_token_ids, *([] if found is None else [found])})


def joined(messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """All turns joined by one space, and where the assistant's are (with the space before)."""
    text, spans = "", []
    for message in messages:
        begin = len(text)
        text += (" " if text else "") + message["content"]
        if message["role"] == "assistant":
            spans.append((begin, len(text)))
    return text, spans


def learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens begin inside one of the spans, bool (t,); one without characters does not."""
    return np.array([any(a <= begin < b for a, b in spans) and end > begin for begin, end in offsets], bool)
