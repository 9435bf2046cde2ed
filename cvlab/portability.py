"""The only place that calls what Linux, macOS and Windows do not have in common.

Everything works on all three; where a system lacks something, the docstring says what is lost there.
"""

import contextlib
import ctypes
import errno
import functools
import importlib
import operator
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess


def _optional(module: str) -> Any:
    """Import a module of the standard library; None if this system's Python does not have it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _flags(*names: str) -> int:
    """Return the flags of `os.open` together, those of them that this system has."""
    return functools.reduce(operator.or_, (getattr(os, name, 0) for name in names), 0)


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return the signals with these names, those of them that this system has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


fcntl, msvcrt = _optional("fcntl"), _optional("msvcrt")
IS_POSIX = fcntl is not None  # open files can be renamed and replaced, folders can be synced, signals reach processes

# Binary, no child process inherits the file, a link is not followed, and opening a FIFO does not wait.
OPEN_FLAGS = _flags("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_NOINHERIT", "O_BINARY")
OPEN_FOLDER_FLAGS = _flags("O_DIRECTORY", "O_CLOEXEC")
OPENS_RELATIVE = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")  # files within an open folder

STOP_SIGNALS = signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK")
AGENT_SIGNALS = signals("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGBREAK")  # that stop all ranks
IGNORED_BY_NOHUP = signals("SIGHUP")
KILLED_CODE = -signal.SIGKILL if hasattr(signal, "SIGKILL") else 1  # exit code after `Popen.kill`
LOWEST_PRIORITY = 19
FATAL_SIGNALS = signals("SIGKILL", "SIGSEGV", "SIGABRT")
CLOSED_STREAM = {errno.EPIPE, errno.EIO} | (set() if IS_POSIX else {errno.EINVAL})  # EIO: the terminal was closed
START_METHOD = "forkserver" if IS_POSIX and sys.platform.startswith("linux") else "spawn"  # of multiprocessing

LOCK_HELD = (errno.EACCES, errno.EAGAIN)  # POSIX allows either for a lock that another process holds
LOCKED_BYTE = 2**31 - 2  # of a file, on Windows, where no other process can read or write what is locked
REPLACE_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # seconds; on Windows a virus scanner may have the file open
CGROUPS = (  # files with limit and use, of cgroup version 2 and version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
RESET_PEAK = "5"  # what to write into /proc/self/clear_refs, see proc(5)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return False if another process holds its lock.

    A record lock, which ends with the process and which child processes do not inherit. On Windows another descriptor
    of the same process cannot lock it, either.

    Raises:
        OSError: There are no file locks.
    """
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            _lock_byte(descriptor)
        else:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    except OSError as error:
        if error.errno not in LOCK_HELD:
            raise
        return False
    return True


def _lock_byte(descriptor: int) -> None:
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def set_mode(descriptor: int, mode: int) -> None:
    """Set the permissions of an open file; on Windows it has those of its folder."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder in one step, replacing a file; on Windows wait while another process has it open."""
    for seconds in () if IS_POSIX else REPLACE_WAITS:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(source, target)


def point_link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to a folder beside it, replacing it. OSError where there are no links.

    On Windows links need a privilege and cannot be replaced in one step; the old one is removed first.
    """
    temporary = link.with_name(f".{link.name}-{name}")
    if not IS_POSIX and link.is_symlink():
        link.unlink()
    temporary.symlink_to(name, target_is_directory=True)
    os.replace(temporary, link)


def sync_folder(folder: Path) -> None:
    """Make renames, links and removals in a folder durable; on Windows its file system's journal does."""
    if IS_POSIX:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_private(status: os.stat_result) -> bool:
    """Return whether no other user may write to what has this status; on Windows the profile's permissions hold."""
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def num_cores() -> int:
    """Return how many cores this process may use; outside Linux, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kill_self() -> None:
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows SIGTERM runs no handler


def kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that was started in a session of its own, with those it has started; on Windows only itself."""
    with contextlib.suppress(OSError):
        if IS_POSIX:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def lower_priority() -> None:
    """Let all other processes go before this one, where the system has priorities."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(LOWEST_PRIORITY)


def lower_session_priority(pid: int) -> None:
    """Let all other processes go before one that was started in a session of its own.

    Linux by default shares the processor between sessions first, in which the priorities of processes do not count.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
        Path(f"/proc/{pid}/autogroup").write_text(str(LOWEST_PRIORITY))


def terminate_self() -> None:
    """Send SIGTERM to this process, whose main thread handles it; from any thread."""
    if IS_POSIX:
        os.kill(os.getpid(), signal.SIGTERM)  # also interrupts a system call of the main thread
    else:
        signal.raise_signal(signal.SIGTERM)


def unblock_signals(numbers: Iterable[int]) -> None:
    """Let signals through that the parent process may have blocked, where signals can be blocked."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextlib.contextmanager
def block_signals(numbers: Iterable[int]) -> Iterator[None]:
    """Block signals, also in the processes that are started meanwhile; without effect where they cannot be blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_exit(pid: int) -> None:
    """Wait for the end of a child process, whose exit code stays for its parent; without effect on Windows.

    Raises:
        ChildProcessError: Its exit code was taken already.
    """
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks; without glibc nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def free_memory_bytes(proc: Path, cgroup: Path) -> int | None:
    """Return the free memory of this machine or container in bytes; None outside Linux.

    Args:
        proc: Where the proc file system is mounted.
        cgroup: Where the cgroup file system is mounted.
    """
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit_file, use_file in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" instead of a number: no limit
            limits.append(int((cgroup / limit_file).read_text()) - int((cgroup / use_file).read_text()))
    return max(0, min(limits)) if limits else None


def reset_peak_memory(proc: Path) -> None:
    """Let `peak_memory_bytes` count from now on; outside Linux it counts from the start of the process."""
    with contextlib.suppress(OSError):
        (proc / "self" / "clear_refs").write_text(RESET_PEAK)


def peak_memory_bytes(proc: Path) -> int | None:
    """Return the largest resident memory of this process in bytes; None on Windows."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self" / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    resource = _optional("resource")
    if resource is None:
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024
