"""Runs in a zip file, to move them to another machine: `cvlab runs export` and `cvlab runs import`.

An archive has the files of each run below the run's name and `manifest.json`, which lists them with sizes and SHA-256.
Members are stored and not compressed, so that nothing inflates. An archive need not be trusted: a run is first unpacked
under a hidden name, and appears in the list when all its files are as the manifest says and its checkpoints have been
loaded with `weights_only=True`. Its Python files are not run; `resume` and `eval` ask for `--trust` before they do.
"""

import contextlib
import hashlib
import importlib.machinery
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cvlab import __version__
from cvlab.errors import ConfigError, DataError, RunDirError
from cvlab.runs import find
from cvlab.runs.records import MAX_JSON_BYTES, is_run
from cvlab.runs.removal import TRASH, obstacle
from cvlab.storage import atomic, regular_files
from cvlab.storage.failpoints import reach
from cvlab.storage.lock import RunLock

FORMAT = "cvlab runs 1"
MANIFEST = "manifest.json"
LOCK_FILE = "run.lock"
OMITTED_FOLDERS = ("trackers", "__pycache__")
CHECKPOINT_SUFFIX = ".pt"
REFUSED_SUFFIXES = frozenset(  # files that run code when they are loaded; cvlab writes none
    {".pkl", ".pickle", ".pth", ".ckpt", ".bin", ".joblib", ".dill", ".npy", ".npz"}
    | {suffix for suffix in importlib.machinery.all_suffixes() if suffix != ".py"}
)
MAX_FILES = 100_000
MAX_FILE_BYTES = 100 * 1024**3
MAX_NAME_CHARS, MAX_PATH_CHARS = 200, 1000
CHUNK_BYTES = 2**20
UNREADABLE = (
    zipfile.BadZipFile,
    regular_files.IrregularFileError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
AGAIN = "get the archive again"
Row = dict[str, Any]


def files_of(path: Path, with_checkpoints: bool) -> list[str]:
    """Return the files of a run that an archive takes, relative and sorted: none that are hidden, and no trackers'."""
    names = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if name not in OMITTED_FOLDERS and not name.startswith(".")]
        if not with_checkpoints:
            subfolders[:] = [name for name in subfolders if name != "checkpoints"]
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files]  # noqa: PTH118
    return sorted(name for name in names if not _is_omitted(PurePosixPath(name)))


def _is_omitted(name: PurePosixPath) -> bool:
    is_foreign = name.suffix in REFUSED_SUFFIXES or (name.suffix == CHECKPOINT_SUFFIX and not _is_checkpoint(name))
    return name.name.startswith(".") or name.name == LOCK_FILE or is_foreign


def _is_checkpoint(name: PurePosixPath) -> bool:
    return name.suffix == CHECKPOINT_SUFFIX and name.parent.name == "checkpoints"


def export_runs(paths: Sequence[Path], file: Path, with_checkpoints: bool = True) -> list[Row]:
    """Write runs into an archive, which appears when it is complete.

    Args:
        paths: The run directories; none may be running.
        file: The archive; it must not exist.
        with_checkpoints: Without them a run can be shown and compared, not resumed.

    Returns:
        `run`, `files`, `bytes` of each.

    Raises:
        ConfigError: Two runs have one name, or the file exists.
        RunDirError: A run is running, a file of it is no plain file, or its folder cannot be written.
    """
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs are called {max(names, key=names.count)}", "export them into two files")
    if os.path.lexists(file):
        raise ConfigError(f"{file}: exists already", "name another file, or remove it")
    for path in paths:
        reason = obstacle(path)
        if reason is not None and "running" in reason:
            raise RunDirError(f"{path.name}: {reason}", "interrupt it, or wait for its end")
        find.config_path(path)
    atomic.remove_stale_temporaries(file.parent, f".{file.name}-*{atomic.TEMPORARY}")
    rows: list[Row] = []

    def fill(target: BinaryIO) -> None:
        manifest: Row = {"format": FORMAT, "cvlab": __version__, "runs": {}}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for path in paths:
                entries = {}
                for name in files_of(path, with_checkpoints):
                    entries[name] = _store(archive, path / name, f"{path.name}/{name}")
                    reach("mid_export")
                manifest["runs"][path.name] = entries
                size = sum(entry["bytes"] for entry in entries.values())
                rows.append({"run": path.name, "files": len(entries), "bytes": size})
            archive.writestr(MANIFEST, json.dumps(manifest))

    atomic.write(file, fill)
    return rows


def _store(archive: zipfile.ZipFile, path: Path, member_name: str) -> Row:
    digest, size = hashlib.sha256(), 0
    try:
        with regular_files.open_binary(path, MAX_FILE_BYTES) as source:
            member = zipfile.ZipInfo(member_name)
            member.external_attr = 0o644 << 16
            member.file_size = os.fstat(source.fileno()).st_size
            with archive.open(member, "w") as target:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
    except (regular_files.IrregularFileError, UnicodeError) as error:
        raise RunDirError(f"{path}: {error}", "the run directory was changed") from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def import_runs(file: Path, root: Path) -> list[Row]:
    """Unpack the runs of an archive below the folder of the runs.

    Args:
        file: The archive.
        root: The folder of the runs; created if missing.

    Returns:
        `run`, `files`, `bytes`, `has_checkpoints`, `has_code` of each.

    Raises:
        DataError: The archive is missing, damaged, or not one that `export_runs` writes.
        RunDirError: A run of that name exists, or its folder cannot be written. Nothing was imported.
    """
    try:
        with regular_files.open_binary(file, MAX_FILE_BYTES) as source, zipfile.ZipFile(source) as archive:
            runs = _read_manifest(archive, file)
            for name in runs:
                if os.path.lexists(root / name):
                    raise RunDirError(
                        f"{root / name}: exists already, nothing was imported",
                        f"rename it, remove it with `cvlab runs rm {name}`, or name another --runs-dir",
                    )
            return _unpack(archive, runs, file, root)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except UNREADABLE as error:
        raise DataError(f"{file}: not an archive of runs: {error}", AGAIN) from error
    except OSError as error:
        raise atomic.disk_error(root, error) from error


def _read_manifest(archive: zipfile.ZipFile, file: Path) -> dict[str, dict[str, Row]]:
    """Return the files of each run. DataError unless the members are exactly these, stored, with safe names."""
    members = {member.filename: member for member in archive.infolist()}
    if MANIFEST not in members:
        raise DataError(f"{file}: has no {MANIFEST}, so no archive of runs", "`cvlab runs export` writes one")
    if len(members) < len(archive.infolist()) or len(members) > MAX_FILES:
        raise DataError(f"{file}: has a member twice, or more than {MAX_FILES}", AGAIN)
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members.values()):
        raise DataError(f"{file}: has compressed or encrypted members", "import it as `cvlab runs export` wrote it")
    size = file.stat().st_size
    if sum(member.file_size for member in members.values()) > size or members[MANIFEST].file_size > MAX_JSON_BYTES:
        raise DataError(f"{file}: its members are larger than it is", AGAIN)
    manifest = json.loads(archive.read(MANIFEST))
    runs = manifest.get("runs") if isinstance(manifest, dict) else None
    if not isinstance(runs, dict) or not runs or manifest.get("format") != FORMAT:
        raise DataError(f"{file}: {MANIFEST} is not one that cvlab {__version__} reads", AGAIN)
    listed = {MANIFEST}
    for run, entries in runs.items():
        _require_valid(run, entries, members, file)
        listed |= {f"{run}/{name}" for name in entries}
    extra = sorted(members.keys() - listed)
    if extra:
        raise DataError(f"{file}: {extra[0]!r:.80} is not in {MANIFEST}", AGAIN)
    return runs


def _require_valid(run: str, entries: Any, members: dict[str, zipfile.ZipInfo], file: Path) -> None:
    """Raise DataError unless the files of a run have names inside of it, the sizes of the members, and no code."""
    is_name = run.isprintable() and not set(run) & set("/\\:") and len(run) <= MAX_NAME_CHARS and run[:1] not in ".- "
    if not is_name or run in ("", find.LATEST, MANIFEST) or not isinstance(entries, dict):
        raise DataError(f"{file}: {run!r:.80} is no name of a run", AGAIN)
    if "config.yaml" not in entries:
        raise DataError(f"{file}: {run} has no config.yaml", AGAIN)
    for name, entry in entries.items():
        path = PurePosixPath(name)
        is_inside = name == str(path) and not path.is_absolute() and not {"..", "."} & set(path.parts)
        if not is_inside or not name.isprintable() or "\\" in name or len(name) > MAX_PATH_CHARS:
            raise DataError(f"{file}: the member {name!r:.80} would be written outside of its run", AGAIN)
        if any(part.startswith(".") for part in path.parts) or _is_omitted(path):
            raise DataError(f"{file}: {name!r:.80} is not a file of a run", "it may be code; get another archive")
        member = members.get(f"{run}/{name}")
        kind = (member.external_attr >> 16) & 0o170000 if member else 0
        if member is None or member.is_dir() or kind not in (0, 0o100000):
            raise DataError(f"{file}: {name!r:.80} is missing, or no plain file", AGAIN)
        if not isinstance(entry, dict) or entry.get("bytes") != member.file_size:
            raise DataError(f"{file}: {name!r:.80} has another size than {MANIFEST} says", AGAIN)


def _unpack(archive: zipfile.ZipFile, runs: dict[str, dict[str, Row]], file: Path, root: Path) -> list[Row]:
    with _hidden_folder(root) as folder:
        rows = []
        for run, entries in runs.items():
            for name, entry in entries.items():
                _write_member(archive, f"{run}/{name}", folder / run / name, entry, file)
                reach("mid_import")
            _require_loadable(folder / run, entries, file)
            rows.append(
                {
                    "run": run,
                    "files": len(entries),
                    "bytes": sum(entry["bytes"] for entry in entries.values()),
                    "has_checkpoints": any(name.endswith(CHECKPOINT_SUFFIX) for name in entries),
                    "has_code": any(name.endswith(".py") for name in entries),
                }
            )
        for run in runs:
            if os.path.lexists(root / run):
                raise RunDirError(f"{root / run}: exists already", "import again")
            (folder / run).rename(root / run)
        atomic.sync_directory(root)
    return rows


@contextlib.contextmanager
def _hidden_folder(root: Path) -> Iterator[Path]:
    """Create a hidden folder, locked, and remove it at the end; if this is killed, the next `runs rm` removes it."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{TRASH}import-{secrets.token_hex(4)}"
    folder.mkdir()
    lock = RunLock(folder)
    lock.acquire()
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _write_member(archive: zipfile.ZipFile, member: str, path: Path, entry: Row, file: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with archive.open(member) as source, path.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            size += len(chunk)
            if size > entry["bytes"]:
                raise DataError(f"{file}: {member!r:.80} is larger than it says", AGAIN)
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        atomic.sync_file(target.fileno(), path)
    if size != entry["bytes"] or digest.hexdigest() != entry.get("sha256"):
        raise DataError(f"{file}: {member!r:.80} is damaged: its checksum differs", AGAIN)


def _require_loadable(path: Path, entries: dict[str, Row], file: Path) -> None:
    """Raise DataError unless all checkpoints of a run are valid; none of them can run code."""
    names = [name for name in entries if name.endswith(CHECKPOINT_SUFFIX)]
    if names:
        from cvlab.errors import CheckpointError
        from cvlab.runs import checkpoint  # loads torch

        for name in names:
            try:
                checkpoint.load(path / name)
            except CheckpointError as error:
                reason = error.message.removeprefix(f"{path / name}: ")
                raise DataError(f"{file}: {path.name}/{name}: {reason}", AGAIN) from error
    if not is_run(path):
        raise DataError(f"{file}: {path.name} is no run", AGAIN)
