"""Statistics of the studies: classification metrics, intervals, and the paired test between two variants on the same
examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927), both ends in [0, 1]."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: successes {successes} of n {n}: expected 0 <= successes <= n and n >= 1")
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * (p * (1 - p) / n + Z95**2 / (4 * n**2)) ** 0.5
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def macro_measures(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Macro-averaged recall and F1 of confusion matrices (..., C, C), truth in rows; each (...).

    A class that a resample lacks counts as scikit-learn counts it: recall leaves it out, F1 takes it as 0 when it was
    predicted.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    support, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    size = support + predicted
    f1 = np.divide(2 * hits, size, out=np.zeros_like(hits), where=size > 0)
    present, seen = (support > 0).sum(axis=-1), (size > 0).sum(axis=-1)
    return recall.sum(axis=-1) / np.maximum(present, 1), f1.sum(axis=-1) / np.maximum(seen, 1)


def class_f1(confusion: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Mean F1 of some classes of confusion matrices (..., C, C): TweetEval's measure of irony (class 1) and stance (1
    and 2).
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)[..., list(classes)].astype(np.float64)
    size = (confusion.sum(axis=-1) + confusion.sum(axis=-2))[..., list(classes)]
    return np.divide(2 * hits, size, out=np.zeros_like(hits), where=size > 0).mean(axis=-1)


def bootstrap_macro(
    confusion: np.ndarray, classes: Sequence[int] | None = None, resamples: int = 10_000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Percentile bootstrap of macro-recall, macro-F1 and, if `classes` are given, their mean F1: {name: {stderr,
    ci95}}.

    Both depend on the examples through the confusion matrix alone, so resampling n examples with replacement is
    drawing the matrix from a multinomial distribution: exact, and vectorized over the resamples.
    """
    counts = np.asarray(confusion)
    n = int(counts.sum())
    draws = (
        np.random.default_rng(seed).multinomial(n, counts.ravel() / n, size=resamples).reshape(resamples, *counts.shape)
    )
    measures = dict(zip(("macro_recall", "macro_f1"), macro_measures(draws), strict=True))
    if classes is not None:
        measures["class_f1"] = class_f1(draws, classes)
    result = {}
    for name, values in measures.items():
        low, high = np.percentile(values, [2.5, 97.5])
        result[name] = {"stderr": float(values.std(ddof=1)), "ci95": [float(low), float(high)]}
    return result


def classification(
    truth: ArrayLike,
    predicted: ArrayLike,
    names: Sequence[str],
    official: str | Sequence[int] = "macro_f1",
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, macro-recall and macro-F1 with intervals, the per-class table and the confusion matrix, by
    scikit-learn.

    official: the task's own measure: a metric's name, or the classes whose F1 is averaged (then the metric
    "class_f1"). Returns {"metrics": {name: {value, stderr, ci95, n, unit, higher_is_better}}, "classes": [...],
    "confusion": (C, C) with truth in rows, "official": name}.
    """
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        precision_recall_fscore_support,
        recall_score,
    )

    from .record import metric

    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1 or truth.size == 0:
        raise ValueError(
            f"classification: truth {truth.shape} and predicted {predicted.shape} must be one length, at least 1"
        )
    labels, n = np.arange(len(names)), int(truth.size)
    if not (np.isin(truth, labels).all() and np.isin(predicted, labels).all()):
        raise ValueError(f"classification: labels outside 0..{len(names) - 1}")
    confusion = confusion_matrix(truth, predicted, labels=labels)
    present = labels[confusion.sum(axis=1) > 0]  # the resamples' rule: a class without examples has no recall
    seen = labels[confusion.sum(axis=0) + confusion.sum(axis=1) > 0]
    classes = None if isinstance(official, str) else list(official)
    spread = bootstrap_macro(confusion, classes, seed=seed)
    accuracy = float(accuracy_score(truth, predicted))
    values = {
        "macro_recall": recall_score(truth, predicted, labels=present, average="macro", zero_division=0),
        "macro_f1": f1_score(truth, predicted, labels=seen, average="macro", zero_division=0),
    }
    if classes is not None:
        values["class_f1"] = f1_score(truth, predicted, labels=classes, average="macro", zero_division=0)
    measures = {
        "accuracy": metric(
            accuracy,
            "1",
            n,
            True,
            wilson(int(np.trace(confusion)), n),
            (accuracy * (1 - accuracy) / n) ** 0.5,
            interval="Wilson",
        ),
        **{name: metric(value, "1", n, True, interval="bootstrap", **spread[name]) for name, value in values.items()},
    }
    columns = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    table = [dict(zip(("label", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows]
    return {
        "metrics": measures,
        "classes": table,
        "confusion": confusion.tolist(),
        "official": "class_f1" if classes is not None else official,
    }


def mcnemar(base_only: int, other_only: int) -> dict[str, float]:
    """McNemar's test on the discordant pairs: {"exact", "mid_p"}, two-sided (Fagerland, Lydersen and Laake 2013).

    Args:
        base_only: examples that only the base gets right.
        other_only: examples that only the other variant gets right.
    """
    from scipy.special import bdtr  # scipy.stats takes a second to import

    discordant, smaller = base_only + other_only, min(base_only, other_only)
    if smaller < 0:
        raise ValueError(f"mcnemar: counts must be >= 0, got {base_only} and {other_only}")
    if discordant == 0:
        return {"exact": 1.0, "mid_p": 1.0}
    tail, point = 2 * float(bdtr(smaller, discordant, 0.5)), math.comb(discordant, smaller) / 2**discordant
    mid = 1 - point / 2 if base_only == other_only else tail - point
    return {"exact": min(1.0, tail), "mid_p": mid}


def compare(truth: ArrayLike, base: ArrayLike, other: ArrayLike) -> dict[str, Any]:
    """How the accuracy of `other` differs from `base` on the same examples, in [-1, 1], with a paired test.

    The interval is Bonett and Price's (2012) adjusted Wald interval for paired proportions.
    """
    truth, base, other = np.asarray(truth), np.asarray(base), np.asarray(other)
    if not truth.shape == base.shape == other.shape or truth.ndim != 1 or truth.size == 0:
        raise ValueError(
            f"compare: truth {truth.shape}, base {base.shape} and other {other.shape} must be one length, at least 1"
        )
    n = int(truth.size)
    base_only = int(((base == truth) & (other != truth)).sum())
    other_only = int(((base != truth) & (other == truth)).sum())
    gain, loss = (other_only + 1) / (n + 2), (base_only + 1) / (n + 2)
    half = Z95 * ((gain + loss - (gain - loss) ** 2) / (n + 2)) ** 0.5
    ends = [max(-1.0, gain - loss - half), min(1.0, gain - loss + half)]
    counts = {"n": n, "base_only": base_only, "other_only": other_only, "agreement": float((base == other).mean())}
    return {"difference": (other_only - base_only) / n, "ci95": ends, **mcnemar(base_only, other_only), **counts}


def mean_loss(sums: ArrayLike, tokens: ArrayLike) -> tuple[float, float | None, list[float] | None]:
    """Mean loss a token over rows, its standard error and its 95 % interval; the two are None for a single row.

    sums, tokens: of each row, (n,). Rows are the sample: tokens of one row are not independent. The error is that of a
    ratio estimator (Cochran 1977, 2.11), the interval Student's. For the paired difference of two models on the same
    rows, give the differences of their sums.
    """
    from scipy.special import stdtrit

    loss, count = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    if loss.shape != count.shape or loss.ndim != 1 or count.sum() <= 0:
        raise ValueError(
            f"mean_loss: sums {loss.shape} and tokens {count.shape} must be one length, with tokens in all"
        )
    n, mean = loss.size, float(loss.sum() / count.sum())
    if n == 1:
        return mean, None, None
    stderr = float(np.sqrt(n / (n - 1) * np.square(loss - mean * count).sum()) / count.sum())
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return mean, stderr, [mean - half, mean + half]
