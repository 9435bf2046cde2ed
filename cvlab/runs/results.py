"""Results of experiments on images: one typed result per image, and the columns that tables and pages show of it.

An experiment declares its columns next to its code. They are written into summary.json beside the results, so that
whatever renders a run directory needs to know no experiment.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One value of a result and how it is shown.

    A value with a `label` and a `score` is shown as `tabby 0.80`, a list of such values is joined by commas; the column
    `label` shows the score of the same row.

    Attributes:
        name: Key of the value in the result's JSON row.
        title: Header of the column in tables, and the value's name on pages.
        unit: Unit of the value, for example "dB".
        keys: Keys whose values are shown together, separated by commas; empty: `name` alone.
        is_file: The value is the path of a file in the run directory.
        is_detail: The value is shown only in tables of a single result. Files always are details.
        has_lines: The value is a list, and each of its items takes a line of the table.
        is_part: The file is an image that the result's panel shows, so that pages with the panel do not repeat it.
    """

    name: str
    title: str
    unit: str = ""
    keys: tuple[str, ...] = ()
    is_file: bool = False
    is_detail: bool = False
    has_lines: bool = False
    is_part: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def values_of(self, row: Mapping[str, Any]) -> list[Any]:
        """Return the values of a JSON row that the column shows; empty if the row has none of them."""
        if self.name == "label" and "label" in row:
            return [row if "score" in row else row["label"]]
        return [row[key] for key in self.keys or (self.name,) if row.get(key) is not None]


@dataclass
class PhotoResult:
    """What an experiment reports about one image.

    Attributes:
        image: Path of the image; relative to the run directory if the run has made it.
        values: Numbers, texts, predictions and lists of predictions by name.
        files: Paths of the files that belong to the image, relative to the run directory, by name.
        error: Why the image could not be read; None if it could.
    """

    image: str
    values: Row = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def as_row(self) -> Row:
        """Return the flat JSON object of the result."""
        error = {} if self.error is None else {"error": self.error}
        return {"image": self.image, **self.values, **self.files, **error}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], columns: Iterable[Column]) -> "PhotoResult":
        """Read a result back from its JSON object."""
        names = {column.name for column in columns if column.is_file}
        values = {key: value for key, value in row.items() if key not in names and key not in ("image", "error")}
        files = {key: str(value) for key, value in row.items() if key in names}
        return cls(str(row["image"]), values, files, row.get("error"))


def summarize(results: Iterable[PhotoResult], columns: Sequence[Column]) -> Row:
    """Return the entries of summary.json about results: their JSON rows and their columns."""
    return {"results": [result.as_row() for result in results], "columns": [asdict(column) for column in columns]}


def read_columns(summary: Mapping[str, Any]) -> list[Column]:
    """Return the columns in a validated summary."""
    return [Column(**{**column, "keys": tuple(column.get("keys", ()))}) for column in summary.get("columns", ())]


def read_errors(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the error of each image that could not be read."""
    return [str(row["error"]) for row in rows if "error" in row]
