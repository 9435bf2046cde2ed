"""`cvlab bench compare`: the steps of two measurements, and their ratios."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlab.errors import DataError

HINT = "`cvlab bench --out FILE.json` writes one"
NUMBERS = ("step_seconds", "items", "share")
MACHINE = {  # what two measurements should have in common
    "host": "host",
    "cpu": "processor",
    "gpu": "GPU",
    "threads": "threads",
    "torch": "torch",
}


def read(path: Path) -> dict[str, Any]:
    """Read the result of `cvlab bench`.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", HINT) from error
    except ValueError as error:  # also text that is not UTF-8
        raise DataError(f"{path}: not JSON: {error}", HINT) from error
    if not _is_measurement(document):
        raise DataError(f"{path}: not a result of `cvlab bench`", HINT)
    result: dict[str, Any] = document
    return result


def _is_measurement(document: Any) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("machine"), dict):
        return False
    rows = document.get("rows")
    return isinstance(rows, list) and all(_is_row(row) for row in rows)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in ("config", "phase", "precision"))
        and all(isinstance(row.get(key), (int, float)) and row[key] > 0 for key in NUMBERS)
    )


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare two results of `cvlab bench`.

    Returns:
        `rows`: the steps that both have, with `ratio`, the time for an item of the second divided by that of the first;
        `only_a`, `only_b`: the steps that one of them has; `differences`: what differs between the machines, by name,
        the value of each; `rates`: the machine's rates of the second divided by those of the first.
    """
    first, second = read(a), read(b)
    rows_a, rows_b = _by_step(first), _by_step(second)
    rows = []
    for key in rows_a.keys() & rows_b.keys():
        row_a, row_b = rows_a[key], rows_b[key]
        seconds = [row["step_seconds"] / row["items"] for row in (row_a, row_b)]
        rows.append(
            {
                "config": key[0],
                "phase": key[1],
                **{f"{name}_a": row_a[name] for name in (*NUMBERS, "precision")},
                **{f"{name}_b": row_b[name] for name in (*NUMBERS, "precision")},
                "ratio": seconds[1] / seconds[0],
            }
        )
    machines = first["machine"], second["machine"]
    return {
        "ok": True,
        "a": str(a),
        "b": str(b),
        "differences": {
            label: [machine.get(key) for machine in machines]
            for key, label in MACHINE.items()
            if machines[0].get(key) != machines[1].get(key)
        },
        "rates": _rate_ratios(*machines),
        "rows": sorted(rows, key=lambda row: (row["config"], row["phase"])),
        "only_a": sorted(" ".join(key).strip() for key in rows_a.keys() - rows_b.keys()),
        "only_b": sorted(" ".join(key).strip() for key in rows_b.keys() - rows_a.keys()),
    }


def _by_step(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["config"], row["phase"]): row for row in document["rows"]}


def _rate_ratios(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """Return the rates of `b` divided by those of `a`, of those that both have."""
    rates = []
    for machine in (a, b):
        products = machine.get("product_gflops")
        named = {f"products, {name}": rate for name, rate in products.items()} if isinstance(products, dict) else {}
        rates.append(named | {"copies": machine.get("copy_gb_per_second")})
    numbers = [{name: rate for name, rate in each.items() if isinstance(rate, (int, float)) and rate} for each in rates]
    return {name: numbers[1][name] / rate for name, rate in numbers[0].items() if name in numbers[1]}
