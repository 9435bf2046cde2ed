"""What must hold at the end of a run or a sweep, parsed once, judged against what was measured.

Over a run: `train_accuracy >= 0.85`, `val_loss < train_loss`. Over a sweep, functions of its settings (an arm, or the
mean of the arms that differ in the seed only), each narrowed by keys of the configuration:

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
METRIC = re.compile(r"[A-Za-z_][\w/.@-]*\Z")
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
    """One point of a sweep: its configuration with dotted keys, its metrics (means over seeds), its share diverged."""

    keys: Mapping[str, Any]
    metrics: Mapping[str, float]
    diverged: float = 0.0


@dataclass(frozen=True)
class Term:
    """One side of a comparison: a number, a metric of a run, or a function of a sweep's settings."""

    text: str
    function: str | None = None
    metric: str = ""
    by: str = ""
    condition: "tuple[str, float] | None" = None
    where: tuple[tuple[str, Any], ...] = ()

    def value(self, metrics: Mapping[str, float], settings: Sequence[GroupedResult]) -> float | None:
        """Return the number that this side is; None where it was not measured."""
        if self.function is None:
            return _number(self.text) if self.metric == "" else metrics.get(self.metric)
        chosen = [setting for setting in settings if self._fits(setting)]
        if not chosen:
            return None
        if self.function == "diverged":
            return _mean([setting.diverged for setting in chosen])
        found = [setting.metrics.get(self.metric) for setting in chosen]
        if self.condition is not None:
            holds, bound = OPERATORS[self.condition[0]], self.condition[1]
            return _mean([float(value is not None and holds(value, bound)) for value in found])
        values = [value for value in found if value is not None and math.isfinite(value)]
        if len(values) < len(found):
            return None
        if self.function in ORDERS:
            return self._ordered(chosen, values)
        return REDUCTIONS[self.function](values)

    def _fits(self, setting: GroupedResult) -> bool:
        return all(key in setting.keys and same(setting.keys[key], wanted) for key, wanted in self.where)

    def _ordered(self, chosen: Sequence[GroupedResult], values: Numbers) -> float | None:
        places = [setting.keys.get(self.by) for setting in chosen]
        if len(chosen) < 2 or not all(isinstance(x, (int, float)) for x in places) or len(set(places)) < len(places):
            return None  # no order among them
        ranked = [value for _, value in sorted(zip(places, values, strict=True))]
        before = ORDERS[self.function or ""]
        return float(all(before(a, b) for a, b in itertools.pairwise(ranked)))


@dataclass(frozen=True)
class Rule:
    """Terms with comparisons between them; `increasing(...)` and `decreasing(...)` stand alone."""

    terms: tuple[Term, ...]
    operators: tuple[str, ...]

    @property
    def over_sweep(self) -> bool:
        """Whether the rule speaks of a sweep's settings."""
        return any(term.function for term in self.terms)

    def holds(self, values: Sequence[float | None]) -> bool:
        """Whether the values of the terms meet the rule; what is absent or nan meets none."""
        if any(value is None or value != value for value in values):
            return False
        numbers = [value for value in values if value is not None]
        if not self.operators:
            return bool(numbers[0])
        steps = zip(self.operators, numbers, numbers[1:], strict=False)
        return all(OPERATORS[op](a, b) for op, a, b in steps)


def same(a: Any, b: Any) -> bool:
    """Whether a configured value is the one that a rule names."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse(text: str) -> Rule:
    """Read one rule; ValueError that says how a rule looks."""
    parts = _split(text, COMPARISON)
    rule = Rule(tuple(_term(part.strip(), text) for part in parts[::2]), tuple(parts[1::2]))
    alone = len(rule.terms) == 1
    if alone != (rule.terms[0].function in ORDERS) or (not alone and any(t.function in ORDERS for t in rule.terms)):
        raise _malformed(text)
    if all(term.function is None and not term.metric for term in rule.terms):
        raise _malformed(text)
    return rule


def _malformed(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not of the form `metric >= number` (also >, <, <=, ==; "
        f"over a sweep {', '.join(FUNCTIONS)} as in `mean(val_accuracy, optimizer.name=adam) > 0.3`)"
    )


def _split(text: str, at: re.Pattern[str]) -> list[str]:
    """Split at matches outside brackets; the matches stay in the list."""
    parts, start, depth, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        found = at.match(text, place) if depth == 0 else None
        if found:
            parts += [text[start:place], found.group()]
            start = place = found.end()
        else:
            place += 1
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
    return Term(text, name, where=tuple(_where(part, whole) for part in arguments if part), **term)


def _where(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not METRIC.match(key.strip()):
        raise ValueError(f"{whole!r}: {text!r} is not of the form key=value")
    try:
        return key.strip(), strict_yaml.parse(value.strip(), whole).value
    except ConfigError as error:
        raise ValueError(str(error)) from None


def metrics_of(text: str) -> set[str]:
    """Return the metrics that a rule speaks of."""
    return {term.metric for term in parse(text).terms if term.metric}


def check_expectations(
    rules: Iterable[str], metrics: Mapping[str, float], settings: Sequence[GroupedResult] = ()
) -> list[dict[str, Any]]:
    """Return a verdict for each rule: `{"rule", "measured", "met"}`; what is absent is not met.

    `measured` is the left side. Where more than one side was measured, `values` has all of them.
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
