"""The command line: its commands, its exit code. Nothing heavy is imported before a command needs it."""

import contextlib
import functools
import gc
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
import typer.main

from cvlab import __version__, console
from cvlab.cli import bench, catalog, doctor, photos, queue, reports, run, runs, sweep
from cvlab.cli.errors import from_os_error, parser_error, report_internal_error, report_user_error
from cvlab.cli.groups import MACHINE, RESOURCES, RUNS, TRAIN, CommandGroup
from cvlab.cli.options import Output
from cvlab.distributed import process_group
from cvlab.errors import ConfigError, CvlabError, RunDirError, StoppedError
from cvlab.runs import interrupt

app = typer.Typer(
    name="cvlab",
    help="Run computer-vision experiments: one YAML file, one engine, one kind of run directory.",
    cls=CommandGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes half the time of boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)
GARBAGE_THRESHOLD = 20_000  # objects; of the 160,000 that importing torch allocates, nearly none is garbage
DISTRIBUTED = ("train", "run", "resume")  # commands that may run in several processes


def _version(value: bool) -> None:
    if value:
        print(f"cvlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Reject commands that torchrun would run several times at once."""
    if process_group.world().size > 1 and context.invoked_subcommand not in DISTRIBUTED:
        raise ConfigError(f"{context.invoked_subcommand} runs in one process", "call it without torchrun")


for commands in (run, photos, sweep, runs, catalog, doctor, reports):
    app.add_typer(commands.app)
app.add_typer(runs.runs_app, name="runs", rich_help_panel=RUNS)
app.add_typer(queue.queue_app, name="queue", rich_help_panel=TRAIN)
app.add_typer(catalog.models_app, name="models", rich_help_panel=RESOURCES)
app.add_typer(catalog.data_app, name="data", rich_help_panel=RESOURCES)
app.add_typer(bench.app, name="bench", rich_help_panel=MACHINE)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    gc.set_threshold(GARBAGE_THRESHOLD)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them takes 20 ms
    console.ignore_broken_pipe()
    interrupt.stop_with_input()
    try:
        is_distributed = process_group.world().size > 1
    except ConfigError as error:
        console.info(f"error: {error}")
        sys.exit(error.code)
    if is_distributed:  # before torch is loaded: DDP would warn of what it was asked to do
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        process_group.watch_launcher()
    code = run_command_line(arguments)
    try:
        sys.stdout.flush()
    except RunDirError as error:
        console.info(f"error: {error}")
        code = code or error.code
    if is_distributed:
        sys.stderr.flush()
        os._exit(code)  # tearing down the connections to other processes must not change the exit code
    sys.exit(code)


def run_command_line(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are printed, not raised."""
    output = Output(as_json="--json" in arguments)  # a command line that cannot be parsed has no options
    prints_document = output.as_json and not {"-h", "--help"} & set(arguments)
    with console.only_documents_on_stdout() if prints_document else contextlib.nullcontext():
        return _run_command_line(arguments, output)


@functools.cache
def _command() -> Any:
    """Return the tree of commands; building it takes 30 ms."""
    return typer.main.get_command(app)


def _run_command_line(arguments: list[str], output: Output) -> int:
    try:
        signal.signal(signal.SIGTERM, _terminate)
        code = _command()(arguments, prog_name="cvlab", standalone_mode=False, obj=output)
        return code if isinstance(code, int) else 0
    except CvlabError as error:
        return report_user_error(error, output)
    except KeyboardInterrupt:
        return report_user_error(StoppedError("interrupted", "", 130), output)
    except Exception as error:
        if isinstance(error, OSError) and (of_user := from_os_error(error)) is not None:
            return report_user_error(of_user, output)
        if hasattr(error, "format_message"):  # of the command line's parser, which does not export its class
            return report_user_error(parser_error(error), output)
        return report_internal_error(error, output)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise StoppedError("interrupted by SIGTERM", "", 128 + number)
