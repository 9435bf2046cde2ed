"""Unpacking zip files that nobody has to trust, by the same rules as data/archive.py."""

import stat
import zipfile
import zlib
from pathlib import Path

from cvlab.errors import DataError
from cvlab.storage import archives

FAILURES = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)


def extract(path: Path, folder: Path, *, max_bytes: int, max_members: int) -> None:
    """Unpack a zip file below `folder`; DataError for anything but files and folders inside it.

    Sizes are counted as they are written, whatever the headers claim. Nothing keeps its owner, mode or time.
    """
    written = 0
    try:
        with zipfile.ZipFile(path) as source:
            if len(source.infolist()) > max_members:
                raise DataError(f"{path}: more than {max_members} members", "get the archive again")
            for member in source.infolist():
                target = folder / archives._safe_path(member.filename, path)
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise DataError(f"{path}: {member.filename[:80]!r} is not a plain file", "get the archive again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as content, target.open("xb") as file:
                    while chunk := content.read(1024**2):
                        written += len(chunk)
                        if written > max_bytes:
                            raise DataError(f"{path}: unpacks to more than {max_bytes} bytes", "get it again")
                        file.write(chunk)
    except FAILURES as error:
        raise DataError(f"{path}: cannot be unpacked: {error}", "get the archive again") from error
