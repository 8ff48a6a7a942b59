"""The studies' statistics against hand values, scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from quantlab.experiments import statistics


def test_wilson_equals_scipy():
    for successes, n in ((0, 10), (10, 10), (1, 3), (64, 100), (8_599, 12_284)):
        interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert statistics.wilson(successes, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="wilson"):
        statistics.wilson(successes, n)


def test_mcnemar_by_hand():
    # 1 against 8 discordant pairs: 2 * (1 + 9) / 2^9; the mid-p value takes the point probability 9 / 2^9 off
    assert statistics.mcnemar(1, 8) == pytest.approx({"exact": 20 / 512, "mid_p": 11 / 512})
    assert statistics.mcnemar(8, 1) == pytest.approx(statistics.mcnemar(1, 8))
    assert statistics.mcnemar(0, 0) == {"exact": 1.0, "mid_p": 1.0}
    assert statistics.mcnemar(2, 2) == pytest.approx({"exact": 1.0, "mid_p": 1 - 3 / 16})
    with pytest.raises(ValueError, match="mcnemar"):
        statistics.mcnemar(-1, 2)


def test_mcnemar_equals_the_binomial_test():
    for base_only, other_only in ((3, 17), (40, 25), (100, 101)):
        exact = stats.binomtest(base_only, base_only + other_only).pvalue
        assert statistics.mcnemar(base_only, other_only)["exact"] == pytest.approx(exact, rel=1e-9)


def test_compare_counts_pairs_on_the_same_examples():
    truth, base, other = [0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 2, 0], [0, 1, 1, 1, 2, 1]
    result = statistics.compare(truth, base, other)
    assert (result["base_only"], result["other_only"], result["n"]) == (1, 1, 6)
    assert result["difference"] == 0 and result["agreement"] == 0.5
    assert result["ci95"][0] < 0 < result["ci95"][1]
    with pytest.raises(ValueError, match="one length"):
        statistics.compare([0, 1], [0], [0, 1])


def test_paired_interval_covers():
    """Bonett and Price's interval covers the true difference in about 95 % of samples."""
    random, n, covered, trials = np.random.default_rng(1), 200, 0, 400
    for _ in range(trials):
        outcome = random.choice(4, size=n, p=(0.6, 0.1, 0.05, 0.25))  # both right, base only, other only, both wrong
        truth = np.zeros(n, int)
        base, other = np.isin(outcome, (2, 3)).astype(int), np.isin(outcome, (1, 3)).astype(int)
        low, high = statistics.compare(truth, base, other)["ci95"]
        covered += low <= -0.05 <= high
    assert 0.91 < covered / trials <= 0.99


def test_macro_measures_equal_sklearn():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, 300), random.integers(0, 4, 300)
    result = statistics.classification(truth, predicted, ["a", "b", "c", "d"])
    metrics = result["metrics"]
    assert metrics["macro_recall"]["value"] == pytest.approx(recall_score(truth, predicted, average="macro"))
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    vectorized = statistics.macro_measures(np.array(result["confusion"]))
    assert vectorized[0] == pytest.approx(metrics["macro_recall"]["value"])
    assert vectorized[1] == pytest.approx(metrics["macro_f1"]["value"])
    assert metrics["accuracy"]["value"] == pytest.approx((truth == predicted).mean())
    assert [row["support"] for row in result["classes"]] == np.bincount(truth).tolist()
    assert np.sum(result["confusion"]) == metrics["accuracy"]["n"] == 300


def test_class_f1_is_the_official_measure_of_irony():
    truth, predicted = [0, 1, 1, 0, 1], [0, 1, 0, 1, 1]
    result = statistics.classification(truth, predicted, ["no", "yes"], official=(1,))
    assert result["official"] == "class_f1"
    assert result["metrics"]["class_f1"]["value"] == pytest.approx(f1_score(truth, predicted))


def test_a_class_without_examples():
    result = statistics.classification([0, 0, 1, 1], [0, 0, 1, 0], ["a", "b", "c"])
    assert result["metrics"]["macro_recall"]["value"] == pytest.approx(0.75)
    assert result["classes"][2]["support"] == 0
    low, high = result["metrics"]["macro_f1"]["ci95"]
    assert 0 <= low <= result["metrics"]["macro_f1"]["value"] <= high <= 1


def test_bootstrap_agrees_with_resampling_the_examples():
    random = np.random.default_rng(3)
    truth = random.integers(0, 3, 250)
    predicted = np.where(random.random(250) < 0.7, truth, random.integers(0, 3, 250))
    confusion = statistics.classification(truth, predicted, ["a", "b", "c"])["confusion"]
    spread = statistics.bootstrap_macro(np.array(confusion))["macro_recall"]
    picks = random.integers(0, 250, (2000, 250))
    values = [recall_score(truth[pick], predicted[pick], average="macro", zero_division=0) for pick in picks[:400]]
    assert spread["stderr"] == pytest.approx(np.std(values), rel=0.15)
    assert spread == statistics.bootstrap_macro(np.array(confusion))["macro_recall"]  # seeded


def test_classification_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one length"):
        statistics.classification([0, 1], [0], ["a", "b"])
    with pytest.raises(ValueError, match="labels outside"):
        statistics.classification([0, 2], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="at least 1"):
        statistics.classification([], [], ["a", "b"])
