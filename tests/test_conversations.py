"""Conversations and chat templates: what is read, what text and tokens come of it, what is learned of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import byte_tokenizer, save_tiny
from models import tiny_model

import quantlab as ql
from quantlab.conversations import ChatTemplate, chat_template, conversation_of, stop_ids
from quantlab.examples import prepare_examples
from quantlab.training import TrainingConfig

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TALK = ["Is it?", "It is.", "Why?", "Because."]
MESSAGES = [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(TALK)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("talk") / "tiny"))


def text_of(model, ids) -> str:
    return model.decode(ids, skip_special_tokens=False)


def learned(examples, row: int = 0) -> list[int]:
    return [token for token in examples.targets[row] if token != -100]


@pytest.mark.parametrize("item", [TALK, MESSAGES, {"conversations": TALK, "source": "it"}, {"messages": MESSAGES}])
def test_kinds_of_conversations(item):
    assert conversation_of(item, "row 1") == MESSAGES


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ([], "the conversation is empty"),
        (["alone"], "no turn of the assistant"),
        ([MESSAGES[1]], "no turn of the user"),
        (["Is it?", " \n"], "turn 2, of the assistant, is empty"),
        (["Is it?", 7], "turn 2 is '7'"),
        ([{"role": "tool", "content": "x"}], "turn 1 is"),
        ([{"role": "user"}], "turn 1, of the user, is empty"),
        ("a text", "got str"),
        ({"prompt": "x"}, "has the fields prompt"),
    ],
)
def test_what_is_no_conversation_is_named(item, says):
    with pytest.raises(ValueError, match=says) as caught:
        conversation_of(item, "row 1")
    assert str(caught.value).startswith("row 1")


def test_json_lines_name_the_row(model, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"conversations": turns}) for turns in (TALK, TALK[:1])))
    with pytest.raises(ValueError, match=r"talk\.jsonl, row 2: the conversation has no turn of the assistant"):
        prepare_examples(model, path, TrainingConfig())
    path.write_text('{"conversations": \n')
    with pytest.raises(ValueError, match=r"talk\.jsonl: line 1 is not JSON"):
        prepare_examples(model, path, TrainingConfig())
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no lines"):
        prepare_examples(model, path, TrainingConfig())
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare_examples(model, tmp_path / "none.jsonl", TrainingConfig())


# ---- templates ----


def test_the_fallback_is_chatml_with_the_end_token_that_is_there(model):
    template = chat_template(model)
    assert template.name == "chatml" and template.end_of_turn() == "</s>"
    assert stop_ids(model, template) == [2]
    assert template.render(MESSAGES[:2]) == "<|im_start|>user\nIs it?</s>\n<|im_start|>assistant\nIt is.</s>\n"
    assert text_of(model, model.apply_chat_template(MESSAGES[:1])).endswith("Is it?</s>\n<|im_start|>assistant\n")


def test_the_models_own_template_is_used(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA3}))
    model = ql.LlamaForCausalLM.from_pretrained(path)
    template = chat_template(model)
    assert template.name == "model"
    assert template.render(MESSAGES[:1], add_generation_prompt=True) == "<s><|user|>Is it?</s><|assistant|>"
    assert chat_template(model, "chatml").name == "chatml"
    assert chat_template(model, "{{ messages[0].content }}").name == "given"
    ids = model.apply_chat_template(MESSAGES[:1])
    assert ids[0] == 1 and text_of(model, ids) == "<s><|user|>Is it?</s><|assistant|>"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_are_those_of_the_tokenizers_files(tmp_path, file):
    """As in transformers: the config's ids, of which the first may not end a turn, count where these name none."""
    path = save_tiny(tmp_path / "tiny", eos_token_id=[0, 2], bos_token_id=None)
    (path / file).write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "no such"}))
    (path / "chat_template.jinja").write_text("{{ [bos_token, eos_token, pad_token, unk_token] }}")
    model = ql.LlamaForCausalLM.from_pretrained(path)
    shutil.rmtree(path)
    model.save_pretrained(tmp_path / "again")
    for one in (model, ql.LlamaForCausalLM.from_pretrained(tmp_path / "again")):
        assert chat_template(one).render(MESSAGES) == "['<s>', '</s>', '', '']"
        assert stop_ids(one, chat_template(one, "chatml")) == [0, 2]
        examples = prepare_examples(one, ["ab"], TrainingConfig())
        assert text_of(one, examples.ids[0]) == "ab</s>"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_template_is_there_though_its_folder_is_gone(tmp_path, file):
    path = save_tiny(tmp_path / "tiny")
    (path / file).write_text(json.dumps({"chat_template": LLAMA3}) if file.endswith("json") else LLAMA3)
    model = ql.LlamaForCausalLM.from_pretrained(path)
    shutil.rmtree(path)
    model.save_pretrained(tmp_path / "again")
    for one in (model, ql.LlamaForCausalLM.from_pretrained(tmp_path / "again")):
        assert text_of(one, one.apply_chat_template(MESSAGES[:1])) == "<s><|user|>Is it?</s><|assistant|>"


def test_a_template_that_is_no_text_is_named(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    (path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8 \(byte 3\)"):
        ql.LlamaForCausalLM.from_pretrained(path)


def test_what_transformers_gives_to_templates():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{% if tools is none and documents is none %}"
        "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}{% endif %}"
    )
    text = ChatTemplate(source, "given").render([{"role": "user", "content": "<é>"}, MESSAGES[1]])
    assert text == '{"role": "user", "content": "<é>"}4{"a":"\\u00e9","b":1}'


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),  # a sandbox
        ("{{ messages[9].content.x }}", "does not take this conversation"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_templates_that_fail_are_clear(source, says):
    with pytest.raises(ValueError, match=f"^chat_template: .*{says}"):
        ChatTemplate(source, "given").render(MESSAGES)


def test_what_is_no_template_is_clear(model):
    with pytest.raises(ValueError, match=r"^chat_template: not a Jinja template"):
        ChatTemplate("{% for %}", "given")
    with pytest.raises(ValueError, match=r"^chat_template: got 'vicuna'"):
        chat_template(model, "vicuna")
    with pytest.raises(ValueError, match=r"^tokenizer: this checkpoint has none"):
        chat_template(tiny_model())


# ---- what is learned ----


def test_all_is_learned_or_what_the_assistant_says(model):
    whole = prepare_examples(model, [TALK], TrainingConfig())
    template = chat_template(model)
    assert text_of(model, whole.ids[0]) == template.render(MESSAGES)
    np.testing.assert_array_equal(whole.targets[0][:-1], whole.ids[0][1:])
    assert whole.targets[0][-1] == -100 and whole.template == "chatml"
    said = prepare_examples(model, [TALK], TrainingConfig(assistant_only_loss=True))
    assert text_of(model, learned(said)) == "It is.</s>Because.</s>"
    np.testing.assert_array_equal(said.ids[0], whole.ids[0])


def test_the_end_token_is_added_where_a_template_has_none(model):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    config = TrainingConfig(assistant_only_loss=True, chat_template=template)
    examples = prepare_examples(model, [TALK], config)
    assert examples.ids[0][-1] == 2
    assert text_of(model, learned(examples)) == "It is.Because.</s>"


def test_joined_turns_are_the_studys(model):
    examples = prepare_examples(model, [TALK], TrainingConfig(chat_template="joined"))
    assert text_of(model, examples.ids[0]) == "Is it? It is. Why? Because."
    said = prepare_examples(model, [TALK], TrainingConfig(chat_template="joined", assistant_only_loss=True))
    assert text_of(model, learned(said)) == " It is. Because." and said.template == "joined"


def test_a_template_that_rewrites_earlier_turns_cannot_tell_who_speaks(model):
    config = TrainingConfig(assistant_only_loss=True, chat_template="{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(ValueError, match=r"^assistant_only_loss: this chat template changes earlier turns"):
        prepare_examples(model, [TALK], config)


def test_texts_end_with_the_end_token(model):
    examples = prepare_examples(model, ["ab", {"text": "c"}], TrainingConfig())
    assert [text_of(model, ids) for ids in examples.ids] == ["ab</s>", "c</s>"] and examples.template is None
    assert text_of(model, learned(examples, 1)) == "</s>"


def test_rows_of_ids_are_as_they_are(model):
    examples = prepare_examples(model, [[5, 6, 7], np.array([8, 9])], TrainingConfig())
    assert [ids.tolist() for ids in examples.ids] == [[5, 6, 7], [8, 9]]
    assert [targets.tolist() for targets in examples.targets] == [[6, 7, -100], [9, -100]]
    assert examples.report()["target_tokens"] == 3


def test_long_rows_are_cut_and_told(model):
    with pytest.warns(UserWarning, match="of 3 rows 1 were cut to 4 tokens, 1 left out: nothing to learn was left"):
        examples = prepare_examples(model, [[5, 6, 7, 8, 9, 10], [5], [5, 6]], TrainingConfig(max_length=4))
    assert [ids.tolist() for ids in examples.ids] == [[5, 6, 7, 8], [5, 6]]
    assert (examples.cut, examples.dropped) == (1, 1)
    with pytest.warns(UserWarning, match="1 were cut to 256 tokens"):  # the model's context
        prepare_examples(model, [[5] * 300, [5, 6]], TrainingConfig())


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        ([], {}, "data: it is empty"),
        (7, {}, "data: got int"),
        ([["a", "b"], ["a"]], {}, "data, row 2: the conversation has no turn of the assistant"),
        (["ok", " "], {}, "data, row 2: the text is empty"),
        (["ok"], {"assistant_only_loss": True}, "assistant_only_loss"),
        ([[5, 6]], {"assistant_only_loss": True}, "assistant_only_loss"),
        ([[5, 600]], {}, "token id 600, expected less than 259"),
        ([[5, -1]], {}, "expected token ids from 0"),
        ([[5]], {}, "nothing to learn in its 1 rows"),
        ([3.5], {}, "got float"),
    ],
)
def test_data_that_cannot_be_learned_from(model, data, settings, says):
    with pytest.raises(ValueError, match=says):
        prepare_examples(model, data, TrainingConfig(**settings))


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"^tokenizer: this checkpoint has none"):
        prepare_examples(tiny_model(), ["text"], TrainingConfig())
    assert byte_tokenizer().token_to_id("<|im_end|>") is None  # what the fallback above rests on
