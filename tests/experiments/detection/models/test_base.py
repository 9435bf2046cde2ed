"""Padded targets of a batch."""

import torch

from cvlab.experiments.detection.models.base import collate_targets


def test_collate_targets():
    targets = collate_targets(
        [torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([1, 0]), torch.tensor([], dtype=torch.int64)]
    )
    assert targets.boxes_xyxy.shape == (2, 2, 4)
    assert targets.labels.tolist() == [[1, 0], [-1, -1]]
    assert collate_targets([torch.zeros(0, 4)], [torch.tensor([]).long()]).labels.tolist() == [[-1]]
