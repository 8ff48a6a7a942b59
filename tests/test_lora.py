"""Adapters: targets, initial matrices, use beside every base, files, merging; what does not fit is refused by name."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from checkpoints import save_tiny
from models import tiny_model, tiny_parts

import quantlab as ql
from quantlab.config import LoraConfig
from quantlab.llama_config import layer_modules
from quantlab.lora import Adapter, config_of, target_modules

BASES = {
    "f32": None, "nf4": ql.NF4Config(), "nf4 double": ql.NF4Config(32, double_quant=True), "fp4": ql.FP4Config(),
    "int8": ql.Int8Config(), "affine": ql.RTNConfig(4, 32), "affine asymmetric": ql.RTNConfig(3, -1, sym=False),
}  # fmt: skip
IDS = np.arange(3, 40)


@pytest.fixture(autouse=True)
def precise():
    with ql.backend.use(precise=True):
        yield


def base(name: str) -> ql.LlamaForCausalLM:
    return tiny_model() if BASES[name] is None else ql.quantize(tiny_model(), BASES[name])


def trained(model, seed: int = 1, **settings) -> Adapter:
    """An adapter that changes something: B drawn too."""
    adapter = Adapter.fresh(LoraConfig(**{"r": 3, "target_modules": "all-linear", **settings}), model, seed)
    rng = np.random.default_rng(seed)
    for _, (_, b) in adapter.items():
        b[...] = 0.1 * rng.standard_normal(b.shape)
    return adapter


# ---- what it is ----


def test_targets_by_name():
    config = tiny_model().config
    assert target_modules(LoraConfig(), config) == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    assert target_modules(LoraConfig(target_modules="all-linear"), config) == list(layer_modules(config))
    one = LoraConfig(target_modules=["model.layers.1.mlp.up_proj", "self_attn.o_proj"])
    assert len(target_modules(one, config)) == 3
    with pytest.raises(ValueError, match="'c_attn' is no linear module of this model; accepted are q_proj, k_proj"):
        target_modules(LoraConfig(target_modules=["q_proj", "c_attn"]), config)
    with pytest.raises(ValueError, match="'proj' is no linear module"):
        target_modules(LoraConfig(target_modules=["proj"]), config)


def test_a_fresh_adapter_changes_nothing():
    model = tiny_model()
    adapter = Adapter.fresh(LoraConfig(r=5), model, seed=7)
    a, b = adapter["model.layers.0.self_attn.q_proj"]
    assert a.shape == (5, 64) and b.shape == (64, 5) and not b.any()
    assert np.abs(a).max() <= 1 / 8 and np.abs(a).std() > 0.02  # U(-1/sqrt(64), 1/sqrt(64))
    assert adapter.parameters.size == sum(x.size for _, pair in adapter.items() for x in pair)
    np.testing.assert_array_equal(model.with_adapter(adapter)(IDS), model(IDS))
    again = Adapter.fresh(LoraConfig(r=5), model, seed=7)
    np.testing.assert_array_equal(adapter.parameters, again.parameters)


RANKS = {"layers.1.self_attn.q_proj": 7, "q_proj": 5, "up_proj": 1}
ALPHAS = {"o_proj": 12, r"model\.layers\.0\..*gate_proj": 1.5, "up_proj": 2}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_by_pattern(tmp_path, use_rslora):
    """Against W + alpha / r B A in float64, with r and alpha by hand; in files; and after training."""
    model, settings = tiny_model(), {"lora_alpha": 6, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    adapter = trained(model, use_rslora=use_rslora, **settings)
    sums = {}
    for module, (a, b) in adapter.items():
        layer, name = module.split(".")[2], module.rsplit(".", 1)[1]
        r = {"q_proj": 7 if layer == "1" else 5, "up_proj": 1}.get(name, 3)
        alpha = {"o_proj": 12, "gate_proj": 1.5 if layer == "0" else 6, "up_proj": 2}.get(name, 6)
        assert a.shape[0] == b.shape[1] == r
        delta = alpha / (r**0.5 if use_rslora else r) * (b.astype(np.float64) @ a.astype(np.float64))
        np.testing.assert_allclose(adapter.delta(module), delta, rtol=0, atol=1e-6 * np.abs(delta).max())
        sums[module] = ql.QuantWeight.from_array((model.weight(module).dequantize() + delta).astype(np.float32))
    tuned, wanted = model.with_adapter(adapter), model.replace(sums)(IDS)
    np.testing.assert_allclose(tuned(IDS), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert repr(adapter).startswith("Adapter(r=1 3 5 7, 14 modules")
    tuned.save_adapter(tmp_path / "a")
    again = ql.load_adapter(model, tmp_path / "a")
    np.testing.assert_array_equal(again(IDS), tuned(IDS))
    assert again.adapter.config == adapter.config
    training = ql.TrainingConfig(learning_rate=1e-2, max_steps=3)
    further = ql.finetune(model, again.adapter, [IDS.tolist()] * 4, training, progress=False)
    assert further.adapter.shapes == adapter.shapes
    assert all((further.adapter[module][i] != adapter[module][i]).any() for module in adapter for i in (0, 1))


def test_matrices_of_another_rank_are_refused():
    model = tiny_model()
    adapter = trained(model)
    other = Adapter(LoraConfig(r=3, target_modules="all-linear", rank_pattern={"o_proj": 4}), dict(adapter.items()))
    with pytest.raises(ValueError, match=r"A and B of .*0\.self_attn\.o_proj have ranks 3 and 3, expected 4"):
        model.with_adapter(other)


def test_matrices_are_views_of_the_parameters():
    adapter = trained(tiny_model())
    adapter.parameters[...] = 2.0
    assert all((x == 2).all() for _, pair in adapter.items() for x in pair)
    copy = adapter.copy()
    copy.parameters[...] = 3.0
    assert (adapter.parameters == 2).all()


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES.keys())
def test_copies_are_whole(again, tmp_path):
    """Of a copied adapter the matrices are views of its own parameters, also where they were looked at before."""
    model = ql.quantize(ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "m")), ql.NF4Config(double_quant=True))
    tuned = model.with_adapter(trained(model))
    tuned.training_log = [{"step": 1}]
    other = again(tuned.adapter)
    other.parameters[...] = 3.0
    assert all((x == 3).all() for _, pair in other.items() for x in pair) and not (tuned.adapter.parameters == 3).any()
    whole = again(tuned)
    np.testing.assert_array_equal(whole(IDS), tuned(IDS))
    assert whole.training_log == tuned.training_log
    module = "model.layers.0.self_attn.q_proj"
    assert whole.weight(module).equals(model.weight(module))
    assert whole.without_adapter().save_pretrained(tmp_path / "a") == model.save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES.keys())
def test_copies_keep_their_kind(again):
    causal = tiny_model(tie_word_embeddings=True)
    small = again(ql.LlamaForCausalLM(causal.config, causal.weights, causal.vectors, lm_head="int8"))
    assert small.lm_head.format == "int8" and small.weight("model.embed_tokens").format == "f32"
    classifier = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=5)
    tuned = classifier.with_adapter(Adapter.fresh(LoraConfig(), classifier, train_score=True))
    other = again(tuned)
    np.testing.assert_array_equal(other([[1, 2, 3]]), tuned([[1, 2, 3]]))
    assert other.num_labels == 5
    if again is not copy.copy:  # which shares the adapter
        other.adapter.parameters[...] = 0  # its head is a view of them, as the first one's is
        assert not other.score.any() and tuned.score.any()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_beside_every_base_it_is_the_merged_model(name, rslora):
    """merge() adds scale * B A in float32 to the decoded weights: the same model but for rounding."""
    model = base(name)
    adapter = trained(model, use_rslora=rslora, lora_alpha=8)
    tuned = model.with_adapter(adapter)
    merged = tuned.merge()
    assert merged.adapter is None and all(merged.weight(m).format == "f32" for m in layer_modules(model.config))
    np.testing.assert_allclose(tuned(IDS), merged(IDS), atol=2e-3)
    assert np.abs(tuned(IDS) - model(IDS)).max() > 0.5
    assert tuned.weights["model.layers.0.mlp.up_proj"] is model.weights["model.layers.0.mlp.up_proj"]  # not copied
    np.testing.assert_array_equal(tuned.without_adapter()(IDS), model(IDS))


def test_generation_and_losses_see_it():
    model = tiny_model()
    tuned = model.with_adapter(trained(model))
    merged = tuned.merge()
    for sampling in ({}, {"do_sample": True, "seed": 3}):
        rows = tuned.generate([[5, 6, 7], [8]], max_new_tokens=12, eos_token_id=[], **sampling)
        wanted = merged.generate([[5, 6, 7], [8]], max_new_tokens=12, eos_token_id=[], **sampling)
        assert [row.tolist() for row in rows] == [row.tolist() for row in wanted]
    ours, theirs = (m.perplexity([IDS], context=16)["nll"] for m in (tuned, merged))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_it_shows():
    model = tiny_model()
    tuned = model.with_adapter(trained(model))
    assert "Adapter(r=3, 14 modules, 5,568 parameters)" in repr(tuned)
    assert tuned.size_report()["memory"] == model.size_report()["memory"] + 4 * 5568
    assert tuned.size_report()["total"] == model.size_report()["total"]


def test_replaced_weights_keep_it():
    model = tiny_model()
    tuned = model.with_adapter(trained(model))
    other = {name: tiny_model(1).weight(name) for name in layer_modules(model.config)}
    np.testing.assert_array_equal(tuned.replace(other)(IDS), model.replace(other).with_adapter(tuned.adapter)(IDS))
    assert tuned.to("cpu") is tuned


# ---- files ----


def test_files_there_and_back(tmp_path):
    model = tiny_model()
    tuned = model.with_adapter(trained(model, r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
    sizes = tuned.save_adapter(tmp_path / "adapter")
    assert set(sizes) == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = ql.load_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(loaded(IDS), tuned(IDS))
    assert loaded.adapter.config.task_type == "CAUSAL_LM"


def test_a_classifiers_head_comes_with_it(tmp_path, rng):
    model = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    adapter = Adapter.fresh(LoraConfig(), model, train_score=True)
    adapter.score[...] = rng.standard_normal((3, 64))
    tuned = model.with_adapter(adapter)
    assert np.abs(tuned([IDS]) - model([IDS])).max() > 0.1
    tuned.save_adapter(tmp_path)
    np.testing.assert_array_equal(ql.load_adapter(model, tmp_path)([IDS]), tuned([IDS]))
    np.testing.assert_array_equal(tuned.merge()([IDS]), tuned([IDS]))
    with pytest.raises(ValueError, match="it has a classification head"):
        ql.load_adapter(tiny_model(), tmp_path)
    two = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=2)
    with pytest.raises(ValueError, match=r"it has a classification head \(3, 64\), this model has \(2, 64\)"):
        ql.load_adapter(two, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 32}, r"down_proj is \(64, 96\) in it and \(32, 96\) in this model"),
        ({"num_hidden_layers": 1}, r"it has matrices for model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"it has no matrices for model\.layers\.2"),
        ({"num_key_value_heads": 4}, r"k_proj is \(32, 64\) in it and \(64, 64\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, changes, says):
    model = tiny_model()
    model.with_adapter(trained(model)).save_adapter(tmp_path)
    with pytest.raises(ValueError, match=says):
        ql.load_adapter(tiny_model(**changes), tmp_path)


def test_what_needs_an_adapter_or_none_says_so(tmp_path):
    model = tiny_model()
    tuned = model.with_adapter(trained(model))
    for job in (model.merge, lambda: model.save_adapter(tmp_path)):
        with pytest.raises(ValueError, match=r"^adapter: this model has none"):
            job()
    with pytest.raises(ValueError, match=r"^adapter: save_pretrained writes a model without one"):
        tuned.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"^model: it has an adapter"):
        ql.quantize(tuned, ql.NF4Config())


def test_a_merged_model_is_saved_as_any(tmp_path):
    model = ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny"))
    merged = model.with_adapter(trained(model)).merge()
    merged.save_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(ql.LlamaForCausalLM.from_pretrained(tmp_path / "merged")(IDS), merged(IDS))


# ---- merging ----


@pytest.mark.parametrize("name", BASES)
def test_merged_into_the_same_format(name):
    model = base(name)
    tuned = model.with_adapter(trained(model, target_modules=["q_proj", "up_proj"]))
    merged = tuned.merge("same")
    report = {entry["module"]: entry for entry in merged.merge_report}
    assert set(report) == set(tuned.adapter)
    for module in layer_modules(model.config):
        old, new = model.weight(module), merged.weight(module)
        if module not in report:
            assert new is old
            continue
        assert config_of(new) == config_of(old)
        dense = old.dequantize() + tuned.adapter.delta(module)
        error = np.linalg.norm(new.dequantize() - dense)
        assert report[module]["error_norm"] == pytest.approx(error, rel=1e-5)
        assert report[module]["delta_norm"] == pytest.approx(np.linalg.norm(tuned.adapter.delta(module)), rel=1e-5)
        assert report[module]["error_ratio"] < (0 if BASES[name] is None else 1) + 1e-12


def test_merged_into_another_format():
    tuned = base("nf4").with_adapter(trained(tiny_model(), target_modules=["v_proj"]))
    merged = tuned.merge(ql.Int8Config())
    assert {merged.weight(module).format for module in layer_modules(merged.config)} == {"int8"}
    assert len(merged.merge_report) == 14
    ratios = {entry["module"].endswith("v_proj"): entry["error_ratio"] for entry in merged.merge_report}
    assert 0 < ratios[True] < 1 and ratios[False] == math.inf  # nothing is added, yet it is rounded
    assert len(tuned.merge(ql.NF4Config()).merge_report) == 2  # the others are NF4 already


def test_merged_floats_keep_their_dtype(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    model = ql.LlamaForCausalLM.from_pretrained(path, dtype="bfloat16")
    merged = model.with_adapter(trained(model)).merge()
    assert {merged.weight(module).format for module in layer_modules(model.config)} == {"bf16"}
    assert all(0 < entry["error_ratio"] < 0.1 for entry in merged.merge_report)


@pytest.mark.parametrize("how", ["nf4", 4, ql.GPTQConfig()], ids=str)
def test_merging_otherwise_is_refused(how):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^requantize: "):
        model.with_adapter(trained(model)).merge(how)
