"""The tables of the LIMA study, from records alone."""

from __future__ import annotations

import math
from typing import Any

from . import lima_published as published
from .lima import ARROW, Lima, Loss
from .numbers import ABSENT, EN_DASH, number, scaled, significant, spread, times
from .records import ALONE
from .table import Table, energy_sentence

ROW = f"Tuned over {ARROW} inferred in"


def loss_text(found: Loss | None) -> str:
    """A loss with its 95 % interval."""
    if found is None:
        return ABSENT
    ends = "" if found[1] is None else f" ({found[1][0]:.3f}{EN_DASH}{found[1][1]:.3f})"
    return f"{found[0]:.3f}{ends}"


def change_text(found: Loss | None) -> str:
    """A difference of losses with its 95 % interval."""
    if found is None:
        return ABSENT
    ends = "" if found[1] is None else f" ({found[1][0]:+.3f} to {found[1][1]:+.3f})"
    return f"{found[0]:+.3f}{ends}"


def quality(study: Lima) -> Table:
    """What each baseline predicts of conversations that no adapter has seen."""
    text = any(study.metric(f"infer-{name}", "perplexity") for name in study.baselines)
    columns = [ROW, "Held-out loss, nat", "Perplexity", "Before tuning, nat", "Change by tuning, nat"]
    columns += ["Perplexity, other text"] if text else []
    rows = []
    for name in study.baselines:
        cell, base = f"infer-{name}", study.before(name)
        loss, tuned = study.loss(cell), "-" in name
        row = [study.title(name), loss_text(loss), number(math.exp(loss[0]), 2) if loss else ABSENT]
        row += [loss_text(study.loss(base)) if tuned else ABSENT]
        row += [change_text(study.difference(cell, base)) if tuned else ABSENT]
        rows.append([*row, perplexity_text(study, cell)] if text else row)
    return Table("quality", "Quality", columns, rows, quality_caption(study))


def perplexity_text(study: Lima, cell: str) -> str:
    found = study.metric(cell, "perplexity")
    if found is None:
        return ABSENT
    error = found["stderr"]
    return significant(found["value"], 4) + ("" if error is None else f" ± {significant(error, 2)}")


def quality_caption(study: Lima) -> str:
    found = study.metric(f"infer-{study.baselines[0]}", "eval_loss") or {}
    text = f"n = {found.get('n', 0):,} held-out conversations, {found.get('tokens', 0):,} tokens"
    text += ", of the answers alone. " if study.config["answers_only"] else ", questions included. "
    text += "In brackets: 95 % intervals (Student's, conversations as the sample; changes are paired). "
    text += "Before tuning: the same format without an adapter. "
    other = study.metric(f"infer-{study.baselines[0]}", "perplexity")
    if other is not None:
        text += f"Other text: {other['n']:,} tokens in chunks of {other['context']}, ± standard error. "
    return text.strip()


def merging(study: Lima) -> Table | None:
    """What each way of putting an adapter into the weights adds to the loss."""
    if not study.tuned:
        return None
    columns = ["Adapter of", "Beside the weights, nat", "Merged, floats kept", "Merged, same format again"]
    columns += ["Onto the float model", "Onto it, then quantized"]
    rows = []
    for part in study.tuned:
        tune, merge = f"tune-{part}", f"merge-{part}"
        row = [study.part_title(part), loss_text(study.loss(tune))]
        row += [change_text(study.difference(merge, tune, kind)) for kind in ("merged", "requantized", "onto_floats")]
        crossed = [name for name in study.baselines if name.startswith(f"{part}-") and not name.endswith(part)]
        texts = [
            f"{study.part_title(name.rpartition('-')[2])}: {change_text(study.difference(f'infer-{name}', tune))}"
            for name in crossed
        ]
        rows.append([*row, "; ".join(texts) or ABSENT])
    caption = (
        "Held-out loss; the columns after the second are changes against it, paired, with 95 % intervals. Merged: the "
    )
    caption += (
        "adapter added to the base's dequantized weights. Onto the float model: added to weights that it was not "
    )
    return Table("merging", "What merging costs", columns, rows, caption + "trained against.")


def generation(study: Lima) -> Table:
    """Seconds and tokens a second of generation."""
    sizes, tokens = study.batches, study.config["new_tokens"]
    columns = [ROW, *(f"Batch {size}, s" for size in sizes), f"Batch {sizes[-1]} against {sizes[0]}"]
    columns += [f"Decoding, tokens/s, batch {size}" for size in dict.fromkeys((sizes[0], sizes[-1]))]
    columns += ["J a token"]
    rows = []
    for name in study.baselines:
        cell = f"infer-{name}"
        first, last = (study.value(cell, f"generate_{size}") for size in (sizes[0], sizes[-1]))
        row = [study.title(name), *(spread(study.metric(cell, f"generate_{size}")) for size in sizes)]
        row.append(times(last / first if first and last else None))
        row += [significant(study.value(cell, f"decode_{size}")) for size in dict.fromkeys((sizes[0], sizes[-1]))]
        rows.append([*row, significant(study.value(cell, "energy_per_token"))])
    found = study.any["generation"]
    prompt = f"\u201c{study.config['prompt']}\u201d" if study.config["prompt"] else str(found["prompt"])
    caption = (
        f"One generate of {tokens} tokens that never stops early, prompts included; median of {found['repeats']}, in "
    )
    caption += f"brackets the fastest and the slowest. Prompt: {prompt}. Decoding: tokens after the first."
    caption += study.crowded([f"infer-{name}" for name in study.baselines], "generation")
    return Table("generation", "Generation", columns, rows, caption)


def cost(study: Lima) -> Table:
    """Bytes, memory and the time of quantizing."""
    columns = [ROW, "Checkpoint, MB", "In memory, MB", "Quantization, s", f"{study.peak_name} in generation, MB"]
    rows = []
    for name in study.baselines:
        cell = f"infer-{name}"
        row = [
            study.title(name),
            *(scaled(study.value(cell, f"size_{kind}"), 1e-6) for kind in ("checkpoint", "memory")),
        ]
        row += [significant(study.quantization_time(name)), scaled(study.peak(cell, "generation"), 1e-6)]
        rows.append(row)
    caption = (
        "MB = 10^6 bytes, an adapter beside the weights included. Quantization: of the base, or of the merged model. "
    )
    found = (study.energy(f"infer-{name}", "generation") for name in study.baselines)
    caption += f"{study.peak_note}. " + energy_sentence(next((item for item in found if item), None))
    return Table("cost", "Size and memory", columns, rows, caption)


def training(study: Lima) -> Table | None:
    """Speed, memory and losses of each tuning."""
    if not study.tuned:
        return None
    columns = [
        "Tuned over",
        "Samples/s",
        "Tokens/s",
        "An epoch, s",
        f"{study.peak_name}, MB",
        "Training loss, first to last, nat",
    ]
    columns += ["Held-out loss, before to after, nat", "Change, nat", "Adapter, MB", "g CO2e"]
    rows = []
    for part in study.tuned:
        cell, base = f"tune-{part}", f"base-{part}"
        partly = "≥ " if study.cells[cell].get("training_resumed") else ""
        grams = (study.energy(cell, "training") or {}).get("kg")
        row = [
            study.part_title(part),
            *(significant(study.value(cell, f"{unit}_per_s")) for unit in ("samples", "tokens")),
        ]
        row += [significant(study.value(cell, "epoch_time")), scaled(study.peak(cell, "training"), 1e-6)]
        row.append(arrow(study.value(cell, "train_loss_first"), study.value(cell, "train_loss_last")))
        row.append(arrow(study.value(base, "eval_loss"), study.value(cell, "eval_loss")))
        row += [change_text(study.difference(cell, base)), scaled(study.value(cell, "size_adapter"), 1e-6)]
        rows.append([*row, partly + scaled(grams, 1000)])
    return Table("training", "Training", columns, rows, training_caption(study))


def arrow(first: float | None, last: float | None) -> str:
    return f"{number(first, 3)} {ARROW} {number(last, 3)}"


def training_caption(study: Lima) -> str:
    config, cell = study.config, study.cells[f"tune-{study.tuned[0]}"]
    data, steps = cell["data"]["train"], study.value(f"tune-{study.tuned[0]}", "steps")
    size = config["batch_size"] * config["accumulation"]
    text = f"n = {data['n']:,} conversations, {number(steps, 0)} steps of {size}; "
    text += f"LoRA r = {config['r']}, alpha {config['lora_alpha']:g}, dropout {config['lora_dropout']:g}, on "
    text += f"{', '.join(config['target_modules'])}; learning rate {config['lr']:g}, {config['lr_scheduler']}, warm-up "
    text += (
        f"{config['warmup_ratio']:g}. Tokens: all that pass the model. Training loss: means of the first and the last "
    )
    text += "tenth of the steps. Speeds without the evaluations in between."
    return text + study.crowded([f"tune-{part}" for part in study.tuned], "training")


def beside_published(study: Lima) -> Table | None:
    """Ours beside theirs, each relative to its own: absolute figures are of other models and machines."""
    names = [name for name in study.baselines if name in published.GENERATION]
    if not names or not {1, 32} <= set(study.batches):
        return None
    columns = [ROW, "Batch 32 against 1, ours", "Batch 32 against 1, theirs", "At batch 32 against bnb-bnb, ours"]
    columns += ["At batch 32 against bnb-bnb, theirs", "Training samples/s against bnb, ours", "theirs"]
    rows = []
    for name in names:
        part, theirs = name.partition("-")[0], published.GENERATION[name]
        row = [study.title(name), times(relative(study, name, 32, name, 1)), times(theirs[-1] / theirs[0])]
        row += [
            times(relative(study, name, 32, "bnb-bnb", 32)),
            times(theirs[-1] / published.GENERATION["bnb-bnb"][-1]),
        ]
        row.append(times(training_ratio(study, part)))
        rows.append([*row, times(published.TRAINING[part] / published.TRAINING["bnb"])])
    caption = f"Theirs: {published.SETTING} Ours: {study.model}, {study.machine}."
    return Table("published", "Beside the published study", columns, rows, caption)


def relative(study: Lima, name: str, size: int, other: str, other_size: int) -> float | None:
    """The time of a generation divided by that of another, or None; of two cells only where both had the machine."""
    if other not in study.baselines:
        return None
    if other != name and min(study.share(f"infer-{each}", "generation") for each in (name, other)) < ALONE:
        return None
    value = study.value(f"infer-{name}", f"generate_{size}")
    base = study.value(f"infer-{other}", f"generate_{other_size}")
    return value / base if value and base else None


def training_ratio(study: Lima, part: str) -> float | None:
    """The speed of a training divided by that over bnb, or None; only where both had the machine to themselves."""
    if not {part, "bnb"} <= set(study.tuned):
        return None
    if part != "bnb" and min(study.share(f"tune-{each}", "training") for each in (part, "bnb")) < ALONE:
        return None
    value, base = study.value(f"tune-{part}", "samples_per_s"), study.value("tune-bnb", "samples_per_s")
    return value / base if value and base else None


def published_training_ratio() -> float:
    return published.TRAINING["gptq"] / published.TRAINING["bnb"]


def as_published() -> Table:
    """The published figures as they were printed, marked as theirs."""
    columns = ["Pipeline (theirs)", *(f"Batch {size}, s" for size in published.BATCHES), "Training samples/s"]
    rows = [
        [name, *(number(value, 3) for value in values), number(published.TRAINING[name.partition("-")[0]], 2)]
        for name, values in published.GENERATION.items()
    ]
    rows.append(["gptq-bnb", *[ABSENT] * len(published.BATCHES), number(published.TRAINING["gptq"], 2)])
    caption = f"{published.SOURCE}. {published.SETTING} Seconds of one generate of {published.NEW_TOKENS} tokens after "
    caption += "\u201chello\u201d; gptq-bnb was not measured."
    return Table(
        "as_published",
        "The published figures",
        columns,
        rows,
        caption + "\u201chello\u201d; gptq-bnb was not measured.",
    )


def raw_rows(study: Lima) -> list[dict[str, Any]]:
    """One flat row of plain numbers for each baseline, with units in the names: what the CSV holds."""
    return [flat(study, name, f"infer-{name}", "baseline") for name in study.baselines]


def training_rows(study: Lima) -> list[dict[str, Any]]:
    """One flat row of plain numbers for each tuning."""
    return [flat(study, part, f"tune-{part}", "base") for part in study.tuned]


def flat(study: Lima, name: str, cell: str, heading: str) -> dict[str, Any]:
    record = study.cells[cell]
    row: dict[str, Any] = {heading: name, "cell_id": record["cell_id"]}
    for metric, fields in record["metrics"].items():
        unit = "" if fields["unit"] == "1" else f"_{fields['unit'].replace('1/', 'per_')}"
        row[metric.removesuffix(unit) + unit] = fields["value"]
        if fields.get("ci95") is not None:
            row[f"{metric}_low95"], row[f"{metric}_high95"] = fields["ci95"]
    for kind, short in (("peak_host", "rss"), ("peak_device", "device")):
        for phase, peak in record["memory"].get(kind, {}).items():
            row[f"{phase}_peak_{short}_B"] = peak["value"]
    for phase, found in record["energy"].items():
        row |= {f"{phase}_kwh": found["kwh"], f"{phase}_kg_co2e": found["kg"]}
    return row


def heading(study: Lima) -> str:
    return f"{study.model} on LIMA: tuning over quantized weights"


def all_tables(study: Lima) -> list[Table]:
    """The tables of the report in order."""
    found = [quality(study), merging(study), training(study), generation(study), cost(study), beside_published(study)]
    return [table for table in found if table is not None]
