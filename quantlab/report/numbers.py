"""Numbers as tables print them: with their intervals, and a dash for what was not measured."""

from __future__ import annotations

from typing import Any

EN_DASH = "\u2013"
ABSENT = EN_DASH


def number(value: float | None, digits: int = 1) -> str:
    """A number with a fixed number of decimals and thousands apart."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with about `digits` significant digits, without an exponent where it can be read without."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def scaled(value: float | None, factor: float, digits: int = 3) -> str:
    """A number in another unit."""
    return ABSENT if value is None else significant(value * factor, digits)


def times(value: float | None) -> str:
    """A ratio."""
    return ABSENT if value is None else f"{value:.2f}x"


def percent(metric: dict[str, Any] | None) -> str:
    """A share in percent with its 95 % interval in brackets."""
    if metric is None:
        return ABSENT
    text = number(100 * metric["value"])
    if metric.get("ci95") is None:
        return text
    low, high = (number(100 * end) for end in metric["ci95"])
    return f"{text} ({low}{EN_DASH}{high})"


def points(comparison: dict[str, Any] | None) -> str:
    """A difference of accuracies in percentage points with its interval."""
    if comparison is None:
        return ABSENT
    low, high = (f"{100 * end:+.1f}" for end in comparison["ci95"])
    return f"{100 * comparison['difference']:+.1f} ({low} to {high})"


def p_value(comparison: dict[str, Any] | None) -> str:
    """The mid-p value of a paired comparison."""
    if comparison is None:
        return ABSENT
    return "< 0.001" if comparison["mid_p"] < 0.001 else f"{comparison['mid_p']:.3f}"


def spread(metric: dict[str, Any] | None) -> str:
    """A median with the least and the greatest value in brackets."""
    if metric is None:
        return ABSENT
    low, high = (significant(end) for end in metric["range"])
    return f"{significant(metric['value'])} ({low}{EN_DASH}{high})"
