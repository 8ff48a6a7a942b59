"""SmolLM2 from its GGUF file against transformers in float32 on the same weights."""

import numpy as np
import pytest

import quantlab as ql

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXT = "the quick brown fox jumps over a lazy dog while 42 émigrés watch 😀 #MondayMotivation @user http://t.co/x"


@pytest.fixture(scope="module")
def ours():
    return ql.LlamaForCausalLM.from_pretrained("demo")


@pytest.fixture(scope="module")
def theirs(ours):
    torch.set_num_threads(2)
    path = ours.checkpoint.path
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(TEXT.split(), size)) for size in np.linspace(1, 300, 20).astype(int)]


def their_logits(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(np.asarray(ids)[None].astype(np.int64))).logits[0].numpy()


def test_logits_on_twenty_texts_batched_and_not(ours, theirs, texts):
    sizes = np.linspace(1, 512, 20).astype(int)
    rows = [ours.encode(texts[-1])[:size] for size in sizes]
    assert [len(row) for row in rows] == sizes.tolist()
    batched = ours.hidden_states(rows)
    for row, hidden in zip(rows, batched, strict=True):
        expected = their_logits(theirs, row)
        np.testing.assert_allclose(ours(row)[0], expected, atol=1e-3)
        np.testing.assert_allclose(ours.logits(hidden[: len(row)]), expected, atol=1e-3)


def test_sixty_four_greedy_tokens(ours, theirs):
    ids = ours.encode("The capital of France is")
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids[None].astype(np.int64)),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=64, eos_token_id=[])[0], expected[0].numpy())


def test_tokens_are_the_same(ours, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        ours.checkpoint.path.parent, gguf_file=ours.checkpoint.path.name
    )
    for text in [*texts, "  two  spaces\n\nand lines\t1234567 ", "日本語 и русский", "don't we'll I'M", ""]:
        assert ours.encode(text).tolist() == tokenizer(text)["input_ids"]


def test_sequence_classification_logits(ours, theirs, texts):
    clf = ql.LlamaForSequenceClassification.from_checkpoint(ours.checkpoint, num_labels=3)
    config = transformers.LlamaConfig(
        **{**theirs.config.to_dict(), "num_labels": 3, "pad_token_id": clf.config.pad_token_id}
    )
    reference = transformers.LlamaForSequenceClassification(config).eval()
    reference.model.load_state_dict(theirs.model.state_dict())
    reference.score.weight.data = torch.tensor(clf.score)
    rows = [clf.encode(text)[:64] for text in texts]
    predicted = clf(rows)
    with torch.no_grad():
        for row, logits in zip(rows, predicted, strict=True):
            expected = reference(torch.tensor(row[None].astype(np.int64))).logits[0].numpy()
            np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda s: s["rope_type"] if s else "default",
)
def test_rope_types(scaling):
    from models import TINY, tiny_model

    model = tiny_model(rope_scaling=scaling, max_position_embeddings=64)
    values = {**TINY, "max_position_embeddings": 64, "rope_scaling": scaling}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    state = {f"{name}.weight": torch.tensor(weight.dequantize()) for name, weight in model.weights.items()}
    state.update({f"{name}.weight": torch.tensor(vector) for name, vector in model.vectors.items()})
    reference.load_state_dict(state)
    ids = np.random.default_rng(0).integers(0, 128, 100)
    np.testing.assert_allclose(model(ids)[0], their_logits(reference, ids), atol=1e-4)
    ids = ids[:40]  # and past the trained length, a token at a time
    reference.load_state_dict(state)
    expected = reference.generate(torch.tensor(ids[None]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=40, eos_token_id=[])[0], expected[0].numpy())
