"""Read frames of videos and cameras, and write videos. PyAV, an extra, does the work: `pip install -e '.[video]'`.

Only files of well-known containers are opened, and they cannot refer to other files or addresses. Frames are decoded
one by one, so a long video takes no more memory than a short one.
"""

import itertools
import os
import stat
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.data.photo_paths import MAX_PIXELS
from cvlab.errors import ConfigError, DataError, install_command

if TYPE_CHECKING:
    from PIL import Image

CONTAINERS = ("mov", "mp4", "m4v", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif")
SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv")
FORMAT_HINT = "give an MP4, MOV, MKV, WebM or AVI file"
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
CODECS = ("libx264", "mpeg4")  # of written videos, the first that PyAV has
MAX_MPEG4_TIME_BASE = 65535  # of the mpeg4 codec: ticks per second
DEFAULT_RATE = Fraction(25)  # of a video that does not say it


@dataclass(frozen=True)
class VideoInfo:
    """What a video says about itself.

    Attributes:
        rate: Frames per second, on average.
        time_base: Seconds per tick of the frames' time stamps.
        num_frames: Number of frames, None if unknown. Files may be wrong about it.
    """

    rate: Fraction
    time_base: Fraction
    num_frames: int | None


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: Its number in the video, from 0.
        time_s: When it is shown, in seconds after the first frame.
        image: RGB, upright.
    """

    index: int
    time_s: float
    image: "Image.Image"


def is_camera(source: str) -> bool:
    """Whether a source is the number of a camera, and not a file."""
    return source.isascii() and source.isdecimal()


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos are read by PyAV, which is not installed", install_command("video")) from error
    # Messages are logged in Python, by torchvision's choice up to 0.25: a decoding thread then waits for the GIL, which
    # the thread that closes the container holds.
    av.logging.set_level(None)
    return av


def _open(source: str) -> Any:
    """Open a file or a camera. DataError if it cannot be opened."""
    av = _import_av()
    if is_camera(source):
        return _open_camera(av, source)
    if "://" in source:
        raise DataError(f"{source}: URLs are not opened", "save the video and give its file")
    if not os.path.lexists(source):
        raise DataError(f"{source}: no such file", "give a video file, or the number of a camera")
    if not os.path.isfile(source):
        raise DataError(f"{source}: not a file", FORMAT_HINT)
    try:
        return av.open(source, options=OPTIONS)
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(f"{source}: {error.strerror}", "the file cannot be read") from error
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{source}: not a video that can be read", FORMAT_HINT) from error


def _open_camera(av: Any, source: str) -> Any:
    """Open a camera through Video4Linux2."""
    device = Path(f"/dev/video{int(source)}")
    if not sys.platform.startswith("linux"):
        raise DataError(f"camera {source}: cameras are read on Linux only", FORMAT_HINT)
    if not device.exists() or not stat.S_ISCHR(device.stat().st_mode):
        cameras = sorted(path.name.removeprefix("video") for path in Path("/dev").glob("video[0-9]*"))
        hint = f"there are: {', '.join(cameras)}" if cameras else "connect a camera, or give a video file"
        raise DataError(f"camera {source}: there is no {device}", hint)
    try:
        return av.open(str(device), format="v4l2")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"camera {source}: {reason}", "another program may use it, or you may not") from error


def _video_stream(container: Any, source: str) -> Any:
    """Return the video stream of a container. DataError if it has none, or its frames are too large."""
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not streams:
        raise DataError(f"{source}: has no video stream", FORMAT_HINT)
    stream = streams[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise DataError(f"{source}: frames of more than {MAX_PIXELS // 10**6} megapixels", "make it smaller")
    if not is_camera(source):
        stream.thread_type = "AUTO"
    return stream


def probe(source: str) -> VideoInfo:
    """Return what a video says about itself; one frame is decoded.

    Args:
        source: A file, or the number of a camera.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: It is no video, cannot be read, or has no frame.
    """
    with _open(source) as container:
        stream = _video_stream(container, source)
        info = _info(container, stream, is_camera(source))
        if next(_decoded(container, stream), None) is None:
            raise DataError(f"{source}: has no frame that can be decoded", FORMAT_HINT)
        return info


def _info(container: Any, stream: Any, is_live: bool) -> VideoInfo:
    rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
    num_frames = stream.frames or None
    if not num_frames and container.duration:
        num_frames = max(1, round(container.duration / 1e6 * rate))
    return VideoInfo(Fraction(rate), Fraction(stream.time_base), None if is_live else num_frames)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a stream; packets that are damaged are skipped."""
    av = _import_av()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            decoded = packet.decode()
        except av.error.InvalidDataError:
            continue
        except av.error.EOFError:
            return
        yield from decoded


def read(source: str, every: int = 1, max_frames: int | None = None) -> Generator[Frame, None, None]:
    """Yield every N-th frame of a video, from the first on, at most `max_frames` of them.

    Args:
        source: A file, or the number of a camera.
        every: N; the others are decoded but not converted.
        max_frames: None: all.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: It is no video or cannot be read.
    """
    av = _import_av()
    with _open(source) as container:
        stream = _video_stream(container, source)
        info = _info(container, stream, is_camera(source))
        first = None
        size: tuple[int, int] | None = None
        frames = itertools.islice(enumerate(_decoded(container, stream)), 0, None, every)
        try:
            for index, frame in itertools.islice(frames, max_frames):
                pts = frame.pts if frame.pts is not None else round(index / info.rate / info.time_base)
                first = pts if first is None else first
                image = _upright(frame)
                size = size or image.size
                time_s = float((pts - first) * info.time_base)
                yield Frame(index, time_s, image if image.size == size else image.resize(size))
        except (av.FFmpegError, OSError) as error:
            raise DataError(
                f"{source}: {getattr(error, 'strerror', None) or error}", "it can no longer be read"
            ) from error


def _upright(frame: Any) -> "Image.Image":
    """Return a frame as RGB, rotated as its display matrix says: phones write it."""
    image: Image.Image = frame.to_image()
    degrees = 90 * round(frame.rotation / 90) % 360  # counterclockwise, as Pillow counts
    return image.rotate(degrees, expand=True) if degrees else image


class VideoWriter:
    """Writes an MP4 of frames of one size, H.264 or, if PyAV lacks that, MPEG-4 part 2; playable once it is closed.

    Args:
        path: The file.
        size: Width and height of the frames; the video's are the next even numbers, as its colors are subsampled.
        rate: Frames per second, on average.
        time_base: Seconds per tick of the time stamps.

    Raises:
        OSError: The file cannot be written; the methods raise it, too.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, time_base: Fraction) -> None:
        av = _import_av()
        self.codec = next(name for name in CODECS if name in av.codecs_available)
        if self.codec == "mpeg4" and time_base.denominator > MAX_MPEG4_TIME_BASE:
            time_base = Fraction(1, MAX_MPEG4_TIME_BASE)
        self._av, self._time_base = av, time_base
        self.size = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self._container = av.open(str(path), "w", format="mp4")
        options = {"preset": "veryfast", "crf": "23"} if self.codec == "libx264" else {"qscale": "4"}
        self._stream = self._container.add_stream(self.codec, rate=rate, options=options)
        self._stream.width, self._stream.height = self.size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = time_base
        self._last = -1

    def write(self, image: "Image.Image", time_s: float) -> None:
        """Append a frame that is shown from `time_s` on."""
        if image.size != self.size:
            image = image.crop((0, 0, *self.size))  # black where the photo does not reach
        frame = self._av.VideoFrame.from_image(image)
        self._last = max(round(time_s / self._time_base), self._last + 1)
        frame.pts, frame.time_base = self._last, self._time_base
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        """Write what is left, and the index of the file."""
        try:
            for packet in self._stream.encode(None):
                self._container.mux(packet)
        finally:
            self._container.close()
