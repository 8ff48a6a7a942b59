"""The tables of a study, from records alone: as Markdown, CSV, and lists of rows that HTML and the terminal print."""

from __future__ import annotations

from typing import Any

from . import published
from .numbers import ABSENT, number, p_value, percent, points, scaled, significant, spread, times
from .records import title
from .study import Study
from .table import Table, energy_sentence


def quality(study: Study) -> Table:
    """How well each variant does, and whether it differs from the base."""
    columns = ["Variant", "Accuracy, %", "Against base, points", "p (McNemar)"]
    columns += ["Macro-recall, %", "Macro-F1, %", "Perplexity"]
    rows = []
    for name in study.variants:
        comparison, perplexity = study.comparisons.get(name), study.metric(name, "perplexity")
        accuracy, recall, f1 = (
            percent(study.metric(name, metric)) for metric in ("accuracy", "macro_recall", "macro_f1")
        )
        ppl = ABSENT
        if perplexity is not None:
            error = perplexity["stderr"]
            ppl = significant(perplexity["value"], 4) + ("" if error is None else f" ± {significant(error, 2)}")
        rows.append([study.title(name), accuracy, points(comparison), p_value(comparison), recall, f1, ppl])
    return Table("quality", "Quality", columns, rows, quality_caption(study))


def quality_caption(study: Study) -> str:
    data, base = study.any["data"], study.base
    text = f"n = {data['n']:,} {data['split']} tweets. In brackets: 95 % intervals (accuracy: Wilson; macro: bootstrap"
    text += "; differences: Bonett and Price). " if base else "). "
    if base:
        text += f"Base: {title(base)}. p: McNemar's mid-p test on the same tweets. "
    perplexity = study.metric(next(iter(study.variants)), "perplexity")
    if perplexity is not None:
        text += f"Perplexity: {perplexity['n']:,} tokens in chunks of {perplexity['context']}, ± standard error. "
    return text + f"Always answering the largest class would give {100 * study.majority:.1f} % accuracy."


def cost(study: Study) -> Table:
    """What each variant takes: bytes, time, memory, energy."""
    columns = ["Variant", "Checkpoint, MB", "Smaller by", "In memory, MB", "Quantization, s", "Evaluation, ms a tweet"]
    columns += [f"{study.peak_name}, MB", "Evaluation, J a tweet", "Quantization, g CO2e", "Evaluation, g CO2e"]
    rows = []
    for name in study.variants:
        ratio, partly = study.relative(name, "size_checkpoint"), study.variants[name].get("quantization_resumed")
        quantization = significant(study.value(name, "quantization_time"))
        grams = [study.energy(name, phase) for phase in ("quantization", "evaluation")]
        row = [
            study.title(name),
            scaled(study.value(name, "size_checkpoint"), 1e-6),
            times(1 / ratio if ratio else None),
        ]
        row += [scaled(study.value(name, "size_memory"), 1e-6), f"≥ {quantization}" if partly else quantization]
        row += [spread(study.metric(name, "ms_per_tweet")), scaled(study.peak(name, "evaluation"), 1e-6)]
        row.append(significant(study.value(name, "energy_per_tweet")))
        rows.append(row + [scaled(found["kg"] if found else None, 1000) for found in grams])
    return Table("cost", "Size, time and energy", columns, rows, cost_caption(study))


def cost_caption(study: Study) -> str:
    speed = study.metric(next(iter(study.variants)), "ms_per_tweet")
    text = "MB = 10^6 bytes. "
    if speed is not None:
        unit = "tweets" if study.config["one_at_a_time"] else "repeats"
        text += f"Evaluation: median of {speed['n']:,} {unit}, in brackets the fastest and the slowest. "
    return f"{text}{study.peak_note} during the evaluation. {energy_note(study)}"


def classes(study: Study) -> Table:
    """Precision, recall and F1 of every class under every variant."""
    columns = ["Variant", "Class", "Precision, %", "Recall, %", "F1, %", "Tweets"]
    rows = []
    for name, cell in study.variants.items():
        for row in cell["classification"]["classes"]:
            shares = [number(100 * row[field]) for field in ("precision", "recall", "f1")]
            rows.append([study.title(name), row["label"], *shares, f"{row['support']:,}"])
    return Table("classes", "Classes", columns, rows, "By scikit-learn.")


def beside_published(study: Study) -> Table | None:
    """Ours relative to our base beside theirs relative to their base; None where no quantized variant is in both."""
    names = [name for name in study.variants if name in published.FIGURES]
    if study.base != "fp32" or len(names) < 2:
        return None
    columns = ["Variant", "Size, ours", "Size, theirs", "Time a tweet, ours", "Time a tweet, theirs"]
    columns += ["Accuracy change, ours", "Accuracy change, theirs"]
    rows = []
    for name in names:
        size, time, accuracy = (study.relative(name, each) for each in ("size_checkpoint", "ms_per_tweet", "accuracy"))
        row = [study.title(name), times(size), times(published.relative(name, "size")), times(time)]
        row += [
            times(published.relative(name, "evaluation")),
            ABSENT if accuracy is None else f"{100 * accuracy - 100:+.2f} %",
        ]
        rows.append([*row, f"{published.FIGURES[name]['accuracy_change']:+.2f} %"])
    caption = f"Each relative to its own fp32 base. Theirs: {published.SETTING} Ours differ in {differences(study)}."
    return Table("published", "Beside the published study", columns, rows, caption)


def as_published() -> Table:
    """The published figures as they were printed, marked as theirs."""
    columns = ["Variant (theirs)", "Size, GB", "Evaluation, s", "ms a tweet", "Evaluation, kg CO2e", "Quantization, s"]
    columns += ["Quantization, kg CO2e", "Accuracy against base"]
    rows = []
    for name, row in published.FIGURES.items():
        each = 1000 * (row["evaluation"] or 0) / published.TWEETS
        texts = [title(name), number(row["size"], 2), number(row["evaluation"], 2), number(each, 1)]
        texts += [number(row["evaluation_kg"], 6), number(row["quantization"], 2), number(row["quantization_kg"], 6)]
        rows.append([*texts, f"{row['accuracy_change']:+.2f} %"])
    caption = f"{published.SOURCE}. {published.SETTING} Milliseconds a tweet are derived here."
    return Table("as_published", "The published figures", columns, rows, caption)


def differences(study: Study) -> str:
    """In what our run is not the published one, in words."""
    data, config = study.any["data"], study.config
    machine = study.machine if study.any["env"]["gpu"] else f"{study.machine}, no GPU"
    ways = [f"the model ({study.model})", f"the machine ({machine})", f"the data ({data['n']:,} of {study.task})"]
    if not config["one_at_a_time"]:
        ways.append("batches in place of single tweets")
    if (config["group_size"], config["damp_percent"]) != (128, 0.1):
        ways.append(f"GPTQ with group {config['group_size']} and damping {config['damp_percent']}")
    return ", ".join(ways) + " and the calibration text"


def raw_rows(study: Study) -> list[dict[str, Any]]:
    """One flat row of plain numbers for each variant, with units in the names: what the CSV holds."""
    rows = []
    for name, cell in study.variants.items():
        row: dict[str, Any] = {"variant": name, "cell_id": cell["cell_id"], "n": cell["data"]["n"]}
        for metric, fields in cell["metrics"].items():
            unit = "" if fields["unit"] == "1" else f"_{fields['unit'].replace('1/', 'per_')}"
            row[f"{metric}{unit}"] = fields["value"]
            if fields.get("ci95") is not None:
                row[f"{metric}_low95"], row[f"{metric}_high95"] = fields["ci95"]
        comparison = study.comparisons.get(name)
        if comparison is not None:
            row |= {"difference": comparison["difference"], "mcnemar_exact_p": comparison["exact"]}
            row |= {"mcnemar_mid_p": comparison["mid_p"], "only_base_right": comparison["base_only"]}
            row["only_variant_right"] = comparison["other_only"]
        for phase in ("quantization", "evaluation"):
            found = study.energy(name, phase)
            if found is not None:
                row |= {f"{phase}_kwh": found["kwh"], f"{phase}_kg_co2e": found["kg"]}
            row[f"{phase}_peak_{'device' if study.on_device else 'rss'}_B"] = study.peak(name, phase)
        rows.append(row)
    return rows


def class_rows(study: Study) -> list[dict[str, Any]]:
    """The per-class table with plain numbers, for CSV."""
    return [
        {"variant": name, **row} for name, cell in study.variants.items() for row in cell["classification"]["classes"]
    ]


def all_tables(study: Study) -> list[Table]:
    """The tables of the report in order."""
    found = [quality(study), cost(study), beside_published(study), classes(study)]
    return [table for table in found if table is not None]


def heading(study: Study) -> str:
    return f"{study.model} on {study.task}: what quantization costs"


def energy_note(study: Study) -> str:
    found = (study.energy(name, "evaluation") for name in study.variants)
    return energy_sentence(next((item for item in found if item), None))
