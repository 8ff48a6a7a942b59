"""What users write, for mypy (in .ci/run) to accept: every public call, with each kind of argument. Never run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import quantlab as ql


def load_and_generate() -> None:
    model: ql.LlamaForCausalLM = ql.LlamaForCausalLM.from_pretrained(
        "demo", dtype="auto", device="cuda", lm_head="int8"
    )
    ids: np.ndarray = model.encode("The capital of France is")
    rows: list[np.ndarray] = model.generate([ids, ids], eos_token_id=[], on_token=lambda row, token: print(row, token))
    model.generate(((1, 2), (3,)), eos_token_id=[1, 2])
    model.generate(ids, do_sample=True, top_p=0.9, stop_strings="\n", eos_token_id=2)
    model.generate([1, 2, 3], stop_strings=["a", "b"])
    text: str = model.decode(rows[0]) + model.decode([1, 2], skip_special_tokens=False)
    model(ids[None], lengths=[3], logits_to_keep=1)
    model.hidden_states([ids], lengths=np.array([3]))
    perplexity: float = model.perplexity(text, context=128)["ppl"] + model.perplexity([ids])["ppl"]
    print(perplexity, model.size_report()["total"], model.config.vocab_size, model.require_tokenizer().get_vocab())
    model.to("cpu").save_pretrained(Path("out"))


def quantize(model: ql.LlamaForCausalLM, classifier: ql.LlamaForSequenceClassification, ids: np.ndarray) -> None:
    config = ql.GPTQConfig(bits=4, scale_search="hessian")
    same: ql.LlamaForCausalLM = ql.quantize(model, config, calibration=["a text"], resume_dir=Path("layers"))
    other: ql.LlamaForSequenceClassification = ql.quantize(classifier, ql.NF4Config())
    opened: ql.LlamaForCausalLM = ql.quantize(ql.open_checkpoint(Path("m")), ql.GPTQConfig.recommended(3), [ids, ids])
    named: ql.LlamaForCausalLM = ql.quantize("demo", config, calibration=ids.reshape(2, -1), device="cuda")
    print(same.quantization_report, other.num_labels, opened, named)
    weight = ql.QuantWeight.from_float(ids.astype(np.float16), ql.RTNConfig(bits=3, group_size=-1))
    with ql.backend.use(isa="avx2", threads=1), ql.backend.use(device="cuda"):
        product: np.ndarray = ql.linear(ids, weight)
    hessian = ql.gptq.Hessian(64)
    hessian.add(product)
    found, report = ql.gptq.quantize(weight.dequantize(), hessian, config)
    print(found.nbytes, report.loss, ql.info(), ql.backend.table(), ql.cuda.why_not())


def classify(labels: np.ndarray) -> None:
    classifier = ql.LlamaForSequenceClassification.from_pretrained(Path("m"), num_labels=3)
    history: list[dict[str, float]] = classifier.fit_head(["a", "b"], [0, 1], ("c", "d"), labels, epochs=3, lr=1e-3)
    logits: np.ndarray = classifier.predict(["a"]) + classifier.predict([labels]) + classifier([[1, 2]])
    tuned = ql.finetune(classifier, ql.LoraConfig(), ["a", "b"], labels=labels, eval_data=["c"], eval_labels=[1])
    print(history, logits, tuned.score, ql.evaluate(tuned, ["a"], labels=labels)["accuracy"])


def finetune(model: ql.LlamaForCausalLM) -> None:
    lora = ql.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    training = ql.TrainingConfig(lr_scheduler_type="cosine", output_dir=Path("tuned"), resume_from_checkpoint=True)
    tuned: ql.LlamaForCausalLM = ql.finetune(model, lora, ["a text"], training, eval_data=Path("rows.jsonl"))
    prompt: np.ndarray = tuned.apply_chat_template([{"role": "user", "content": "What is NF4?"}])
    tuned.save_adapter(Path("adapter"))
    again = ql.load_adapter(model, "adapter")
    adapter: ql.Adapter = again.require_adapter()
    for merged in (again.merge(), again.merge("same"), again.merge(ql.Int8Config())):
        print(merged.merge_report, merged.decode(merged.generate(prompt)[0]))
    print(adapter.parameters.size, adapter["model.layers.0.self_attn.q_proj"], tuned.training_log[-1]["loss"])
