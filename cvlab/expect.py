"""What must hold at the end of a run: `train_accuracy >= 0.85`, parsed once, judged against the metrics."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
RULE = re.compile(r"\s*([A-Za-z_][\w/.@-]*)\s*(>=|<=|==|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*\Z")


@dataclass(frozen=True)
class Rule:
    """`metric op bound`, for example `val_accuracy >= 0.5`."""

    metric: str
    op: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether `value` meets the rule; nan meets none."""
        return OPERATORS[self.op](value, self.bound)


def parse(text: str) -> Rule:
    """Read one rule; ValueError that says how a rule looks."""
    match = RULE.match(text)
    try:
        if match is None:
            raise ValueError
        return Rule(match[1], match[2], float(match[3]))
    except ValueError:
        raise ValueError(f"{text!r} is not of the form `metric >= number` (also >, <, <=, ==)") from None


def judge(rules: Iterable[str], metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a verdict for each rule: `{"rule", "measured", "met"}`; a metric that is absent is not met."""
    verdicts = []
    for text in rules:
        rule = parse(text)
        measured = metrics.get(rule.metric)
        met = measured is not None and rule.holds(measured)
        verdicts.append({"rule": text, "measured": measured, "met": met})
    return verdicts
