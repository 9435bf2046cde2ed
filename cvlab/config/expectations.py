"""Expectations: rules over metrics that are checked at the end of a run or a sweep.

For a run: `train_accuracy >= 0.85`, `val_loss < train_loss`. For a sweep, functions over its settings (a setting is the
mean over the seeds of one configuration), which keys of the configuration narrow down:

    spread(val_accuracy, model.batchnorm=true) < spread(val_accuracy, model.batchnorm=false)
    mean(val_accuracy, optimizer.name=adam) > 0.3
    increasing(train_accuracy, optimizer.lr)
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvlab.config import strict_yaml
from cvlab.errors import ConfigError

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
COMPARISON = re.compile(r"(>=|<=|==|>|<)")
METRIC = re.compile(r"[A-Za-z_][\w.@-]*(/.*)?\Z")  # what follows the slash is the name of a class
CALL = re.compile(r"([a-z]+)\((.*)\)\Z", re.DOTALL)
Numbers = Sequence[float]


def _mean(values: Numbers) -> float:
    return sum(values) / len(values)


REDUCTIONS: dict[str, Callable[[Numbers], float]] = {
    "mean": _mean,
    "min": min,
    "max": max,
    "spread": lambda values: max(values) - min(values),
}
ORDERS = {"increasing": operator.lt, "decreasing": operator.gt}
SHARES = ("share", "diverged")
FUNCTIONS = (*REDUCTIONS, *ORDERS, *SHARES)


@dataclass(frozen=True)
class GroupedResult:
    """One setting of a sweep: dotted keys, mean metrics over seeds, and the share of trials that diverged."""

    keys: Mapping[str, Any]
    metrics: Mapping[str, float]
    diverged: float = 0.0


@dataclass(frozen=True)
class Term:
    """One side of a comparison: a number, a metric, or a function over the settings of a sweep."""

    text: str
    function: str | None = None
    metric: str = ""
    by: str = ""
    condition: "tuple[str, float] | None" = None
    filters: tuple[tuple[str, Any], ...] = ()

    def value(self, metrics: Mapping[str, float], settings: Sequence[GroupedResult]) -> float | None:
        """Return the value of this side; None if it was not measured."""
        if self.function is None:
            return _number(self.text) if self.metric == "" else metrics.get(self.metric)
        matching = [setting for setting in settings if self._matches(setting)]
        if not matching:
            return None
        if self.function == "diverged":
            return _mean([setting.diverged for setting in matching])
        measured = [setting.metrics.get(self.metric) for setting in matching]
        if self.condition is not None:
            compare, bound = OPERATORS[self.condition[0]], self.condition[1]
            return _mean([float(value is not None and compare(value, bound)) for value in measured])
        values = [value for value in measured if value is not None and math.isfinite(value)]
        if len(values) < len(measured):
            return None
        if self.function in ORDERS:
            return self._is_ordered(matching, values)
        return REDUCTIONS[self.function](values)

    def _matches(self, setting: GroupedResult) -> bool:
        return all(key in setting.keys and values_equal(setting.keys[key], value) for key, value in self.filters)

    def _is_ordered(self, settings: Sequence[GroupedResult], values: Numbers) -> float | None:
        keys = [setting.keys.get(self.by) for setting in settings]
        if len(settings) < 2 or not all(isinstance(x, (int, float)) for x in keys) or len(set(keys)) < len(keys):
            return None  # they have no order
        ranked = [value for _, value in sorted(zip(keys, values, strict=True))]
        precedes = ORDERS[self.function or ""]
        return float(all(precedes(a, b) for a, b in itertools.pairwise(ranked)))


@dataclass(frozen=True)
class Rule:
    """Terms with comparisons between them; `increasing(...)` and `decreasing(...)` stand alone."""

    terms: tuple[Term, ...]
    operators: tuple[str, ...]

    def holds(self, values: Sequence[float | None]) -> bool:
        """Return whether the values of the terms satisfy the rule; missing values and NaN never do."""
        if any(value is None or value != value for value in values):
            return False
        numbers = [value for value in values if value is not None]
        if not self.operators:
            return bool(numbers[0])
        comparisons = zip(self.operators, numbers, numbers[1:], strict=False)
        return all(OPERATORS[op](a, b) for op, a, b in comparisons)


def values_equal(a: Any, b: Any) -> bool:
    """Return whether two configured values are equal; a list equals a tuple, a bool is no number."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(values_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse(text: str) -> Rule:
    """Parse one rule.

    Raises:
        ValueError: with the form of a rule, if it is malformed.
    """
    parts = _split(text, COMPARISON)
    rule = Rule(tuple(_term(part.strip(), text) for part in parts[::2]), tuple(parts[1::2]))
    is_single = len(rule.terms) == 1
    has_order = any(term.function in ORDERS for term in rule.terms)
    if is_single != has_order:
        raise _malformed(text)
    if all(term.function is None and not term.metric for term in rule.terms):
        raise _malformed(text)
    return rule


def _malformed(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not of the form `metric >= number` (also >, <, <=, ==; "
        f"over a sweep {', '.join(FUNCTIONS)} as in `mean(val_accuracy, optimizer.name=adam) > 0.3`)"
    )


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at matches outside brackets; the matches are kept in the list."""
    parts, start, depth, position = [], 0, 0, 0
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        match = separator.match(text, position) if depth == 0 else None
        if match:
            parts += [text[start:position], match.group()]
            start = position = match.end()
        else:
            position += 1
    return [*parts, text[start:]]


def _term(text: str, whole: str) -> Term:
    if _number(text) is not None:
        return Term(text)
    call = CALL.match(text)
    if call is not None:
        return _call(call[1], [part.strip() for part in _split(call[2], re.compile(","))[::2]], text, whole)
    if not METRIC.match(text):
        raise _malformed(whole)
    return Term(text, metric=text)


def _call(name: str, arguments: list[str], text: str, whole: str) -> Term:
    if name not in FUNCTIONS:
        raise ValueError(f"{whole!r}: unknown function {name!r}; known: {', '.join(FUNCTIONS)}")
    term: dict[str, Any] = {}
    if name == "share":
        parts = [part.strip() for part in _split(arguments.pop(0), COMPARISON)]
        if len(parts) != 3 or _number(parts[2]) is None:
            raise ValueError(f"{whole!r}: share takes a condition, as in `share(val_accuracy > 0.2) <= 0.5`")
        term = {"metric": parts[0], "condition": (parts[1], float(parts[2]))}
    elif name != "diverged":
        term = {"metric": arguments.pop(0)}
    if name in ORDERS:
        if not arguments or "=" in arguments[0]:
            raise ValueError(f"{whole!r}: {name} takes a metric and a key, as in `{name}(val_accuracy, optimizer.lr)`")
        term["by"] = arguments.pop(0)
    if not METRIC.match(term.get("metric", "x")):
        raise _malformed(whole)
    return Term(text, name, filters=tuple(_filter(part, whole) for part in arguments if part), **term)


def _filter(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not METRIC.match(key.strip()):
        raise ValueError(f"{whole!r}: {text!r} is not of the form key=value")
    try:
        return key.strip(), strict_yaml.parse(value.strip(), whole).value
    except ConfigError as error:
        raise ValueError(str(error)) from None


def check_expectations(
    rules: Iterable[str], metrics: Mapping[str, float], settings: Sequence[GroupedResult] = ()
) -> list[dict[str, Any]]:
    """Return a verdict for each rule: `{"rule", "measured", "met"}`.

    `measured` is the value of the left side; if several sides are measured, `values` has all of them. A rule on a
    missing metric is not met.
    """
    verdicts = []
    for text in rules:
        rule = parse(text)
        values = [term.value(metrics, settings) for term in rule.terms]
        verdict: dict[str, Any] = {"rule": text, "measured": values[0], "met": rule.holds(values)}
        if sum(bool(term.function or term.metric) for term in rule.terms) > 1:
            verdict["values"] = values
        verdicts.append(verdict)
    return verdicts
