"""Digests of data, by which a run that is resumed notices that its data was changed."""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EDGE_BYTES = 4096  # read from the start and the end of a file


class DataDigest:
    """The digest of tensors, files and values, in the order in which they are added."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add_tensors(self, tensors: "Iterable[Tensor]") -> "DataDigest":
        """Add the shapes and contents of tensors."""
        for tensor in tensors:
            self.add_values([tuple(tensor.shape), str(tensor.dtype)])
            array = tensor.detach().cpu().contiguous().numpy()
            self._hash.update(array.reshape(-1).view("uint8").data)
        return self

    def add_files(self, paths: Iterable[Path]) -> "DataDigest":
        """Add names, sizes, and the first and last bytes of files; to read them whole would take too long.

        Of a file that cannot be read only the name counts; whatever decodes it raises the error.
        """
        for path in paths:
            self.add_values([path.name])
            with contextlib.suppress(OSError), path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.add_values([size])
                self._hash.update(file.read(EDGE_BYTES))
                file.seek(max(0, size - EDGE_BYTES))
                self._hash.update(file.read(EDGE_BYTES))
        return self

    def add_values(self, values: Iterable[Any]) -> "DataDigest":
        """Add values by their representation."""
        self._hash.update(repr(list(values)).encode())
        return self

    def hex(self) -> str:
        """Return the digest of all that was added."""
        return self._hash.hexdigest()
