"""What the commands share: arguments, groups of options, and how results are printed.

A parameter of a command that is annotated with an `OptionGroup` stands for one option per field of the group:

    @app.command()
    @expand_options
    def show_run(run: RunArgument, *, output: Output) -> None: ...

The options of `Output` are also kept in the context of the command line, where an error finds them.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cvlab import console
from cvlab.errors import DataError, ExpectationError
from cvlab.runs.results import read_errors

if TYPE_CHECKING:
    from cvlab.config.loading import Loaded
    from cvlab.data.resolve import DownloadPolicy


def complete_config(incomplete: str) -> list[str]:
    """Complete the name of a shipped configuration."""
    from cvlab.config import loading

    return [name for name in loading.shipped_names() if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Complete the name of a run."""
    from cvlab.runs.find import list_runs, runs_root

    names = ["latest", *(path.name for path in list_runs(runs_root()))]
    return [name for name in names if name.startswith(incomplete)]


ConfigArgument = Annotated[
    str, typer.Argument(help="a YAML file, or the name of a shipped configuration", autocompletion=complete_config)
]
ResumeArgument = Annotated[
    str | None,
    typer.Argument(
        help="a run directory or part of a run's name; default: the newest interrupted run", autocompletion=complete_run
    ),
]
RunArgument = Annotated[
    str, typer.Argument(help="a run directory, `latest`, or part of a run's name", autocompletion=complete_run)
]
RunsArgument = Annotated[
    list[str],
    typer.Argument(
        help='runs, each by name or path, or a query such as "status=done val_accuracy>0.7"',
        autocompletion=complete_run,
    ),
]
QueryArgument = Annotated[
    list[str] | None,
    typer.Argument(help='conditions on runs, for example "status=done val_accuracy>0.7 age<2d"; default: all'),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example optimizer.lr=1e-2")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="same as the argument key=value")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
Seed = Annotated[int | None, typer.Option(help="seed of initialization, data order and augmentation")]
RunsDir = Annotated[str | None, typer.Option(help="folder of the runs; default: $CVLAB_RUNS or ./runs")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan without writing anything")]


Trust = Annotated[
    bool, typer.Option("--trust", help="run the Python files of a run directory that was not made on this machine")
]


def _keep(context: typer.Context, parameter: typer.CallbackParam, value: bool) -> bool:
    """Keep an option of `Output` in the context, also if another option turns out to be wrong."""
    if value and isinstance(context.obj, Output) and parameter.name:
        setattr(context.obj, parameter.name, value)
    return value


def _output_flag(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, is_eager=True, callback=_keep)


class OptionGroup:
    """Options that several commands have, as the fields of a dataclass."""


@dataclass
class Output(OptionGroup):
    """How a command prints its result and its errors."""

    as_json: Annotated[bool, _output_flag("--json", help="print one JSON document on stdout")] = False
    quiet: Annotated[bool, _output_flag("-q", "--quiet", help="print only warnings and errors")] = False
    verbose: Annotated[bool, _output_flag("-v", "--verbose", help="print more")] = False
    debug: Annotated[bool, _output_flag("--debug", help="print the traceback of an error")] = False

    def show(self, document: Mapping[str, Any], render: Callable[[], None]) -> None:
        """Print one JSON document, or what `render` prints for people."""
        if self.as_json:
            from cvlab.runs.records import to_json_value

            console.document(json.dumps(to_json_value(document), indent=2))
        else:
            render()

    def flags(self) -> tuple[str, ...]:
        """Return the flags as another cvlab process takes them."""
        return tuple(f"--{field.name.removeprefix('as_')}" for field in fields(self) if getattr(self, field.name))


@dataclass
class RunOptions(OptionGroup):
    """Options of the commands that run a configuration."""

    set_: SetOption = None
    device: Device = None
    runs_dir: RunsDir = None


@dataclass
class DataOptions(OptionGroup):
    """What may be done about a data set that is not on the disk."""

    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="exit with an error instead of using the fallback data set")
    ] = False
    offline: Annotated[bool, typer.Option("--offline", help="do not access the network, as with CVLAB_OFFLINE=1")] = (
        False
    )
    download: Annotated[bool, typer.Option("--download", help="wait for a download, no matter how long it takes")] = (
        False
    )

    def policy(self) -> "DownloadPolicy":
        """Return the options as the download policy of a run."""
        from cvlab.data.resolve import DownloadPolicy

        return DownloadPolicy(self.offline, self.download, self.no_fallback)


@dataclass
class ProcessOptions(OptionGroup):
    """How many processes train, and how often they are restarted."""

    nproc: Annotated[
        int | None, typer.Option(min=1, max=1024, help="number of processes; each takes its share of every batch")
    ] = None
    max_restarts: Annotated[int, typer.Option(min=0, help="with --nproc: maximum number of restarts")] = 0


@dataclass
class ModelOptions(OptionGroup):
    """Which pretrained classifier is used."""

    model: Annotated[
        str | None,
        typer.Option(
            help="efficientnet_lite0 (bundled), efficientnet_lite2, timm:NAME, torchvision:NAME, or a run of a "
            "classifier; `latest`: the newest one",
            autocompletion=complete_run,
        ),
    ] = None
    weights: Annotated[str | None, typer.Option(help="file with the model's weights")] = None
    trust: Trust = False

    def values(self, options: RunOptions) -> dict[str, Any]:
        """Return the options as values of configuration keys; a run is looked for where `options` say that runs are.

        Raises:
            ConfigError: The model is unknown.
            RunDirError: It is a run with code of others that is not trusted.
        """
        if self.model is None:
            return {"model": None, "weights": self.weights}
        from cvlab.api import photos
        from cvlab.runs.find import runs_root

        model = photos.resolve_model(self.model, runs_root(options.runs_dir), self.trust)
        return {"model": model, "weights": self.weights}


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is annotated with an `OptionGroup` by the options of the group."""
    # Not by get_type_hints: that of Python 3.10 hides the annotation of a parameter whose default is None in Optional.
    signature = inspect.signature(command, eval_str=True)
    groups, parameters = {}, []
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and issubclass(group, OptionGroup)):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        options = get_type_hints(group, include_extras=True)
        for field in fields(group):  # type: ignore[arg-type]
            parameters.append(parameter.replace(name=field.name, default=field.default, annotation=options[field.name]))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})  # type: ignore[arg-type]
            if isinstance(values[name], Output):
                console.set_level(values[name].quiet, values[name].verbose)
        command(**values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def require_trust(reference: str, is_trusted: bool) -> None:
    """Raise RunDirError if a run directory, or the configuration in one, has code of others that is not trusted."""
    from cvlab.runs.trust import require_trust_of

    require_trust_of(reference, is_trusted)


def gather_overrides(
    texts: list[str] | None, run: RunOptions, prefix: str = "", **flags: int | str | None
) -> list[str]:
    """Gather the overrides of a command line; the last one of a key wins."""
    values = {f"{prefix}device": run.device, **flags}
    texts = [*(texts or []), *(run.set_ or [])]
    return [*texts, *(f"{key}={value}" for key, value in values.items() if value is not None)]


def show_verdict(
    document: dict[str, Any],
    output: Output,
    render: Callable[[], None],
    message: str,
    hint: str = "",
    code: int = ExpectationError.code,
) -> None:
    """Print a result; if its `ok` is false, also print the error `message` and exit with `code`."""
    error = ExpectationError(message, hint)
    error.code = code
    output.show(document if document["ok"] else document | {"error": error.document()}, render)
    if not document["ok"]:
        console.info(f"error: {error}")
        raise typer.Exit(error.code)


def show_plan(loaded: "Loaded", root: Path, output: Output) -> None:
    """Print what a run would do."""
    from cvlab.api import run

    print_plan(run.plan(loaded, root), output)


def print_plan(plan: dict[str, Any], output: Output) -> None:
    """Print a plan."""
    from cvlab.reports import tables

    output.show(plan, lambda: tables.show_block("plan; nothing was written", plan))


def finish(result: dict[str, Any], output: Output, failure: str = "") -> None:
    """Print the result of a run; exit with code 4 for images that could not be read, 3 for a failed expectation.

    Args:
        result: The result; empty in all processes of a training run but the first.
        output: How it is printed.
        failure: Why the result is no success although nothing failed; also exits with code 3.
    """
    if not result:
        return
    from cvlab.reports import tables

    failed = [verdict["rule"] for verdict in result["expect"] if not verdict["met"]]
    rows = result.get("results", [])
    unread = read_errors(rows)
    message = f"{len(unread)} of {len(rows)} photos could not be read: {unread[0]}" if unread else ""
    message = message or (f"not met: {'; '.join(failed)}" if failed else failure)
    document = result | {"ok": result["ok"] and not unread and not failure}
    code = DataError.code if unread else ExpectationError.code
    hint = "" if failure else f"see {console.relative_path(Path(result['run']))}"
    show_verdict(document, output, lambda: tables.show_result(result), message, hint, code)
