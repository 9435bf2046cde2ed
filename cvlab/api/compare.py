"""`cvlab compare --out`: write a comparison of runs to files."""

import json
from collections.abc import Mapping
from pathlib import Path

from cvlab.api.catalog import Row
from cvlab.reports import compare as comparing
from cvlab.runs.records import to_json_value
from cvlab.storage import atomic


def write_comparison(comparison: Row, runs: Mapping[str, Path], folder: Path) -> list[str]:
    """Write compare.csv, compare.json and compare.png.

    Args:
        comparison: What `reports.compare.compare` returns.
        runs: Run directories by label.
        folder: Where to write; created if it does not exist.

    Returns:
        The paths of the files.

    Raises:
        RunDirError: The folder cannot be written.
    """
    from cvlab.reports import plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.disk_error(folder, error, "name a folder with --out") from error
    atomic.write_text(folder / "compare.csv", comparing.to_csv(comparison))
    atomic.write_text(folder / "compare.json", json.dumps(to_json_value(comparison), indent=2) + "\n")
    picture = plots.draw_comparison(runs)
    atomic.write(folder / "compare.png", lambda file: file.write(picture))
    return [str(folder / name) for name in ("compare.csv", "compare.json", "compare.png")]
