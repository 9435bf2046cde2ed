"""Unpacking archives that nobody has to trust: only plain files and folders, inside, of a bounded size."""

import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from cvlab.errors import DataError

FAILURES = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise DataError(f"{archive}: the member {name[:80]!r} would be written outside", "get the archive again")
    return path


def extract_tar(archive: Path, folder: Path, *, max_bytes: int, max_members: int) -> None:
    """Unpack a tar file (of any compression) below `folder`; DataError for anything but files and folders inside it.

    Sizes are counted as they are written, whatever the headers claim. Nothing keeps its owner, mode or time.
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
    except FAILURES as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}", "get the archive again") from error
