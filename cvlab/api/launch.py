"""Train in several processes: create the run directory once and resume it in every rank."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from cvlab import console
from cvlab.api import run as api_run
from cvlab.config import loading
from cvlab.distributed import collectives, process_group
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs.find import config_path, list_runs
from cvlab.runs.records import read_json


def train(make: Callable[[], Path], allow_changes: bool = False) -> api_run.Result:
    """Train as one of several processes, in the run directory that process 0 creates.

    Args:
        make: Creates the run directory; called in process 0 only.
        allow_changes: See `api.run.resume`.

    Returns:
        The result of the run in process 0, an empty dictionary in the others.

    Raises:
        PeerLostError: Another process has ended.
    """
    if not process_group.is_main():
        console.set_level(quiet=True, verbose=False)
    path = None
    try:
        with process_group.init_process_group():
            path = collectives.broadcast_from_rank0(make)
            return api_run.resume(path, allow_changes=allow_changes)
    except process_group.PeerLostError as error:
        error.hint = f"`cvlab resume {path.name if path else 'RUN'}` continues from the last checkpoint"
        raise


def run_dir_of_launch(create: Callable[[], Path], root: Path) -> Path:
    """Create a run directory below `root`; after a restart by torchrun return the one that its processes had."""
    if process_group.is_restarted():
        for path in reversed(list_runs(root)):
            with contextlib.suppress(RunDirError):  # another run, which is damaged
                if read_json(path / "env.json").get("launch") == process_group.launch_id():
                    return path
    return create()


def require_processes(path: Path, requested: int | None) -> int:
    """Return the number of processes in which a run is resumed.

    Args:
        path: The run directory.
        requested: The number that the user asks for; None for as many as the run was started with.

    Raises:
        ConfigError: Torchrun has started another number of processes, or that many cannot share the run's batches.
    """
    count, size = requested or api_run.processes_of(path), process_group.world().size
    if size > 1 and count != size:
        raise ConfigError(
            f"{path.name} was started in {count} processes, torchrun has started {size}",
            f"--nproc {size} resumes it with them; the result then differs from that of an uninterrupted run",
        )
    if count > 1:
        api_run.require_processes(loading.load(str(config_path(path))), count)
    return count
