"""What summary.json of a run may hold, so that its readers need not ask again."""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]


def wrong(summary: dict[str, Any]) -> str | None:
    """Return the key of a summary that is not what it should be; None where all are, or are not there."""
    return next((key for key, fits in CHECKS.items() if key in summary and not fits(summary[key])), None)


def _number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _all(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _block(**keys: Check) -> Check:
    """Accept a block whose `keys` fit where they are there."""
    return lambda value: isinstance(value, dict) and all(fits(value[key]) for key, fits in keys.items() if key in value)


def _with(*keys: str) -> Check:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _both(*checks: Check) -> Check:
    return lambda value: all(check(value) for check in checks)


def _verdict(value: Any) -> bool:
    fits = _block(rule=_text, measured=_plain, values=_all(_plain))
    return _with("rule", "met", "measured")(value) and fits(value) and isinstance(value["met"], bool)


def _plain(value: Any) -> bool:
    return _number(value) or isinstance(value, (str, bool))


def _setting(value: Any) -> bool:
    spread = _both(_with("mean", "sd"), _block(mean=_real, sd=_number, n=_number))
    fits = _block(
        arms=_number, status=_all(lambda word: isinstance(word, str)), keys=lambda keys: isinstance(keys, dict)
    )
    if not (_with("keys", "arms", "status", "metrics")(value) and fits(value)):
        return False
    return isinstance(value["metrics"], dict) and all(map(spread, value["metrics"].values()))


def _real(value: Any) -> bool:
    return value is not None and _number(value)


def _found(value: Any) -> bool:
    return _both(_with("label", "score"), _block(label=_word, score=_real))(value)


def _word(value: Any) -> bool:
    return isinstance(value, str)


def _result(value: Any) -> bool:
    top = _all(lambda one: isinstance(one, dict) and ("label" not in one or _found(one)))
    fits = _block(
        image=_word, error=_word, sentence=_word, objects=_all(_found), before=_found, predicted=_found, top=top
    )
    return _with("image")(value) and fits(value) and ("label" not in value or _found(value))


CHECKS: dict[str, Check] = {
    "metrics": lambda value: isinstance(value, dict) and all(map(_plain, value.values())),
    "expect": _all(_verdict),
    "results": _all(_result),
    "settings": _all(_setting),
    "seconds": _number,
    "experiment": _text,
    "data": _text,
}
