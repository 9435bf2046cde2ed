"""The language in which runs are chosen: `status=done val_accuracy>0.7 model.name=whiten_net`.

A query is a list of conditions that must all hold. A condition is `KEY OPERATOR VALUE`, with or without spaces around
the operator, which is one of `=  !=  <  <=  >  >=  ~  !~`.

Keys: run (the directory), name, kind (the experiment), status, data, tags, starred, note, seconds, started, age; any
metric of a summary; any dotted key of a configuration, where `model` stands for `model.name`. A metric hides a key of
the configuration of the same name, which `config.KEY` still names.

Rules:
- `=` compares numbers as numbers, so that `optimizer.lr=1e-3` selects 0.001, and everything else as text. A value that
  is neither number, `true`, `false` nor `null` is text.
- `<  <=  >  >=` compare numbers, of `started` dates and of `age` durations (`2d`, `3h`). Text is never less or greater.
- `~` selects text that contains another, in any case.
- `A|B` is either of two values: `status=done|failed`. A value in quotes is text and may have spaces.
- A run without the key, or with null, is selected by no comparison but `key=null`. `!=` and `!~` select exactly the
  runs that `=` and `~` do not, those without the key included.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from cvlab import registry
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import find, index
from cvlab.runs.index import RunRecord
from cvlab.runs.records import STATES, is_number

SPACE = re.compile(r"\s*")
KEY = re.compile(r"[^\s=!<>~\"'|]+")
OPERATOR = re.compile(r"!=|!~|<=|>=|==|=|<|>|~")
VALUE = re.compile(r"\"([^\"]*)\"|'([^']*)'|([^\s|\"']+)")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\Z", re.IGNORECASE)
AGE = re.compile(r"(\d+\.?\d*)(s|m|h|d|w)\Z")
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
DATES = {"%Y-%m-%d": 86400, "%Y-%m-%dT%H:%M": 60, "%Y-%m-%dT%H:%M:%S": 1}  # format -> the seconds that it covers
ORDERED = ("<", "<=", ">", ">=")
EXPRESSION = re.compile(r"[=<>~]")
MAX_CHARS, MAX_CONDITIONS = 2000, 50
MAX_SELECTED = 100  # runs that are compared with each other
STATUSES = (*STATES, index.DAMAGED, index.NOT_BEGUN)

Getter = Callable[[RunRecord], Any]
TEXT_KEYS: dict[str, Getter] = {
    name: attrgetter(name) for name in ("run", "name", "experiment", "status", "data", "note", "tags", "starred")
}
TEXT_KEYS["kind"] = TEXT_KEYS["experiment"]
NUMBER_KEYS: dict[str, Getter] = {
    "seconds": attrgetter("seconds"),
    "started": attrgetter("started"),
    "age": lambda record: None if record.started is None else time.time() - record.started,
}
BUILTIN_KEYS = TEXT_KEYS | NUMBER_KEYS


@dataclass(frozen=True)
class QueryValue:
    """A value of a query; `low` and `high` are the bounds of a number, which differ for a date only."""

    text: str
    low: float | None = None
    high: float | None = None
    is_null: bool = False


@dataclass(frozen=True)
class Condition:
    """A condition of a query; `column` counts from 1."""

    key: str
    operator: str
    values: tuple[QueryValue, ...]
    column: int


def is_query(text: str) -> bool:
    """Return whether an argument is a query and not the name of a run."""
    return EXPRESSION.search(text) is not None


def parse(text: str) -> list[Condition]:
    """Parse a query; ConfigError with the column of what is wrong."""
    if len(text) > MAX_CHARS:
        raise ConfigError(f"query: longer than {MAX_CHARS} characters", "use fewer conditions")
    conditions: list[Condition] = []
    position = _skip(text, 0)
    while position < len(text):
        start = position
        key = KEY.match(text, position)
        if key is None:
            _fail(position, f"expected a key, got {text[position : position + 10]!r}")
        position = _skip(text, key.end())
        operator = OPERATOR.match(text, position)
        if operator is None:
            _fail(position, f"expected an operator after {key[0]!r}", key[0])
        position = _skip(text, operator.end())
        values, position = _values(text, position, key[0], operator[0])
        conditions.append(Condition(key[0], operator[0].replace("==", "="), values, start + 1))
        if len(conditions) > MAX_CONDITIONS:
            raise ConfigError(f"query: more than {MAX_CONDITIONS} conditions")
        if position < len(text) and not text[position].isspace():
            _fail(position, f"expected a space, got {text[position]!r}")
        position = _skip(text, position)
    return conditions


def _skip(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _fail(position: int, message: str, key: str = "") -> NoReturn:
    example = f"{key}=true" if key == "starred" else f"{key}=VALUE" if key in BUILTIN_KEYS else f"run~{key or 'TEXT'}"
    hint = f"for example {example}" if key else "for example `status=done val_accuracy>0.7`"
    raise ConfigError(f"query, column {position + 1}: {message}", hint)


def _values(text: str, position: int, key: str, operator: str) -> tuple[tuple[QueryValue, ...], int]:
    values = []
    while True:
        match = VALUE.match(text, position)
        if match is None:
            _fail(position, f"expected a value after {operator!r}; quotes have to be closed")
        quoted = match[1] if match[1] is not None else match[2]
        if quoted is None and OPERATOR.search(match[3]):
            _fail(position, f"expected a value, got {match[3]!r}; put a value with an operator in quotes")
        values.append(_query_value(position, key, operator, match[3], quoted))
        position = match.end()
        if text[position : position + 1] != "|":
            return tuple(values), position
        position += 1


def _query_value(position: int, key: str, operator: str, word: str, quoted: str | None) -> QueryValue:
    """Return a value as its key and operator take it, or raise the error that says what they take."""
    expected = _parse_word(key, word) if quoted is None else QueryValue(quoted)
    if key in TEXT_KEYS and operator in ORDERED:
        _fail(position, f"{key} is text, which {operator} does not compare; use = != ~ !~")
    if key == "age" and (operator not in ORDERED or expected.low is None):
        _fail(position, "age is compared by < <= > >= with a duration such as 30m, 12h, 2d or 1w")
    if key == "started" and (expected.low is None or operator in ("~", "!~")) and not expected.is_null:
        _fail(position, "started is compared with a date such as 2026-11-27 or 2026-11-27T09:30, in UTC")
    if operator in ORDERED and expected.low is None:
        _fail(position, f"{operator} compares numbers, and {expected.text!r} is none")
    if key == "starred" and expected.text not in ("true", "false"):
        _fail(position, f"starred is true or false, not {expected.text!r}")
    if key == "status" and operator in ("=", "!=") and expected.text not in STATUSES:
        close = registry.closest_match(expected.text, STATUSES)
        known = f"did you mean {close!r}?" if close else f"known: {', '.join(STATUSES)}"
        _fail(position, f"no status {expected.text!r}; {known}")
    return expected


def _parse_word(key: str, word: str) -> QueryValue:
    """Return a value without quotes, as its key takes it."""
    if key == "age":
        match = AGE.match(word)
        seconds = float(match[1]) * UNIT_SECONDS[match[2]] if match else None
        return QueryValue(word, seconds, seconds)
    if key == "started":
        low, high = _date(word)
        return QueryValue(word, low, high, word == "null")
    number = float(word) if NUMBER.match(word) else None
    return QueryValue(word, number, number, word == "null")


def _date(word: str) -> tuple[float | None, float | None]:
    """Return the first and the last second that a date names."""
    for pattern, seconds in DATES.items():
        try:
            start = datetime.strptime(word, pattern).replace(tzinfo=timezone.utc)
            return start.timestamp(), (start + timedelta(seconds=seconds - 1)).timestamp()
        except (ValueError, OverflowError):
            continue
    return None, None


def plain_text(value: Any) -> str:
    """Return a value as a query compares its text: lists without spaces, `true`, `false`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(plain_text, value)) + "]"
    return str(value)


def holds(value: Any, operator: str, expected: QueryValue) -> bool:
    """Return whether a value fulfills a condition; for `!=` and `!~`, callers negate the result of `=` and `~`."""
    if value is None:
        return operator == "=" and expected.is_null
    if operator == "~":
        parts = value if isinstance(value, list) else [value]
        return any(expected.text.lower() in plain_text(part).lower() for part in parts)
    if operator == "=":
        if is_number(value):
            return expected.low is not None and expected.high is not None and expected.low <= value <= expected.high
        return plain_text(value) == expected.text.replace(" ", "" if isinstance(value, list) else " ")
    if not is_number(value) or expected.low is None or expected.high is None:
        return False
    return bool(
        (operator == "<" and value < expected.low)
        or (operator == "<=" and value <= expected.high)
        or (operator == ">" and value > expected.high)
        or (operator == ">=" and value >= expected.low)
    )


def matches(value: Any, condition: Condition) -> bool:
    """Return whether the value of a run's key, None if it has none, fulfills a condition."""
    operator = condition.operator.removeprefix("!") if condition.operator in ("!=", "!~") else condition.operator
    values = value if condition.key == "tags" and operator == "=" and value else [value]
    if condition.key == "tags" and not value:
        values = [None]
    is_met = any(holds(item, operator, expected) for item in values for expected in condition.values)
    return is_met != (condition.operator in ("!=", "!~"))


def getters(keys: Sequence[str], records: list[RunRecord], root: Path) -> dict[str, Getter]:
    """Return for each key the function that reads it from a record; `records` are loaded with configurations if needed.

    Raises:
        ConfigError: No run has one of the keys; with the nearest one.
    """
    metrics = {name for record in records for name in record.metrics}
    in_config = [key for key in keys if key not in BUILTIN_KEYS and key not in metrics]
    names: set[str] = set()
    if in_config and records:
        if records[0].config is None:
            records[:] = index.load(root, with_config=True)
        names = {name for record in records for name in record.config or ()}
    functions: dict[str, Getter] = {}
    for key in keys:
        short = key.removeprefix("config.")
        if key in BUILTIN_KEYS:
            functions[key] = BUILTIN_KEYS[key]
        elif key in metrics:
            functions[key] = lambda record, key=key: record.metrics.get(key)  # type: ignore[misc]
        else:
            setting = next((name for name in (key, short, f"{short}.name") if name in names), None)
            if setting is None and records:
                known = [*BUILTIN_KEYS, *metrics, *names]
                close = registry.closest_match(key, known)
                hint = (
                    f"did you mean {close!r}?" if close else f"for example {', '.join([*sorted(metrics), *known][:6])}"
                )
                raise ConfigError(f"no run in {root} has the key {key!r}", hint)
            functions[key] = lambda record, name=setting or key: (record.config or {}).get(name)  # type: ignore[misc]
    return functions


def search(root: Path, query: str, other_keys: Iterable[str] = ()) -> tuple[list[RunRecord], dict[str, Getter]]:
    """Return the records of the runs that fulfill a query, oldest first, and a function for each key.

    Args:
        root: The folder of the runs.
        query: The query; empty for all runs.
        other_keys: Further keys to return a function for, for columns and sorting.

    Raises:
        ConfigError: The query is not valid, or no run has one of the keys.
    """
    conditions = parse(query)
    columns = {condition.key: condition.column for condition in reversed(conditions)}
    keys = list(dict.fromkeys([*columns, *other_keys]))
    records = index.load(root, with_config=any("." in key for key in keys))
    try:
        functions = getters(keys, records, root)
    except ConfigError as error:
        column = next((f"query, column {c}: " for key, c in columns.items() if f"{key!r}" in error.message), "")
        raise ConfigError(f"{column}{error.message}", error.hint) from None
    selected = [
        record
        for record in records
        if all(matches(functions[condition.key](record), condition) for condition in conditions)
    ]
    return selected, functions


def select(arguments: Sequence[str], root: Path, limit: int | None = None) -> list[Path]:
    """Return the run directories that arguments name: names, paths, `latest`, and queries.

    Args:
        arguments: Each a reference that `find.find_run` takes, or a query.
        root: The folder of the runs.
        limit: Maximum number of runs that queries may select; None for any number.

    Raises:
        RunDirError: An argument names no run.
        ConfigError: A query is not valid, or selects more than `limit` runs.
    """
    paths: dict[Path, None] = {}
    for argument in arguments:
        if not is_query(argument) or Path(argument).exists():
            paths[find.find_run(argument, root)] = None
            continue
        selected = search(root, argument)[0]
        if not selected:
            raise RunDirError(f"no run in {root} fulfills {argument!r}", "`cvlab runs` lists all")
        if limit is not None and len(selected) > limit:
            raise ConfigError(f"{len(selected)} runs fulfill {argument!r}, at most {limit} can be used", "add age<2d")
        paths |= dict.fromkeys((root / record.run).resolve() for record in selected)
    return list(paths)
