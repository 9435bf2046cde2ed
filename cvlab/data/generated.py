"""Built-in data sets: generated at first use and cached with checksums, or in a temporary folder if that fails."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cvlab import console, portability
from cvlab.errors import CvlabError, DataError
from cvlab.storage import atomic
from cvlab.storage.cache import temporary_folder

CHECKSUM_FILE = "sha256.json"
HINT = "remove that folder; the next run generates it again"


@dataclass
class GeneratedDataset:
    """A data set in `<root>/<name>-v<version>/`.

    Attributes:
        name: The name of the data set.
        version: Part of the folder's name; raise it when the files change.
        num_images: For the message while it is generated.
        files: Yields every file: its path relative to the folder, and its content.
        temporary: The folder used if nothing can be cached; it lives as long as the process.
    """

    name: str
    version: int
    num_images: int
    files: Callable[[], Iterator[tuple[str, bytes]]]
    temporary: "tempfile.TemporaryDirectory[str] | None" = field(default=None, repr=False)

    @property
    def folder_name(self) -> str:
        """The name of the folder."""
        return f"{self.name}-v{self.version}"

    def folder(self, root: Path) -> Path:
        """Return the folder: cached and verified, or generated now; a temporary one if it cannot be cached."""
        if self.ready(root):
            self.verify(root / self.folder_name)
            return root / self.folder_name
        console.info(f"generating {self.name}, {self.num_images} images, once")
        try:
            return self._generate(root)
        except (OSError, CvlabError) as error:
            console.debug(f"{self.name} is not cached: {error}")
            return self._generate_temporary()

    def ready(self, root: Path) -> bool:
        """Return whether the data set is cached."""
        return (root / self.folder_name / CHECKSUM_FILE).is_file()

    def check(self, root: Path) -> str:
        """Compare the cached files with their checksums."""
        if not self.ready(root):
            return "built in, generated at first use"
        return f"{self.verify(root / self.folder_name)} files equal to their checksums"

    def write(self, target: Path) -> None:
        """Generate all files into a folder, the checksums last."""
        digests: dict[str, str] = {}
        for name, content in self.files():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            digests[name] = hashlib.sha256(content).hexdigest()
        atomic.write_text(target / CHECKSUM_FILE, json.dumps(digests))

    def verify(self, folder: Path) -> int:
        """Compare every file of a folder with its checksum; return the number of files. Raises DataError."""
        try:
            digests = json.loads((folder / CHECKSUM_FILE).read_bytes())
            for name, digest in digests.items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise DataError(f"{folder / name}: damaged, its checksum differs", HINT)
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{folder}: cannot be read: {error}", HINT) from error
        return len(digests)

    def _generate(self, root: Path) -> Path:
        """Generate into a temporary folder, then rename it in one step."""
        with temporary_folder(root) as scratch:
            new = scratch / self.folder_name
            self.write(new)
            target = root / self.folder_name
            if target.exists() and not self.ready(root):
                shutil.rmtree(target)
            try:
                portability.replace(new, target)
            except OSError:
                if not self.ready(root):  # otherwise another process was faster, with the same files
                    raise
            atomic.sync_directory(root)
            return target

    def _generate_temporary(self) -> Path:
        """Generate a copy that lives as long as this process."""
        if self.temporary is None:
            self.temporary = tempfile.TemporaryDirectory(prefix=f"cvlab-{self.name}-")
            self.write(Path(self.temporary.name))
        return Path(self.temporary.name)
