"""Multi-object tracking by detection: the same object has the same id in all frames of a video.

Paper: Zhang et al., 2022, "ByteTrack: multi-object tracking by associating every detection box". The Kalman filter
predicts with constant velocity, as in Bewley et al., 2016, "Simple online and realtime tracking" (SORT).

Differences from the paper: the filter's state is center, width and height with their velocities, whose axes are
independent of each other (DeepSORT: aspect ratio and height). Tracks are reported with the box of their detection, not
with that of the filter, and a detection continues only tracks of its class. Tracks that come to lie on each other are
not removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvlab.ops import boxes
from cvlab.ops.average_precision import Detections
from cvlab.ops.linear_assignment import linear_assignment

Floats = NDArray[np.float64]
Item = TypeVar("Item")

LOW_SCORE = 0.1  # of detections that continue a track; ByteTrack's
MIN_IOU = 0.2  # of a track's predicted box with a detection of a high score; the paper's
MIN_IOU_LOW = 0.5  # with one of a low score; this and the next as in the authors' code
MIN_IOU_NEW = 0.3  # of a track's first box with its second
POSITION_STD = 1 / 20  # of a box's position and size in a frame, as a fraction of its size; these two as in DeepSORT
VELOCITY_STD = 1 / 160  # of the change of velocity from frame to frame


class KalmanFilter:
    """A box that moves with constant velocity: one filter for each of center x, center y, width and height.

    Attributes:
        mean: (4, 2), value and velocity per frame of each.
        covariance: (4, 2, 2).
    """

    TRANSITION = np.array([[1.0, 1.0], [0.0, 1.0]])

    def __init__(self, box_cxcywh: Floats) -> None:
        self.mean = np.stack([box_cxcywh, np.zeros(4)], 1)
        size = self._size()
        self.covariance = np.zeros((4, 2, 2))
        self.covariance[:, 0, 0] = (2 * POSITION_STD * size) ** 2
        self.covariance[:, 1, 1] = (10 * VELOCITY_STD * size) ** 2

    def _size(self) -> Floats:
        """Return width, height, width, height: what the noise of each value is proportional to."""
        size: Floats = np.maximum(np.tile(self.mean[2:, 0], 2), 1.0)
        return size

    def predict(self) -> None:
        """Advance by a frame."""
        size = self._size()
        self.mean = self.mean @ self.TRANSITION.T
        self.mean[2:, 0] = np.maximum(self.mean[2:, 0], 1.0)
        self.covariance = self.TRANSITION @ self.covariance @ self.TRANSITION.T
        self.covariance[:, 0, 0] += (POSITION_STD * size) ** 2
        self.covariance[:, 1, 1] += (VELOCITY_STD * size) ** 2

    def update(self, box_cxcywh: Floats) -> None:
        """Correct by a measured box."""
        variance = self.covariance[:, 0, 0] + (POSITION_STD * self._size()) ** 2
        gain = self.covariance[:, :, 0] / variance[:, None]  # (4, 2)
        self.mean = self.mean + gain * (box_cxcywh - self.mean[:, 0])[:, None]
        self.covariance = self.covariance - gain[:, :, None] * self.covariance[:, None, 0, :]


@dataclass(eq=False)
class Track:
    """An object: its motion, class and id (0 until it is confirmed), and for how many frames it has been lost."""

    motion: KalmanFilter
    label: int
    id: int = 0
    num_lost: int = 0


class ByteTracker:
    """Assigns the detections of each frame to tracks.

    Args:
        high_score: Detections of at least this score are associated first, and only they start a track. Those of lower
            scores continue tracks that are left.
        track_buffer: For this number of frames a track that is not detected is remembered.
    """

    def __init__(self, high_score: float, track_buffer: int) -> None:
        self.high_score, self.track_buffer = high_score, track_buffer
        self.low_score = min(LOW_SCORE, high_score)
        self.tracks: list[Track] = []
        self._num_confirmed = 0
        self._is_first_frame = True

    def update(self, detections: Detections) -> Tensor:
        """Advance by a frame and return the id of each detection's track.

        Args:
            detections: (N) detections of the next frame.

        Returns:
            ids: int64 (N,), from 1; 0 for a detection of no track, and for the first one of a track: a track is
                confirmed by a second detection in the next frame, those of the first frame at once.
        """
        for track in self.tracks:
            if track.num_lost:
                track.motion.mean[2:, 1] = 0  # an occluded object is assumed to keep its size
            track.motion.predict()
        confirmed = [track for track in self.tracks if track.id]
        new = [track for track in self.tracks if not track.id]
        scores = detections.scores
        high = (scores >= self.high_score).nonzero()[:, 0].tolist()
        low = ((scores < self.high_score) & (scores >= self.low_score)).nonzero()[:, 0].tolist()

        pairs = _associate(confirmed, detections, high, MIN_IOU)
        detected_last = [track for track in _without(confirmed, [track for track, _ in pairs]) if not track.num_lost]
        pairs += _associate(detected_last, detections, low, MIN_IOU_LOW)
        pairs += _associate(new, detections, _without(high, [k for _, k in pairs]), MIN_IOU_NEW)

        boxes_cxcywh = boxes.xyxy_to_cxcywh(detections.boxes_xyxy.double()).numpy()
        ids = torch.zeros(len(scores), dtype=torch.int64)
        for track, k in pairs:
            track.motion.update(boxes_cxcywh[k])
            track.num_lost = 0
            ids[k] = self._confirm(track)
        continued = [track for track, _ in pairs]
        lost = _without(confirmed, continued)
        for track in lost:
            track.num_lost += 1
        started = [
            (Track(KalmanFilter(boxes_cxcywh[k]), int(detections.labels[k])), k)
            for k in _without(high, [k for _, k in pairs])
        ]
        if self._is_first_frame:
            for track, k in started:
                ids[k] = self._confirm(track)
        self._is_first_frame = False
        remembered = [track for track in lost if track.num_lost <= self.track_buffer]
        self.tracks = [*continued, *remembered, *(track for track, _ in started)]
        return ids

    def _confirm(self, track: Track) -> int:
        """Return the id of a track; it gets the next one if it has none."""
        if not track.id:
            self._num_confirmed += 1
            track.id = self._num_confirmed
        return track.id


def _without(items: Sequence[Item], others: Sequence[Item]) -> list[Item]:
    """Return the items that are not among the others."""
    return [item for item in items if item not in others]


def _associate(
    tracks: Sequence[Track], detections: Detections, indices: Sequence[int], min_iou: float
) -> list[tuple[Track, int]]:
    """Pair tracks with those detections of their class that overlap their predicted boxes most.

    Args:
        tracks: The tracks, predicted for this frame.
        detections: All detections of the frame.
        indices: Those that are to be paired.
        min_iou: A pair of a lower IoU is none.

    Returns:
        Tracks and indices of detections, so that the sum of what their IoUs exceed `min_iou` by is largest.
    """
    if not tracks or not indices:
        return []
    predicted = torch.from_numpy(np.stack([track.motion.mean[:, 0] for track in tracks]))
    iou = boxes.iou(boxes.cxcywh_to_xyxy(predicted), detections.boxes_xyxy[list(indices)].double())
    labels = torch.tensor([track.label for track in tracks])
    iou[labels[:, None] != detections.labels[list(indices)]] = 0
    cost = -iou.clamp(min=min_iou).numpy()
    rows, columns = linear_assignment(cost)
    return [
        (tracks[row], indices[column]) for row, column in zip(rows, columns, strict=True) if iou[row, column] > min_iou
    ]
