"""Detection and tracking in a video, for `cvlab detect --source`: writes the video with boxes, and a table."""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cvlab.console import Progress
from cvlab.data import prefetch, videos
from cvlab.data.videos import Frame, VideoInfo, VideoWriter
from cvlab.errors import DataError, StoppedError
from cvlab.experiments.detection import drawing, inference
from cvlab.experiments.detection.config import DetectConfig
from cvlab.experiments.detection.drawing import LabeledBox
from cvlab.experiments.detection.inference import LoadedDetector
from cvlab.experiments.detection.tracking import ByteTracker
from cvlab.ops.average_precision import Detections
from cvlab.reports import images as reports_images
from cvlab.reports import tables
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

VIDEO, TRACKS, PICTURE = "video.mp4", "tracks.csv", "images/frame.png"
HEADER = ("frame", "time_s", "track_id", "class", "score", "x1", "y1", "x2", "y2")
AHEAD = 2  # batches that are decoded while the detector is at work


def run(config: DetectConfig, detector: LoadedDetector, out: RunDir, columns: Sequence[Column]) -> dict[str, float]:
    """Detect objects in the frames of a video or a camera until it ends.

    Args:
        config: The video, and what is done about it.
        detector: The detector.
        out: The run directory. A run that is stopped leaves a video and a table that are complete up to that frame.
        columns: How tables and pages show the result.

    Returns:
        `num_frames`, `frames_per_second`, and `num_tracks` or, without tracking, `num_objects`.

    Raises:
        DataError: The video cannot be read, or has no frame.
        StoppedError: A signal was received.
    """
    assert config.source is not None
    info = videos.probe(config.source)
    out.write_text(TRACKS, inference.csv_lines([HEADER]))
    start = time.monotonic()
    with AnnotatedVideo(config, detector, out, info) as work, StopRequest() as stop:
        total = _num_frames(config, info)
        with Progress("detect", total) as progress:

            def check_interrupt() -> None:
                if stop.received is not None:
                    raise _stopped(stop, work.num_frames, out.path.name)
                if progress.due():
                    progress.update(work.num_frames, f"frame {work.num_frames}")

            for batch in _batches(config, check_interrupt):
                for frame, detections in zip(batch, work.predict(batch), strict=True):
                    work.add(frame, detections)
                check_interrupt()
    seconds = time.monotonic() - start
    if not work.num_frames:
        raise DataError(f"{config.source}: has no frame that can be decoded", videos.FORMAT_HINT)
    what = "track" if config.track else "object"
    frames = f"{work.num_frames} frame{'s' * (work.num_frames != 1)}"
    counts = dict(work.counts.most_common())
    files = {"picture": PICTURE, "video": VIDEO, "tracks": TRACKS}
    result = PhotoResult(config.source, {"frames": work.num_frames, "class_counts": counts}, files)
    out.extra_summary |= summarize([result], columns)
    out.extra_summary |= {"class_counts": counts, "headline": inference.headline(counts, what, frames)}
    return {
        "num_frames": work.num_frames,
        f"num_{what}s": sum(counts.values()),
        "frames_per_second": work.num_frames / max(seconds, 1e-9),
    }


def _num_frames(config: DetectConfig, info: VideoInfo) -> int | None:
    """Return how many frames will be processed, None if unknown."""
    of_video = -(-info.num_frames // config.every) if info.num_frames else None
    counts = [count for count in (of_video, config.max_frames) if count]
    return min(counts) if counts else None


def _stopped(stop: StopRequest, num_frames: int, run: str) -> StoppedError:
    error = stop.error(num_frames, run, "frame")
    error.hint = f"{VIDEO} and {TRACKS} end there; `cvlab resume {run}` begins again"
    return error


def _batches(config: DetectConfig, check_interrupt: Callable[[], None]) -> Iterator[list[Frame]]:
    """Yield batches of frames, which are decoded in a thread; those of a camera one by one, as they come."""
    assert config.source is not None
    size = 1 if videos.is_camera(config.source) else config.batch_size
    frames = videos.read(config.source, config.every, config.max_frames)
    with contextlib.closing(prefetch.read_ahead(frames, AHEAD * size, check_interrupt)) as ahead:
        while batch := list(itertools.islice(ahead, size)):
            yield batch


class AnnotatedVideo:
    """Writes the frames with boxes and the rows of the table, and counts; the video is playable once it is closed.

    Attributes:
        num_frames: Number of frames so far.
        counts: Number of tracks so far by class; without tracking of detections.
    """

    def __init__(self, config: DetectConfig, detector: LoadedDetector, out: RunDir, info: VideoInfo) -> None:
        self.num_frames = 0
        self.counts: Counter[str] = Counter()
        self._config, self._detector, self._out, self._info = config, detector, out, info
        self._tracker = ByteTracker(detector.score_threshold, config.track_buffer) if config.track else None
        self._num_counted = 0  # tracks; their ids count from 1
        self._writer: VideoWriter | None = None
        self._has_picture = False

    def __enter__(self) -> "AnnotatedVideo":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._out.write(VIDEO, lambda _: writer.close())

    def predict(self, batch: Sequence[Frame]) -> list[Detections]:
        """Return the detections in frames; with tracking also those of low scores, which may continue a track."""
        threshold = self._tracker.low_score if self._tracker else self._detector.score_threshold
        return self._detector.predict([frame.image for frame in batch], threshold, self._config.iou)

    def add(self, frame: Frame, detections: Detections) -> None:
        """Track the detections of the next frame, and write it."""
        ids: list[int | None] = [None] * len(detections.scores)
        if self._tracker is not None:
            track_ids = self._tracker.update(detections)
            detections = inference.select(detections, track_ids > 0)
            ids = track_ids[track_ids > 0].tolist()
        names = [self._detector.classes[label] for label in detections.labels.tolist()]
        self._count(names, ids)
        picture = drawing.draw(frame.image, self._labeled_boxes(detections, names, ids))
        self._write(frame, picture)
        if not self._has_picture and (names or not self.num_frames):
            self._out.write_bytes(PICTURE, reports_images.png(picture))
            self._has_picture = bool(names)
        self._out.append_text(TRACKS, inference.csv_lines(_table_rows(frame, detections, names, ids)))
        self.num_frames += 1

    def _count(self, names: Sequence[str], ids: Sequence[int | None]) -> None:
        """Count the detections, or the tracks that are new."""
        self.counts.update(
            name for name, track_id in zip(names, ids, strict=True) if track_id is None or track_id > self._num_counted
        )
        self._num_counted = max([self._num_counted, *(track_id for track_id in ids if track_id is not None)])

    def _labeled_boxes(
        self, detections: Detections, names: Sequence[str], ids: Sequence[int | None]
    ) -> list[LabeledBox]:
        """Return the boxes to draw, in the color of the track, or else of the class."""
        if self._tracker is None:
            return inference.labeled_boxes(detections, self._detector.classes)
        triples = zip(names, ids, detections.boxes_xyxy.tolist(), strict=True)
        return [LabeledBox(tuple(box), f"{name} {track_id}", track_id or 0) for name, track_id, box in triples]

    def _write(self, frame: Frame, picture: Image.Image) -> None:
        """Append a frame to the video, which the first one opens: only then its upright size is known."""

        def append(path: Path) -> None:
            if self._writer is None:
                rate = self._info.rate / self._config.every
                self._writer = VideoWriter(path, picture.size, rate, self._info.time_base)
            self._writer.write(picture, frame.time_s)

        self._out.write(VIDEO, append)


def _table_rows(
    frame: Frame, detections: Detections, names: Sequence[str], ids: Sequence[int | None]
) -> Iterator[list[Any]]:
    """Yield the rows of the table for a frame; its columns are `HEADER`."""
    columns = (ids, names, detections.scores.tolist(), detections.boxes_xyxy.tolist())
    for track_id, name, score, box in zip(*columns, strict=True):
        about = [frame.index, round(frame.time_s, 6), tables.csv_cell(track_id), tables.csv_cell(name), round(score, 6)]
        yield [*about, *(round(edge, 2) for edge in box)]
