"""The tracker on artificial motions."""

import numpy as np
import pytest
import torch

from cvlab.experiments.detection.tracking import ByteTracker, KalmanFilter
from cvlab.ops.average_precision import Detections


def detections(*items):
    """Return detections from (x, y of the center, side, score, label)."""
    table = torch.tensor(items, dtype=torch.float32).view(-1, 5)
    x, y, side, scores, labels = table.unbind(1)
    half = side / 2
    return Detections(torch.stack([x - half, y - half, x + half, y + half], 1), scores, labels.long())


def ids(frames, high_score=0.5, track_buffer=30):
    """Return the ids of the detections of each frame."""
    tracker = ByteTracker(high_score, track_buffer)
    return [tracker.update(detections(*frame)).tolist() for frame in frames]


class TestKalmanFilter:
    def test_the_filter_matches_the_textbook(self):
        """Each coordinate against the matrix equations of a separate filter."""
        rng = np.random.default_rng(0)
        start = np.array([50.0, 60, 20, 30])
        motion = KalmanFilter(start)
        size = np.array([20.0, 30, 20, 30])
        mean = [np.array([value, 0.0]) for value in start]
        covariance = [np.diag([(s / 10) ** 2, (s / 16) ** 2]) for s in size]
        transition, observation = np.array([[1.0, 1], [0, 1]]), np.array([[1.0, 0]])
        for _ in range(5):
            size = np.tile(motion.mean[2:, 0], 2)
            motion.predict()
            for k in range(4):
                noise = np.diag([(size[k] / 20) ** 2, (size[k] / 160) ** 2])
                mean[k] = transition @ mean[k]
                covariance[k] = transition @ covariance[k] @ transition.T + noise
            size = np.tile(motion.mean[2:, 0], 2)
            measurement = motion.mean[:, 0] + rng.normal(size=4)
            motion.update(measurement)
            for k in range(4):
                innovation = observation @ covariance[k] @ observation.T + (size[k] / 20) ** 2
                gain = covariance[k] @ observation.T @ np.linalg.inv(innovation)
                mean[k] = mean[k] + gain @ (measurement[k] - observation @ mean[k])
                covariance[k] = (np.eye(2) - gain @ observation) @ covariance[k]
        np.testing.assert_allclose(motion.mean, np.stack(mean))
        np.testing.assert_allclose(motion.covariance, np.stack(covariance))

    def test_the_filter_estimates_the_velocity(self):
        motion = KalmanFilter(np.array([0.0, 0, 20, 20]))
        for k in range(1, 30):
            motion.predict()
            motion.update(np.array([3.0 * k, -2.0 * k, 20, 20]))
        assert motion.mean[:, 1] == pytest.approx([3, -2, 0, 0], abs=0.05)


class TestByteTracker:
    def test_an_object_has_one_id(self):
        assert ids([[(10 + 4 * k, 20, 16, 0.9, 0)] for k in range(20)]) == [[1]] * 20

    @pytest.mark.parametrize("side", [20, 30])
    def test_crossing_objects_keep_their_ids(self, side):
        """The objects move towards and through each other; at the crossing the boxes are almost identical."""
        frames = [[(10 + 5 * k, 50, side, 0.9, 0), (210 - 5 * k, 56, side, 0.9, 0)] for k in range(41)]
        assert ids(frames) == [[1, 2]] * 41

    def test_an_occluded_object_returns_with_its_id(self):
        """The object is hidden for ten frames, in which it moves by more than its size."""
        frames = [[(10 + 4 * k, 50, 20, 0.9, 0)] if not 15 <= k < 25 else [] for k in range(40)]
        assert ids(frames) == [[1]] * 15 + [[]] * 10 + [[1]] * 15

    def test_after_the_track_buffer_an_object_gets_a_new_id(self):
        frames = [[(50, 50, 20, 0.9, 0)], *[[]] * 5, *[[(50, 50, 20, 0.9, 0)]] * 2]
        assert ids(frames, track_buffer=5)[-1] == [1]
        assert ids(frames, track_buffer=4)[-2:] == [[0], [2]]
        assert ids(frames, track_buffer=0)[-2:] == [[0], [2]]

    def test_low_scores_continue_a_track_but_never_start_one(self):
        low = [[(50 + k, 50, 20, 0.2, 0), (150, 50, 20, 0.2, 0)] for k in range(10)]
        assert ids([[(49, 50, 20, 0.9, 0)], *low]) == [[1], *[[1, 0]] * 10]

    def test_scores_below_the_low_threshold_are_ignored(self):
        assert ids([[(50, 50, 20, 0.9, 0)], [(50, 50, 20, 0.05, 0)]]) == [[1], [0]]

    def test_a_low_score_does_not_revive_a_lost_track(self):
        assert ids([[(50, 50, 20, 0.9, 0)], [], [(50, 50, 20, 0.2, 0)], [(50, 50, 20, 0.9, 0)]]) == [[1], [], [0], [1]]

    def test_a_new_track_needs_a_second_detection(self):
        frames = [[], [(50, 50, 20, 0.9, 0)], [], [(50, 50, 20, 0.9, 0)], [(51, 50, 20, 0.9, 0)]]
        assert ids(frames) == [[], [0], [], [0], [1]]

    def test_classes_are_tracked_separately(self):
        frames = [[(50, 50, 20, 0.9, 0)], [(50, 50, 20, 0.9, 1)], [(50, 50, 20, 0.9, 1)], [(50, 50, 20, 0.9, 0)]]
        assert ids(frames) == [[1], [0], [2], [1]]

    def test_high_scores_are_matched_before_low_scores(self):
        """The detection with a low score overlaps more, but it is used only for unmatched tracks."""
        assert ids([[(50, 50, 20, 0.9, 0)], [(50, 50, 20, 0.3, 0), (55, 50, 20, 0.8, 0)]]) == [[1], [0, 1]]

    def test_many_objects_in_any_order(self):
        rng = np.random.default_rng(0)
        position, velocity = rng.uniform(0, 2000, (30, 2)), rng.uniform(-4, 4, (30, 2))
        tracker, ids_by_object = ByteTracker(0.5, 30), {}
        for _ in range(30):
            order = rng.permutation(30)
            noisy = position + rng.normal(scale=0.5, size=(30, 2))
            result = tracker.update(detections(*[(*noisy[k], 40, 0.9, 0) for k in order])).tolist()
            for k, track_id in zip(order.tolist(), result, strict=True):
                ids_by_object.setdefault(k, set()).add(track_id)
            position += velocity
        assert sorted(next(iter(track_ids)) for track_ids in ids_by_object.values()) == list(range(1, 31))
        assert all(len(track_ids) == 1 for track_ids in ids_by_object.values())
        assert len(tracker.tracks) == 30

    def test_boxes_without_area(self):
        assert ids([[(50, 50, 0, 0.9, 0)]] * 3)[0] == [1]
