"""The model against a float64 oracle of the whole forward pass, and what a user does with it."""

import copy
import json

import numpy as np
import pytest
from checkpoints import save_tiny
from models import TINY, tiny_model, tiny_parts
from reference import attention, rmsnorm, rope, swiglu
from safetensors.numpy import load_file, save_file

import quantlab as ql
from quantlab import _core
from quantlab.classify import LlamaForSequenceClassification, pooled_position
from quantlab.llama import LlamaConfig, LlamaForCausalLM
from quantlab.rope import inverse_frequencies, rope_parameters, rope_tables
from quantlab.size import size_from_config
from quantlab.token_rows import are_ids, listed, to_sequences


def oracle_hidden(model, ids):
    """float64 (T, hidden) of one row of ids, from the ops' oracles."""
    config = model.config
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    t = len(ids)
    dense = {name: weight.dequantize().astype(np.float64) for name, weight in model.weights.items()}
    cos, sin = rope_tables(config, t)
    x = dense["model.embed_tokens"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = rmsnorm(x, model.vector(name + "input_layernorm"), config.rms_norm_eps)
        q, k, v = (h @ dense[f"{name}self_attn.{p}_proj"].T for p in "qkv")
        q, k = (rope(part.reshape(t, -1, d), cos, sin, np.arange(t)) for part in (q, k))
        bounds = (np.array([0, t]), np.array([0]), np.array([t]))
        a, _ = attention(q, k, v.reshape(t, kv, d), *bounds, 1 / np.sqrt(d))
        x = x + a.reshape(t, heads * d) @ dense[name + "self_attn.o_proj"].T
        h = rmsnorm(x, model.vector(name + "post_attention_layernorm"), config.rms_norm_eps)
        gate, up = (h @ dense[f"{name}mlp.{p}_proj"].T for p in ("gate", "up"))
        x = x + swiglu(gate, up) @ dense[name + "mlp.down_proj"].T
    return rmsnorm(x, model.vector("model.norm"), config.rms_norm_eps)


ROWS = [[5, 9, 3], [7], list(range(20, 57)), [1, 2]]


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 32}, {"num_key_value_heads": 1}], ids=str
)
def test_forward_matches_the_float64_oracle(isa, changes):
    model = tiny_model(**changes)
    hidden = model.hidden_states(ROWS)
    for row, ids in enumerate(ROWS):
        # two layers of float32 sums over <= 96 products: a few hundred eps of values of order 1
        np.testing.assert_allclose(hidden[row, : len(ids)], oracle_hidden(model, np.array(ids)), atol=2e-5, rtol=2e-5)
        assert not hidden[row, len(ids) :].any()


@pytest.mark.parametrize("lengths", [[3, 1, 37, 2], [1], [4], [1, 2], [9, 5]], ids=str)
def test_kept_rows_are_those_of_all(isa, lengths):
    """The last layer computes the kept rows only: any of them, in any order, more than there are, none."""
    model = tiny_model(head_dim=32)
    rows = [np.arange(5, 5 + length, dtype=np.int32) for length in lengths]
    everything, t = model.packed_hidden(rows), sum(lengths)
    for keep in (np.cumsum(lengths) - 1, [t - 1], range(t)[::-1], [0, 0, *range(t)], []):
        kept = np.array(keep, np.int32)
        np.testing.assert_array_equal(model.packed_hidden(rows, keep=kept), everything[kept])


def test_a_row_does_not_depend_on_its_batch(isa):
    model = tiny_model()
    together = model.hidden_states(ROWS)
    for row, ids in enumerate(ROWS):
        np.testing.assert_array_equal(together[row, : len(ids)], model.hidden_states(ids)[0])


@pytest.mark.parametrize("config", [None, ql.Int8Config(), ql.RTNConfig(8, 32), ql.RTNConfig(4, 32), ql.NF4Config(32)])
def test_a_loss_does_not_depend_on_how_many_there_are(isa, config):
    """Nor on whether the output matrix was packed for products with few rows."""
    model, ids = tiny_model(), np.arange(5, 65, dtype=np.int32) % 40
    head = model.lm_head if config is None else ql.QuantWeight.from_float(model.lm_head.dequantize(), config)

    def losses(t):
        return model._core.losses(*model.packed([ids[:t]]), head.handle, np.roll(ids, -1)[:t].copy())

    whole = losses(60)
    for _ in range(2):
        for t in (1, 3, 4, 5, 10, 16, 17, 30):
            np.testing.assert_array_equal(losses(t), whole[:t])
        _core.linear(np.ones((1, head.shape[1]), np.float32), head.handle)


def test_padding_and_lengths():
    model = tiny_model()
    padded = np.zeros((2, 6), np.int64)
    padded[0, :3], padded[1, :6] = [5, 9, 3], [1, 2, 3, 4, 5, 6]
    logits = model(padded, lengths=[3, 6])
    assert logits.shape == (2, 6, 128) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits[0, :3], model([5, 9, 3])[0])
    np.testing.assert_array_equal(model(padded, lengths=[3, 6], logits_to_keep=1)[:, 0], [logits[0, 2], logits[1, 5]])


def test_generation_equals_recomputation():
    model = tiny_model()
    out = model.generate(ROWS, max_new_tokens=12, eos_token_id=[])
    for row, ids in zip(out, ROWS, strict=True):
        assert row.dtype == np.int32 and len(row) == len(ids) + 12
        for end in range(len(ids), len(row)):
            assert row[end] == model(row[:end])[0, -1].argmax()


def test_generation_stops_and_streams():
    model = tiny_model()
    greedy = model.generate([5, 9, 3], max_new_tokens=8, eos_token_id=[])[0]
    seen = []
    stopped = model.generate(
        [5, 9, 3], 8, eos_token_id=int(greedy[5]), on_token=lambda row, token: seen.append((row, token))
    )[0]
    first = list(greedy[3:]).index(greedy[5]) + 1
    np.testing.assert_array_equal(stopped, greedy[: 3 + first])
    assert seen == [(0, token) for token in stopped[3:]]


def test_sampling_is_seeded_and_independent_of_the_batch():
    model = tiny_model()
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5, "seed": 3, "eos_token_id": []}
    both = model.generate([[5, 9, 3], [7, 7]], **options)
    np.testing.assert_array_equal(both[0], model.generate([5, 9, 3], **options)[0])
    assert not np.array_equal(both[0], model.generate([5, 9, 3], **{**options, "seed": 4})[0])
    np.testing.assert_array_equal(both[0], model.generate([5, 9, 3], **{**options, "seed": np.int64(3)})[0])


def test_perplexity_beyond_the_trained_context_warns():
    model = tiny_model(max_position_embeddings=16)
    model.perplexity(list(range(3, 40)), context=16)
    with pytest.warns(UserWarning, match="context: chunks of 17 tokens, the model was trained on no more than 16"):
        model.perplexity(list(range(3, 40)), context=17)


def test_generation_beyond_the_trained_context_warns():
    model = tiny_model(max_position_embeddings=16)
    model.generate([list(range(3, 10))], max_new_tokens=9)
    with pytest.warns(
        UserWarning, match="max_new_tokens: up to 17 tokens a row, the model was trained on no more than 16"
    ):
        model.generate([[5], list(range(3, 10))], max_new_tokens=10)


def test_perplexity_is_the_mean_of_the_oracle():
    model = tiny_model()
    ids = np.random.default_rng(1).integers(0, 128, 70)
    result = model.perplexity(ids, context=32)
    losses = []
    for chunk in (ids[:32], ids[32:64]):
        logits = oracle_hidden(model, chunk) @ model.lm_head.dequantize().astype(np.float64).T
        norm = np.log(np.exp(logits).sum(1))
        losses.append(norm[:-1] - logits[np.arange(31), chunk[1:]])
    assert result["tokens"] == 62 and result["chunks"] == 2
    assert result["nll"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert result["ppl"] == pytest.approx(np.exp(result["nll"]))


@pytest.mark.parametrize(
    "settings, factor",
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 0.25),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, 0.25),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 4},
            },
            0.25,
        ),
        (
            {
                "rope_parameters": {"rope_theta": 1e4},
                "rope_theta": 5.0,
                "rope_scaling": {"type": "linear", "factor": 4},
            },
            0.25,
        ),
        ({}, 1.0),
    ],
)
def test_rope_spellings(settings, factor):
    plain = inverse_frequencies(LlamaConfig(TINY), 10)
    np.testing.assert_allclose(inverse_frequencies(LlamaConfig({**TINY, **settings}), 10), plain * factor, rtol=1e-6)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "max_position_embeddings": 512},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 64},
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 9}, "original_max_position_embeddings": 64},
    ],
)
def test_the_context_of_llama3_is_where_transformers_finds_it(settings):
    assert rope_parameters({**TINY, **settings})["original_max_position_embeddings"] == 64
    inverse_frequencies(LlamaConfig({**TINY, **settings}), 10)


def test_rope_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="rope_type: got 'longrope'"):
        rope_parameters({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}})


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONG = [0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05]  # slowed 8 times


@pytest.mark.parametrize(
    ("settings", "short", "scale"),
    [
        ({}, [1.0, 0.2239947, 0.04166666], 1.2079441541679836),
        (
            {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
            [1.0, 0.120534, 0.0125], 0.9649674935890178,
        ),
        ({"attention_factor": 1.3}, [1.0, 0.2239947, 0.04166666], 1.3),
    ],
)  # fmt: skip
def test_yarn_is_that_of_transformers(settings, short, scale):
    """Frequencies and attention_scaling of LlamaRotaryEmbedding, transformers 5.23.0."""
    config = LlamaConfig({**TINY, "head_dim": 16, "rope_parameters": {**YARN, **settings}})
    frequencies = inverse_frequencies(config, 10)
    np.testing.assert_allclose(frequencies, short + LONG, rtol=2e-6)
    cos, sin = rope_tables(config, 10)
    angles = np.arange(10)[:, None] * frequencies.astype(np.float64)
    np.testing.assert_allclose(cos, scale * np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin, scale * np.sin(angles), atol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"type": "dynamic", "factor": "2"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": -1}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "64"}},
        {"rope_theta": -5.0},
        {"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}},
    ],
)
def test_rope_refuses_settings_that_lack_a_number(settings):
    with pytest.raises(ValueError, match=r"^\w+: got .*, expected a positive number for the rope type"):
        LlamaConfig({**TINY, **settings})


def test_arrays_of_other_libraries_are_taken():
    class Foreign:
        """An array that is known by DLPack alone, as torch's are."""

        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __dlpack__(self, **options):
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __len__(self):
            return len(self.array)

        def __getitem__(self, index):
            return Foreign(self.array[index])

    model, ids = tiny_model(), np.array([[3, 4, 5, 6], [7, 8, 0, 0]])
    np.testing.assert_array_equal(model(Foreign(ids[0])), model(ids[0]))
    np.testing.assert_array_equal(model(Foreign(ids), lengths=[3, 2]), model(ids, lengths=[3, 2]))
    for row in (ids[0], Foreign(ids[0])):
        assert len(model.generate(row, max_new_tokens=2, eos_token_id=np.int64(-1))[0]) == 6


def test_labels_keep_their_names():
    names = {"0": "negative", "1": "neutral", "2": "positive"}
    parts = tiny_parts(id2label=names)
    assert LlamaForSequenceClassification(*parts).config.id2label == names
    assert LlamaForSequenceClassification(*parts, num_labels=3).config.label2id["positive"] == 2
    assert LlamaForSequenceClassification(*parts, num_labels=2).config.id2label == {"0": "LABEL_0", "1": "LABEL_1"}
    with pytest.raises(ValueError, match="num_labels: got 0"):
        LlamaForSequenceClassification(*parts, num_labels=0)


def test_pooling_as_transformers():
    assert pooled_position(np.array([3, 4, 0, 0]), 0) == 1
    assert pooled_position(np.array([0, 4, 0, 5]), 0) == 3
    assert pooled_position(np.array([0, 0]), 0) == 0
    assert pooled_position(np.array([3, 4, 0]), None) == 2


def test_head_training_learns_and_saves_the_best():
    clf = LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    texts = [[10 + label, *rng.integers(20, 128, 3), 10 + label] for label in labels]
    history = clf.fit_head(
        texts[:90], labels[:90], texts[90:], labels[90:], epochs=30, lr=0.02, batch_size=16, patience=5
    )
    assert set(history[0]) == {"step", "epoch", "train_loss", "eval_loss", "eval_accuracy"}
    logits = clf.predict(texts[90:])
    assert logits.shape == (30, 3) and (logits.argmax(1) == labels[90:]).mean() > 0.9
    np.testing.assert_array_equal(logits, clf.predict(texts[90:], batch_tokens=1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m([]), "no rows"),
        (lambda m: m([[1, 2], []]), "empty row"),
        (lambda m: m([1, 128]), "input_ids: got 128, expected 0 to 127"),
        (lambda m: m([-1]), "input_ids: got -1"),
        (lambda m: m(np.array([0.5])), "input_ids: got an array of float64"),
        (lambda m: m(np.array(5)), r"input_ids: got an array of int64 with shape \(\)"),
        (lambda m: m({"input_ids": [[1, 2]]}), "input_ids: got dict, expected token ids"),
        (lambda m: m({1, 2}), "input_ids: got set, expected token ids"),
        (lambda m: m([[1, 2]], lengths=[3]), "lengths: got 3"),
        (lambda m: m([[1, 2]], lengths=[2.0]), "lengths: got float64"),
        (lambda m: m([[1, 2]], lengths=[True]), "lengths: got bool"),
        (lambda m: m.generate([1], stop_strings=3), "stop_strings: got 3, expected texts"),
        (lambda m: m.perplexity([1, 2, 3], context=2.0), "context: got 2.0, expected an integer"),
        (lambda m: m.perplexity([1, 2, 3], max_tokens=2.5), "max_tokens: got 2.5, expected an integer"),
        (lambda m: m([1, 2], logits_to_keep=1.5), "logits_to_keep: got 1.5, expected an integer"),
        (lambda m: m.generate([1], max_new_tokens=0), "max_new_tokens: got 0"),
        (lambda m: m.generate([1], temperature=0.0), "temperature: got 0"),
        (lambda m: m.perplexity([1]), "at least 2"),
        (lambda m: m.perplexity([1, 2, 3], max_tokens=-1), "max_tokens: got -1"),
        (lambda m: m([1, 2], logits_to_keep=-1), "logits_to_keep: got -1"),
        (lambda m: LlamaConfig({**TINY, "max_position_embeddings": "many"}), "max_position_embeddings is 'many'"),
        (lambda m: m.perplexity("text"), "tokenizer: this checkpoint has none"),
        (lambda m: m.decode([1]), "tokenizer: this checkpoint has none"),
        (lambda m: m.require_adapter(), "adapter: this model has none"),
        (lambda m: m.replace({"nothing": m.lm_head}), "no module named 'nothing'"),
        (lambda m: LlamaConfig({**TINY, "hidden_size": 65}), "hidden_size 65"),
        (lambda m: LlamaConfig({**TINY, "vocab_size": 0}), "vocab_size is 0"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model())


@pytest.mark.parametrize("heads, kv_heads, intermediate", [(2**61, 2**61, 1), (1, 1, 2**60)])
def test_sizes_that_overflow_are_refused(heads, kv_heads, intermediate):
    embed = _core.Weight("f32", 32, 4, 4, 4, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match=f"config: {heads} heads"):
        _core.Llama(heads, kv_heads, 4096, intermediate, 1e-5, embed, np.ones(4, np.float32), ())


def test_labels_are_checked():
    clf = LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    with pytest.raises(ValueError, match="labels: got 0 to 3, expected integers from 0 to 2"):
        clf.fit_head([[1], [2]], [0, 3], [[1]], [0])


def test_sizes_of_the_study():
    # the published sizes of LLaMA-2-7B with a 3-label head at 8, 4 and 3 bits, in decimal GB
    sizes = [size_from_config(LlamaConfig({**TINY, **LLAMA_2_7B}), bits)["total"] / 1e9 for bits in (8, 4, 3)]
    assert [round(size, 3) for size in sizes] == [6.895, 3.632, 2.816]


LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def test_sequences_are_ragged_rows():
    assert [row.tolist() for row in to_sequences([[1, 2], [3]])] == [[1, 2], [3]]
    assert to_sequences(np.array([4, 5]))[0].dtype == np.int32
    assert isinstance(tiny_model(), LlamaForCausalLM)


def test_texts_and_rows_come_in_columns_too():
    """An array of texts, or a column of a data frame: an object with __array__, whose labels do not count."""

    class Column(dict):  # as pandas' Series: column[0] is what has the label 0
        def __array__(self, dtype=None, copy=None):
            return np.array(list(self.values()), dtype)

    texts = ["a", "b c"]
    for column in (np.array(texts), np.array(texts, object), Column(zip((7, 9), texts, strict=True))):
        assert listed(column) == texts and not are_ids(listed(column))
    assert [row.tolist() for row in to_sequences(Column(zip((7, 9), [4, 5], strict=True)))] == [[4, 5]]
    with pytest.raises(ValueError, match="texts: got dict, expected a list of texts"):
        are_ids({"text": texts})


def test_a_field_that_is_set_is_read_and_saved(tmp_path):
    clf = LlamaForSequenceClassification.from_pretrained(save_tiny(tmp_path / "tiny"), num_labels=2)
    row = [[5, 9, 2, 2]]
    before = clf.predict(row)
    clf.config.pad_token_id = clf.config.eos_token_id  # as transformers' users write it
    assert clf.config.get("pad_token_id") == clf.config.to_dict()["pad_token_id"] == 2
    np.testing.assert_array_equal(clf.predict(row), clf.predict([[5, 9]]))
    assert np.any(clf.predict(row) != before)
    clf.save_pretrained(tmp_path / "again")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config.pad_token_id == copy.deepcopy(again).config.pad_token_id == 2
    np.testing.assert_array_equal(again.predict(row), clf.predict(row))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_that_is_not_the_embedding_is_not_tied(tmp_path, dtype):
    """As in transformers 5: fine-tuning may leave such files, whose config still ties the two."""
    path = save_tiny(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(path / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(path)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.lm_head.dequantize(), tensors["lm_head.weight"])
    embedding = tensors["model.embed_tokens.weight"].astype(dtype)
    tensors |= {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.astype(np.float32)}
    save_file(tensors, path / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(path)
    assert model.config.tie_word_embeddings and "lm_head" not in model.weights


def test_output_matrix_in_eight_bits():
    """Beside the weights, not in their place: what is saved and the embedding stay as they were."""
    model = tiny_model(tie_word_embeddings=True)
    small = ql.LlamaForCausalLM(model.config, model.weights, model.vectors, lm_head="int8")
    assert small.lm_head.format == "int8" and small.saved_weights() == model.saved_weights()
    assert small.size_report()["memory"] == model.size_report()["memory"] + small.lm_head.nbytes
    expected = ql.QuantWeight.from_float(model.lm_head.dequantize(), ql.Int8Config())
    assert small.lm_head.equals(expected)
    hidden = model.hidden_states([5, 9, 3])[0]
    np.testing.assert_allclose(small.logits(hidden), hidden @ expected.dequantize().T, rtol=0, atol=1e-5)
    again = small.replace({"model.embed_tokens": ql.QuantWeight.from_float(expected.dequantize(), ql.NF4Config())})
    assert again.lm_head.format == "int8" and not again.lm_head.equals(expected)
    assert small.replace({}).lm_head is small.lm_head
    with pytest.raises(ValueError, match="lm_head: got 'int4', accepted are"):
        ql.LlamaForCausalLM(model.config, model.weights, model.vectors, lm_head="int4")
