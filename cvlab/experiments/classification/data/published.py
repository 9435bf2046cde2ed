"""Published data sets: the files of each, verified with the published checksums, and how they are installed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvlab.data import descriptions
from cvlab.errors import DataError
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource
from cvlab.storage import archives, download
from cvlab.storage.cache import install_folder, temporary_folder

MAX_MEMBERS = 20  # of an archive; those of photos are unpacked elsewhere


@dataclass(frozen=True)
class Download:
    """A file to download.

    Attributes:
        name: Its name.
        checksum: As `download.verify` takes it.
        size: In bytes.
        urls: The official source, then mirrors of the same bytes.
    """

    name: str
    checksum: str
    size: int
    urls: tuple[str, ...]


class PublishedFiles:
    """The files of a data set, in a folder of their own below the root folder.

    Args:
        name: Name of the data set.
        folder: The folder, relative to the root folder.
        downloads: Each of the files, or the archive that holds the folder.
        members: Checksum of each file of the archive, by name.
    """

    def __init__(
        self, name: str, folder: str, downloads: Sequence[Download], members: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.folder, self.downloads = name, folder, downloads
        self.checksums = members or {each.name: each.checksum for each in downloads}
        self.hint = f"`cvlab data fetch {name}` gets a good copy"

    @property
    def archive(self) -> Download | None:
        """The archive that holds the folder, if there is one."""
        return self.downloads[0] if self.downloads[0].name not in self.checksums else None

    def source(self, read: Callable[[Path], ImageDataset]) -> ImageDatasetSource:
        """Return the row of the table of data sets; `read` makes a data set of the files below a root folder."""
        return ImageDatasetSource(
            **descriptions.of_source("images", self.name), read=read, check=self.check, fetch=self.fetch
        )

    def read(self, root: Path, name: str) -> bytes:
        """Return the content of a file. Raises DataError if it is missing or differs from the published one."""
        return self._read_verified(root / self.folder, name)

    def _read_verified(self, folder: Path, name: str) -> bytes:
        try:
            raw = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror or error}", self.hint) from error
        if not download.matches([raw], self.checksums[name]):
            algorithm = download.algorithm_of(self.checksums[name])
            raise DataError(f"{folder / name}: differs from the published file ({algorithm})", self.hint)
        return raw

    def check(self, root: Path) -> str:
        """Compare every file with its published checksum. Raises DataError."""
        for name in self.checksums:
            self.read(root, name)
        return f"{len(self.checksums)} files equal to the published ones"

    def fetch(self, root: Path, origin: Path | None, wait: bool) -> None:
        """Download the data set, or copy it from `origin`: the archive, or a folder with the archive or the files."""
        if origin is None:
            self._download(root, wait)
            return
        archive = self.archive
        if archive is not None:
            for path in (origin / archive.name, origin) if origin.is_dir() else (origin,):
                if path.is_file():
                    download.verify(path, archive.checksum)
                    self._install_archive(path, root)
                    return
        for folder in (origin / self.folder, origin):
            if all((folder / name).is_file() for name in self.checksums):
                self._install_folder(folder, root)
                return
        expected = f"a folder with {', '.join(self.checksums)}"
        hint = "give one of the two" if archive else "give such a folder"
        raise DataError(
            f"{origin}: neither {archive.name} nor {expected}" if archive else f"{origin}: not {expected}", hint
        )

    def _download(self, root: Path, wait: bool) -> None:
        folder = root / "downloads" / self.name
        paths = [download.fetch(d.urls, folder / d.name, d.checksum, d.size, wait) for d in self.downloads]
        if self.archive is not None:
            self._install_archive(paths[0], root)
        else:
            self._install_folder(folder, root)
        for path in paths:
            path.unlink()

    def _install_archive(self, path: Path, root: Path) -> None:
        with temporary_folder(root) as scratch:
            archives.extract_tar(path, scratch, max_bytes=400_000_000, max_members=MAX_MEMBERS)
            self._install_folder(scratch / self.folder, root)

    def _install_folder(self, folder: Path, root: Path) -> None:
        """Copy the verified files into a temporary folder, then rename it in one step."""
        with temporary_folder(root) as scratch:
            new = scratch / "new"
            new.mkdir()
            for name in self.checksums:
                (new / name).write_bytes(self._read_verified(folder, name))
            install_folder(new, root / self.folder)
