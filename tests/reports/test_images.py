"""Heat maps."""

import numpy as np
import torch


def test_heat_and_scaling():
    from cvlab.reports import images

    values = torch.zeros(10, 10)
    values[2, 3], values[5, 5] = 4.0, 1.0
    shown = images.scaled(values, 1.0)
    assert shown[2, 3] == 1
    assert shown[5, 5] == 0.25
    assert images.scaled(torch.zeros(4, 4)).max() == 0
    image = np.asarray(images.heat(torch.tensor([[0.0, 1.0]])))
    assert tuple(image[0, 0]) == images.HEAT[0]
    assert tuple(image[0, 1]) == images.HEAT[-1]
