"""Schemas of summary.json and status.json: what is read from a run directory is validated before it is used."""

from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError

Real = InstanceOf[float] | Annotated[int, Gt(-(2**63)), Lt(2**63)]  # JSON has integers of any length
Number = Real | None  # null: it was not finite
Value = Number | str | bool


class _Record(BaseModel):
    """A part of a JSON file: what is read from it is validated, further keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ResultRow(_Record):
    """The result of one image; further values are the experiment's own."""

    image: str
    error: str = ""


class ColumnRecord(_Record, extra="forbid"):
    """A column of the results, see `runs.results.Column`."""

    name: str
    title: str
    unit: str = ""
    keys: list[str] = []
    is_file: bool = False
    is_detail: bool = False
    has_lines: bool = False
    is_part: bool = False


class Verdict(_Record):
    """An expectation and whether it was met."""

    rule: str | None
    met: bool
    measured: Value
    values: list[Value] = []


class MetricRecord(_Record):
    """What a run declares about one of its metrics."""

    unit: str = ""
    better: Literal["higher", "lower"] | None = None


class Spread(_Record):
    """A metric over the seeds of a setting."""

    mean: Real
    sd: Number
    n: Number = None


class Setting(_Record):
    """The trials of a sweep that differ only in their seed."""

    keys: dict[str, Any]
    trials: Number
    status: list[str]
    metrics: dict[str, Spread]


class TableRecord(_Record):
    """A table that an experiment adds to its results."""

    title: str = ""
    columns: list[str]
    rows: list[list[Value]]


class Importance(_Record):
    """Which keys of a sweep matter for a metric, or the reason why that is not known."""

    metric: str
    goal: str = "maximize"
    after: str = ""
    log_keys: list[str] = []
    trials: Number = None
    reason: str = ""
    method: str = ""
    explained: Number = None
    p: Number = None
    keys: dict[str, Real] = {}


class Summary(_Record):
    """summary.json."""

    experiment: str | None = None
    data: str | None = None
    headline: str | None = None
    seconds: Number = None
    peak_rss_mb: Number = None
    peak_cuda_mb: Number = None
    metrics: dict[str, Value] = {}
    metric_info: dict[str, MetricRecord] = {}
    expect: list[Verdict] = []
    results: list[ResultRow] = []
    columns: list[ColumnRecord] = []
    tables: list[TableRecord] = []
    settings: list[Setting] = []
    importance: Importance | None = None


class Status(_Record):
    """status.json; `records.STATES` are the values of its status."""

    status: str = ""
    experiment: str | None = None
    data: str | None = None
    error: str | None = None


class Annotations(_Record):
    """annotations.json: what the user has noted about a run."""

    tags: list[str] = []
    note: str = ""
    starred: bool = False


def invalid_key(schema: type[_Record], record: dict[str, Any]) -> str | None:
    """Return the first key of a record that does not fit a schema, None if all do."""
    try:
        schema.model_validate(record)
    except ValidationError as error:
        return str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
    return None
