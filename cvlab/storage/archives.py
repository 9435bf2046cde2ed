"""Unpack archives that need not be trusted: only plain files and folders, inside the target, of a bounded size."""

import lzma
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from cvlab.errors import DataError

TAR_FAILURES = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
ZIP_FAILURES = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts or any(PureWindowsPath(part).drive for part in path.parts)
    if leads_out or "\\" in name or "\0" in name or not path.parts:
        raise DataError(f"{archive}: the member {name[:80]!r} would be written outside", "get the archive again")
    return path


def extract_tar(archive: Path, folder: Path, *, max_bytes: int, max_members: int) -> None:
    """Unpack a tar file of any compression.

    Sizes are counted as they are written, whatever the headers claim. Owners, modes and times are not restored.

    Args:
        archive: The tar file.
        folder: Where to unpack it.
        max_bytes: Largest size of all files together.
        max_members: Largest number of files and folders.

    Raises:
        DataError: It is damaged, too large, or has members other than files and folders inside it.
    """
    written = 0
    try:
        with tarfile.open(archive) as tar:
            for number, member in enumerate(tar):
                if number >= max_members:
                    raise DataError(f"{archive}: more than {max_members} members", "get the archive again")
                target = folder / _safe_path(member.name, archive)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                source = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if source is None:
                    raise DataError(f"{archive}: {member.name[:80]!r} is not a plain file", "get the archive again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    while chunk := source.read(1024**2):
                        written += len(chunk)
                        if written > max_bytes:
                            raise DataError(f"{archive}: unpacks to more than {max_bytes} bytes", "get it again")
                        file.write(chunk)
    except TAR_FAILURES as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}", "get the archive again") from error


def extract_zip(archive: Path, folder: Path, *, max_bytes: int, max_members: int) -> None:
    """Unpack a zip file; arguments, guarantees and errors are those of `extract_tar`."""
    written = 0
    try:
        with zipfile.ZipFile(archive) as source:
            if len(source.infolist()) > max_members:
                raise DataError(f"{archive}: more than {max_members} members", "get the archive again")
            for member in source.infolist():
                target = folder / _safe_path(member.filename, archive)
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise DataError(f"{archive}: {member.filename[:80]!r} is not a plain file", "get the archive again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as content, target.open("xb") as file:
                    while chunk := content.read(1024**2):
                        written += len(chunk)
                        if written > max_bytes:
                            raise DataError(f"{archive}: unpacks to more than {max_bytes} bytes", "get it again")
                        file.write(chunk)
    except ZIP_FAILURES as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}", "get the archive again") from error
