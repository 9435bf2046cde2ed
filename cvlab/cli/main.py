"""The commands: parse text, call one function, print. Nothing heavy is imported before it is needed."""

import errno
import json
import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import Annotated

import typer

from cvlab import __version__, console
from cvlab.cli import bench, catalog, detect, photos, reports, sweep
from cvlab.cli.options import (
    ConfigArgument,
    Debug,
    Device,
    Download,
    DryRun,
    Json,
    NoFallback,
    Offline,
    Overrides,
    Processes,
    Quiet,
    Restarts,
    RunArgument,
    RunsDir,
    Seed,
    SetOption,
    Verbose,
    finish,
    finish_main,
    flags_of,
    overrides_of,
    show,
    show_plan,
    show_verdict,
)
from cvlab.distributed import process_group
from cvlab.errors import ConfigError, CvlabError, DataError, RunDirError, StoppedError
from cvlab.runs import interrupt
from cvlab.storage import atomic

app = typer.Typer(
    name="cvlab",
    help="Run computer-vision experiments: one YAML file, one engine, one kind of run directory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes half the time of boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)

REFUSED: dict[int, tuple[type[CvlabError], str]] = {
    errno.ENAMETOOLONG: (DataError, "give a shorter name"),
    errno.EACCES: (DataError, "change its permissions, or name another"),
    errno.ENOSPC: (RunDirError, atomic.ELSEWHERE),
    errno.EDQUOT: (RunDirError, atomic.ELSEWHERE),
    errno.EROFS: (RunDirError, atomic.ELSEWHERE),
    errno.EIO: (RunDirError, "the disk is damaged; choose another place with --runs-dir"),
}
GRACE_SECONDS = 2.0  # that process 0 has to say and write what another one says too


@app.command("train")
@app.command("run")
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    set_: SetOption = None,
    device: Device = None,
    seed: Seed = None,
    runs_dir: RunsDir = None,
    nproc: Processes = None,
    max_restarts: Restarts = 0,
    dry_run: DryRun = False,
    no_fallback: NoFallback = False,
    offline: Offline = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a configuration in a new run directory."""
    console.set_level(quiet, verbose)
    from cvlab.api import launch
    from cvlab.api import run as api_run
    from cvlab.config import loading as configs
    from cvlab.data.resolve import DownloadPolicy
    from cvlab.distributed import launcher, process_group
    from cvlab.runs.find import runs_root

    policy = DownloadPolicy(offline, download, no_fallback)
    root = runs_root(runs_dir)

    def load() -> configs.Loaded:
        return configs.load(config, overrides_of(overrides, set_, device, seed))

    if dry_run:
        show_plan(load(), root, as_json)
    elif process_group.world().size > 1:
        finish_main(launch.train(lambda: launch.run_dir_of_launch(load, policy, root)), as_json)
    elif nproc is not None and nproc > 1:
        path = api_run.make(load(), policy, root, nproc)
        raise typer.Exit(launcher.run(path, nproc, max_restarts, flags_of(as_json, quiet, verbose, debug)))
    else:
        finish(api_run.start(load(), policy, root), as_json)


@app.command()
def resume(
    run: RunArgument,
    nproc: Processes = None,
    max_restarts: Restarts = 0,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped. From its newest checkpoint, to the same bits."""
    console.set_level(quiet, verbose)
    from cvlab.api import launch
    from cvlab.api import run as api_run
    from cvlab.distributed import launcher, process_group
    from cvlab.runs.find import find_run, runs_root

    path = find_run(run, runs_root(runs_dir))
    count = launch.require_processes(path, nproc)
    if process_group.world().size > 1:
        finish_main(launch.train(lambda: path), as_json)
    elif count > 1 and not api_run.has_ended(path):
        raise typer.Exit(launcher.run(path, count, max_restarts, flags_of(as_json, quiet, verbose, debug)))
    else:
        finish(api_run.resume(path), as_json)


@app.command("eval")
def evaluate(
    run: RunArgument,
    split: Annotated[list[str] | None, typer.Option(help="train, val or test; may be repeated")] = None,
    checkpoint: Annotated[str, typer.Option(help="last or best weights")] = "last",
    device: Device = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a run's weights on validation and test."""
    from cvlab.api import evaluate as api_evaluate
    from cvlab.reports import tables
    from cvlab.runs.find import find_run, runs_root

    path = find_run(run, runs_root(runs_dir))
    found = api_evaluate.evaluate(path, tuple(split or ()), checkpoint, device)
    title = f"{path.name}, {checkpoint} weights, step {found['step']}"
    show(found, as_json, lambda: tables.show_block(title, found["metrics"]))


@app.command()
def gradcheck(
    layers: Annotated[list[str] | None, typer.Argument(help="layers or nets by name, or ./file.py:Name")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the random inputs")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check hand-written gradients. Against differences and against autograd, in float64."""
    from cvlab.api import gradcheck as api_gradcheck
    from cvlab.reports import tables

    found = api_gradcheck.run(layers or [], seed)
    wrong = [check["name"] for check in found["checks"] if not check["ok"]]
    show_verdict(found, as_json, lambda: tables.show_gradients(found["checks"]), f"wrong: {', '.join(wrong)}")


def _version(value: bool) -> None:
    if value:
        print(f"cvlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Refuse what torchrun would start several times beside each other."""
    if process_group.world().size > 1 and context.invoked_subcommand not in ("train", "run", "resume"):
        raise ConfigError(f"{context.invoked_subcommand} runs in one process", "call it without torchrun")


app.add_typer(photos.app)
app.add_typer(detect.app)
app.add_typer(sweep.app)
app.add_typer(catalog.app)
app.add_typer(reports.app)
app.add_typer(catalog.models_app, name="models")
app.add_typer(catalog.data_app, name="data")
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console.ignore_broken_pipe()
    interrupt.stop_with_input()
    try:
        several = process_group.world().size > 1
    except ConfigError as error:
        console.info(f"error: {error}")
        sys.exit(error.code)
    if several:  # before torch is loaded: DDP would warn of what it was asked to do
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = run_command_line(arguments)
    try:
        sys.stdout.flush()
    except RunDirError as error:
        console.info(f"error: {error}")
        code = code or error.code
    if several:
        sys.stderr.flush()
        os._exit(code)  # what a process still holds of the others must not change its exit code
    sys.exit(code)


def run_command_line(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are shown, not raised."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CvlabError as error:
        return _refuse(error, arguments)
    except KeyboardInterrupt:
        return _refuse(StoppedError("stopped by Ctrl-C", "", 130), arguments)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.errno in REFUSED:
            return _refuse(_of_disk(error), arguments)
        if hasattr(error, "format_message"):  # the command line was wrong; typer keeps the class to itself
            message = " ".join(error.format_message().split())
            return _refuse(ConfigError(message, "see --help"), arguments)
        return _fault(error, arguments)


def _of_disk(error: OSError) -> CvlabError:
    """Word what a disk refuses, wherever that was: a name that is too long, a folder that is closed, no space."""
    kind, hint = REFUSED[error.errno or 0]
    name = str(error.filename)
    return kind(f"{name if len(name) < 200 else f'{name[:100]}...'}: {error.strerror}", hint)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise StoppedError("stopped by SIGTERM", "", 128 + number)


def _refuse(error: CvlabError, arguments: list[str]) -> int:
    """Say on one line what is wrong; a configuration's further errors take a line each."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # it ends in any case; what is wrong is to be said whole
    if not process_group.is_main():
        return _refuse_quietly(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    if "--json" in arguments:
        print(json.dumps({"ok": False, "error": error.document()}, indent=2))
    for line in [error, *getattr(error, "others", ())]:
        console.info(f"error: {line}")
    return error.code


def _refuse_quietly(error: CvlabError) -> int:
    """Say what only this one of several processes knows: not that it was stopped, or that another has ended."""
    if not isinstance(error, (StoppedError, process_group.PeerLostError)):
        console.info(f"error: process {process_group.world().rank}: {error}")
        time.sleep(GRACE_SECONDS)  # the end of this one ends the others, which may have the same to say and to write
    return error.code


def _fault(error: Exception, arguments: list[str]) -> int:
    """Show the traceback of what should not happen, or of the user's own code."""
    traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}"
    if "--json" in arguments:
        hint = "the traceback is on stderr"
        print(json.dumps({"ok": False, "error": {"code": 1, "message": message, "hint": hint}}, indent=2))
    console.info(f"error: {message}; this is a fault of cvlab, or of your own file if the traceback ends there")
    return 1
