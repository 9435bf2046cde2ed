"""`cvlab doctor`: what this machine has, and whether everything that cvlab needs works."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvlab import __version__, console
from cvlab.api import fault_check
from cvlab.config import loading
from cvlab.data import datasets
from cvlab.portability import try_lock
from cvlab.runs.find import runs_root
from cvlab.storage.cache import data_root
from cvlab.storage.lock import no_locks_error

Check = tuple[str, bool, str]


def _python() -> str:
    import platform

    return f"Python {platform.python_version()}, {platform.platform()}"


def _torch() -> str:
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _torchvision() -> str:
    from cvlab import _compat

    return f"torchvision {_compat.torchvision().__version__}, timm {_compat.timm().__version__}"


def _devices() -> str:
    import torch

    from cvlab.engine import device

    names = [f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())]
    ctx = device.select_device()
    return f"{', '.join(names) or 'no GPU'}; auto means {ctx.device} in {ctx.precision}"


def _speed() -> str:
    import torch

    matrix = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return f"{2 * 1024**3 / min(times) / 1e9:.0f} GFLOP/s in float32 matrix products on the CPU"


def _disk(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder")
    with tempfile.NamedTemporaryFile(dir=existing) as file:
        start = time.perf_counter()
        file.write(os.urandom(2**20))
        file.flush()
        os.fsync(file.fileno())
        milliseconds = 1000 * (time.perf_counter() - start)
        try:
            try_lock(file.fileno())
        except OSError as error:
            raise no_locks_error(existing, error) from error
    free = shutil.disk_usage(existing).free
    return f"{folder}: writable, {console.format_bytes(free)} free, fsync of 1 MiB: {milliseconds:.1f} ms"


def _data() -> str:
    states = [f"{name} {datasets.get(name).state(data_root())}" for name in datasets.DATASETS]
    return f"{data_root()}: {', '.join(states)}"


def _configs() -> str:
    for name in loading.shipped_names():
        loading.load(str(loading.shipped_folder() / f"{name}.yaml"))
    return f"{len(loading.shipped_names())} shipped configurations, all valid"


def run_checks(runs_dir: str | None, faults: bool = False) -> dict[str, Any]:
    """Run all checks.

    Args:
        runs_dir: The folder of the runs; None for the default one.
        faults: Also kill and resume a short training run.

    Returns:
        `ok`, and `checks`: `name`, `ok` and the result as text (`found`) of each.
    """
    checks: dict[str, Callable[[], str]] = {
        "cvlab": lambda: f"cvlab {__version__} in {Path(__file__).parent.parent}",
        "python": _python,
        "torch": _torch,
        "torchvision": _torchvision,
        "devices": _devices,
        "speed": _speed,
        "configurations": _configs,
        "runs": lambda: _disk(runs_root(runs_dir)),
        "data": _data,
        "data disk": lambda: _disk(data_root()),
    }
    results = [_run_check(name, check) for name, check in checks.items()]
    if faults:
        results += fault_check.run(runs_root(runs_dir))
    rows = [{"name": name, "ok": ok, "detail": text} for name, ok, text in results]
    return {"ok": all(ok for _, ok, _ in results), "checks": rows}


def _run_check(name: str, check: Callable[[], str]) -> Check:
    try:
        return name, True, check()
    except Exception as error:  # any failure is a result
        return name, False, f"{type(error).__name__}: {error}"
