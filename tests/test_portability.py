"""macOS and Windows, imitated on Linux: modules that they lack are hidden, open files cannot be replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cvlab import portability

WINDOWS_LIKE = """
import errno, os, shutil, signal, struct, sys, types
import asyncio, fcntl, multiprocessing.context, subprocess, tempfile  # before functions are removed

def locking(descriptor, mode, size):
    start = os.lseek(descriptor, 0, os.SEEK_CUR)  # like Windows' locks, those of open files belong to no process
    flock = struct.pack("hhqqi4x", real.F_WRLCK, os.SEEK_SET, start, size, 0)
    real.fcntl(descriptor, real.F_OFD_SETLK, flock)

def refuse_open(function):
    def call(source, target=None, **options):
        for name in (source, *([] if target is None else [target])):
            path = os.path.realpath(os.fspath(name)) if not os.path.islink(name) else os.path.abspath(name)
            used = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
            with open("/proc/self/maps") as maps:
                used += [line.split(maxsplit=5)[-1].strip() for line in maps]
            if any(file == path or file.startswith(path + os.sep) for file in used):
                raise PermissionError(errno.EACCES, "it is open", name)
        return function(source, **options) if target is None else function(source, target, **options)
    return call

def refuse_link(*names, **options):
    raise OSError(errno.EPERM, "a required privilege is not held")

real = fcntl
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
shutil._use_fd_functions = False
os.supports_dir_fd.clear()
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "fchmod", "pwrite", "pread", "fork",
             "getuid", "waitid", "sched_getaffinity", "killpg", "sysconf"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "pthread_sigmask"):
    delattr(signal, name)
for name in ("replace", "rename", "unlink", "remove", "rmdir"):
    setattr(os, name, staticmethod(refuse_open(getattr(os, name))))  # pathlib of 3.10 has them as class attributes
os.link = os.symlink = staticmethod(refuse_link)
os.kill = lambda pid, _number, kill=os.kill: kill(pid, 9)  # TerminateProcess
"""
COMMANDS = """
import json, sys
from cvlab.cli import main
print(json.dumps([main.run_command_line(args) for args in json.loads(sys.argv[1])]), file=sys.stderr)
"""
TRAIN = (
    *("train", "quickstart", "data.num_train=60", "batch_size=20", "duration={steps: 6}", "eval_every=3", "expect=[]"),
    *("evaluate_test=false", "threads=1", "save_seconds=0"),
)


def run_windows_like(folder, commands, data_root, **environment):
    """Run commands in a process without what Windows lacks; return the process and the exit codes."""
    (folder / "sitecustomize.py").write_text(WINDOWS_LIKE)
    package = str(Path(portability.__file__).parent.parent)
    environment = os.environ | {
        **{"PYTHONPATH": os.pathsep.join((str(folder), package)), "CVLAB_DATA": str(data_root)},
        **{"CVLAB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CVLAB_RUNS": str(folder / "runs")},
        **environment,
    }
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = process.stderr.splitlines()
    return process, json.loads(lines[-1]) if lines and lines[-1].startswith("[") else process.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows on Linux")
def test_a_killed_run_resumes_and_commands_work_without_what_windows_lacks(tmp_path, data_root):
    process, _ = run_windows_like(tmp_path, [[*TRAIN, "-q"]], data_root, CVLAB_FAILPOINT="before_rename:5")
    assert (process.returncode, process.stderr) == (-9, "")  # at once, not through a handler
    commands = [
        *(
            ["resume", "latest", "-q"],
            ["resume", "latest", "-q"],
            ["show", "latest"],
            ["runs"],
            ["eval", "latest", "-q"],
        ),
        *(["runs", "tag", "latest", "--add", "x"], ["report", "latest"], ["runs", "prune", "latest"]),
        *(["runs", "rm", "latest"], ["runs", "--json"], ["classify", "sample"]),
    ]
    process, codes = run_windows_like(tmp_path, commands, data_root)
    assert codes == [0] * len(commands), process.stderr
    assert "military uniform" in process.stdout
    listing = json.loads(process.stdout[process.stdout.index("{") :].partition("\n}")[0] + "\n}")
    assert listing["runs"] == []


@pytest.mark.parametrize("name", ["fcntl", "msvcrt"])
def test_missing_modules_are_none(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert portability._optional(name) is None
