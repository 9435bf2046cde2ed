"""Sets that cvlab makes itself: generated once, kept, checksummed; in a temporary folder where nothing can be kept."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cvlab import console
from cvlab.errors import CvlabError, DataError
from cvlab.storage import atomic
from cvlab.storage.cache import temporary_folder

SUMS = "sha256.json"
HINT = "remove that folder; the next run generates it again"


@dataclass
class GeneratedDataset:
    """A set in `<root>/<name>-v<version>/`, made of what `files()` yields: paths in the folder, and their contents."""

    name: str
    version: int
    pictures: int
    files: Callable[[], Iterator[tuple[str, bytes]]]
    temporary: "tempfile.TemporaryDirectory[str] | None" = field(default=None, repr=False)  # until the process ends

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"{self.name}-v{self.version}"

    def folder(self, root: Path) -> Path:
        """Return the folder of the set: kept and verified, else generated; a temporary one where it can't be kept."""
        if self.ready(root):
            self.verify(root / self.folder_name)
            return root / self.folder_name
        console.info(f"generating {self.name}, {self.pictures} pictures, once")
        try:
            return self._keep(root)
        except (OSError, CvlabError) as error:
            console.debug(f"{self.name} is not kept: {error}")
            return self._temporary()

    def ready(self, root: Path) -> bool:
        """Whether the set was generated before."""
        return (root / self.folder_name / SUMS).is_file()

    def check(self, root: Path) -> str:
        """Compare what is kept with its checksums."""
        if not self.ready(root):
            return "built in, generated at first use"
        return f"{self.verify(root / self.folder_name)} files equal to their checksums"

    def write(self, target: Path) -> None:
        """Generate all files and write them into a folder, the checksums last."""
        digests: dict[str, str] = {}
        for name, content in self.files():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            digests[name] = hashlib.sha256(content).hexdigest()
        atomic.write_text(target / SUMS, json.dumps(digests))

    def verify(self, kept: Path) -> int:
        """Compare every file of a folder with its checksum; return how many there are."""
        try:
            digests = json.loads((kept / SUMS).read_bytes())
            for name, digest in digests.items():
                if hashlib.sha256((kept / name).read_bytes()).hexdigest() != digest:
                    raise DataError(f"{kept / name}: damaged, its checksum differs", HINT)
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{kept}: cannot be read: {error}", HINT) from error
        return len(digests)

    def _keep(self, root: Path) -> Path:
        """Generate the set beside its place, then move it there in one step."""
        with temporary_folder(root) as scratch:
            made = scratch / self.folder_name
            self.write(made)
            target = root / self.folder_name
            if target.exists() and not self.ready(root):
                shutil.rmtree(target)
            try:
                made.replace(target)
            except OSError:
                if not self.ready(root):  # else another process was quicker, with the same pictures
                    raise
            atomic.sync_directory(root)
            return target

    def _temporary(self) -> Path:
        """Generate the set for this process only."""
        if self.temporary is None:
            self.temporary = tempfile.TemporaryDirectory(prefix=f"cvlab-{self.name}-")
            self.write(Path(self.temporary.name))
        return Path(self.temporary.name)
