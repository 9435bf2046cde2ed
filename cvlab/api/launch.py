"""Train in several processes: create the run directory once and resume it in every rank."""

from collections.abc import Callable
from pathlib import Path

from cvlab import console
from cvlab.api import run as api_run
from cvlab.config import loading
from cvlab.data.resolve import DownloadPolicy
from cvlab.distributed import collectives, process_group
from cvlab.errors import ConfigError
from cvlab.runs.find import config_path, list_runs
from cvlab.runs.records import read_json


def train(make: Callable[[], Path]) -> api_run.Result:
    """Be one of several processes: take over the run directory that process 0 makes, and train. Empty in the others."""
    if not process_group.is_main():
        console.set_level(quiet=True, verbose=False)
    path = None
    try:
        with process_group.init_process_group():
            path = collectives.broadcast_from_rank0(make)
            return api_run.resume(path)
    except process_group.PeerLostError as error:
        error.hint = f"`cvlab resume {path.name if path else 'RUN'}` goes on from the last checkpoint"
        raise


def run_dir_of_launch(load: Callable[[], loading.Loaded], policy: DownloadPolicy, root: Path) -> Path:
    """Make a run directory, or, where torchrun has started its processes again, return the one they had."""
    if process_group.is_restarted():
        for path in reversed(list_runs(root)):
            if read_json(path / "env.json").get("launch") == process_group.launch_id():
                return path
    return api_run.make(load(), policy, root, process_group.world().size)


def require_processes(path: Path, asked: int | None) -> int:
    """Return in how many processes a run is to go on: as many as it was begun in, or as many as are asked for.

    ConfigError where torchrun has started another number than that, or the run is none that so many could train.
    """
    wanted, size = asked or api_run.processes_of(path), process_group.world().size
    if size > 1 and wanted != size:
        raise ConfigError(
            f"{path.name} was begun in {wanted} processes, torchrun has started {size}",
            f"--nproc {size} goes on with them; the result is then not bitwise that of an unbroken run",
        )
    if wanted > 1:
        api_run.require_processes(loading.load(str(config_path(path))), wanted)
    return wanted
