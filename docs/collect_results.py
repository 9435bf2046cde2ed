"""Write the results of runs to `docs/results/EXPERIMENT.json`, from which the tables of the documentation are made.

    python docs/collect_results.py runs/* [--note "beside other work"]       # then: python docs/generate.py

Each run that ended is read from its directory: `config.yaml`, `env.json`, `summary.json`. Runs of one command that
differ only in their seed become one row with mean and standard deviation. A row replaces the one of the same command.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cvlab.runs.records import ENDED, is_run, read_json, read_status, read_summary

RESULTS = Path(__file__).parent / "results"
FLAGS = ("-q", "--quiet", "-v", "--verbose", "--json", "--offline", "--fresh")  # do not change the result
FLAGS_WITH_VALUE = ("--seed", "--runs-dir")
DIGITS = 5
MAX_KEYS = 4
Row = dict[str, Any]


def plain_command(recorded: str) -> str:
    """Return a recorded command line without seed, output flags, absolute paths and number of threads.

    The number of threads is part of the description of the machine.
    """
    arguments = iter(shlex.split(recorded))
    kept_arguments = []
    for argument in arguments:
        if argument in FLAGS_WITH_VALUE:
            next(arguments, None)
        elif argument not in FLAGS and not argument.startswith(
            ("threads=", *(f"{flag}=" for flag in FLAGS_WITH_VALUE))
        ):
            kept_arguments.append(Path(argument).name if argument.startswith("/") else argument)
    return shlex.join(kept_arguments)


def machine(env: Mapping[str, Any]) -> str:
    """Describe the machine of a run, without the name of the host."""
    cores = f"{env['cpu_count']} CPU cores ({env['cpu_capability']})"
    device = f"{env['cuda_device']}, {cores}" if env.get("cuda_device") else cores
    processes = f", {env['processes']} processes" if env.get("processes", 1) > 1 else ""
    threads = f"{env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    return f"{device}, {threads}{processes}, torch {env['torch']}"


def read_run(path: Path) -> Row | None:
    """Read the values of a row from a run directory; None if the run has not ended."""
    if not is_run(path) or read_status(path).get("status") not in ENDED:
        return None
    summary, env = read_summary(path), read_json(path / "env.json")
    config = yaml.safe_load((path / "config.yaml").read_text())
    return {
        "experiment": summary["experiment"],
        "command": plain_command(env["command"]),
        "data": summary.get("data"),
        "seed": config.get("seed"),
        "config_seeds": config.get("seeds") or [],
        "time": env["time"],
        "machine": machine(env),
        "commit": env["git_commit"] or "",
        "seconds": summary.get("seconds"),
        "met": all(verdict["met"] for verdict in summary["expect"]),
        "metrics": {name: value for name, value in summary["metrics"].items() if isinstance(value, (int, float))},
        "settings": summary.get("settings") or [],
    }


def statistic(values: Sequence[float]) -> Row:
    """Return mean and standard deviation of a metric over seeds; the deviation is null for one value."""
    spread = round(statistics.stdev(values), DIGITS) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), DIGITS), "sd": spread}


def row_of(runs: Sequence[Row]) -> Row:
    """Return the row of the runs of one command, the newest run of each seed."""
    by_seed = {run["seed"]: run for run in sorted(runs, key=lambda run: str(run["time"]))}
    newest_runs = list(by_seed.values())
    newest = newest_runs[-1]
    for key in ("machine", "commit", "data"):
        if len({run[key] for run in newest_runs}) > 1:
            raise SystemExit(f"{newest['command']}: its runs differ in {key}; give runs that agree")
    names = [name for name in newest["metrics"] if all(name in run["metrics"] for run in newest_runs)]
    return {
        "command": newest["command"],
        "data": newest["data"],
        "seeds": sorted(by_seed) if None not in by_seed else newest["config_seeds"],
        "metrics": {name: statistic([run["metrics"][name] for run in newest_runs]) for name in names},
        "met": all(run["met"] for run in newest_runs),
        "seconds": round(statistics.median(run["seconds"] for run in newest_runs), 1),
        "machine": newest["machine"],
        "date": newest["time"][:10],
        "commit": newest["commit"],
    }


def setting_rows(row: Row, settings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return one row for each setting of a sweep."""
    rows = []
    for setting in settings:
        metrics = {
            name: {"mean": round(value["mean"], DIGITS), "sd": value["sd"] and round(value["sd"], DIGITS)}
            for name, value in setting["metrics"].items()
        }
        rows.append(row | {"setting": setting_text(setting["keys"], settings[0]["keys"]), "metrics": metrics})
    return rows


def setting_text(keys: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Return the keys of a setting as overrides; of more than MAX_KEYS, only those that differ from the first setting.

    For the first setting itself, these are the keys that are not off.
    """
    is_first = keys == first
    displayed = keys
    if len(keys) > MAX_KEYS:
        displayed = {key: value for key, value in keys.items() if value and (is_first or value != first.get(key))}
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in displayed.items()) or f"all {len(keys)} keys off"


def rows_by_experiment(runs: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of runs, by experiment."""

    def key(run: Row) -> tuple[str, str]:
        return run["experiment"], run["command"]

    tables: dict[str, list[Row]] = {}
    for (experiment, _), group in itertools.groupby(sorted(runs, key=key), key):
        members = list(group)
        row = row_of(members)
        rows = setting_rows(row, members[-1]["settings"]) if members[-1]["settings"] else [row]
        tables.setdefault(experiment, []).extend(rows)
    return tables


def merge(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a file of results; rows of other commands do not change."""
    commands = {row["command"] for row in rows}
    previous = json.loads(path.read_text()) if path.is_file() else []
    merged = [row for row in previous if row["command"] not in commands] + list(rows)
    merged.sort(key=lambda row: str(row["command"]))  # stable: the settings of a sweep keep their order
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in merged) + "\n]\n")


def run(arguments: list[str]) -> int:
    """Collect the results of run directories; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the results of runs to docs/results/EXPERIMENT.json.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; others are skipped")
    parser.add_argument("--note", default="", help="added to the machine, for example 'beside other work'")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the files; default: docs/results")
    options = parser.parse_args(arguments)
    paths = sorted({path.resolve() for path in options.runs if path.is_dir()})
    rows_by_path = [(path, read_run(path)) for path in paths]
    for path in (path for path, row in rows_by_path if row is None):
        print(f"skipped {path.name}: not a run that has ended")
    note = f", {options.note}" if options.note else ""
    ended = [row | {"machine": row["machine"] + note} for _, row in rows_by_path if row is not None]
    for experiment, rows in rows_by_experiment(ended).items():
        merge(options.into / f"{experiment}.json", rows)
        print(f"{experiment}.json: {', '.join(sorted({row['command'] for row in rows}))}")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
