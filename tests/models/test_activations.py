"""Statistics of layers: means, dead channels, functions of torch, layers that are called twice, default layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.errors import ConfigError
from cvlab.models import activations


class Network(nn.Module):
    """A network with a shared in-place ReLU, a functional ReLU, and a channel that is made dead."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Dropout(0.5))
        self.fc = nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)
        with torch.no_grad():
            self.conv.bias[2] = -100.0

    def forward(self, images):
        x = self.relu(self.blocks(self.relu(self.conv(images))))
        return self.out(F.relu(self.fc(x.mean((2, 3)))))


def record(batches):
    torch.manual_seed(0)
    network = Network().eval()
    recorder = activations.ActivationRecorder(network)
    for batch in batches:
        with torch.inference_mode(), recorder.recording(len(batch)):
            network(batch)
    return network, recorder


def test_statistics_do_not_depend_on_the_batches():
    images = torch.rand(5, 3, 8, 8)
    network, recorder = record([images[:2], images[2:]])
    assert list(recorder.layers) == ["conv", "relu", "blocks.0", "relu#2", "fc", "relu#3", "out"]
    with torch.inference_mode():
        conv = network.conv(images)
    assert recorder.layers["conv"].mean == pytest.approx(float(conv.mean()), rel=1e-5)
    assert recorder.layers["conv"].std == pytest.approx(float(conv.std(correction=0)), rel=1e-5)
    assert recorder.layers["relu"].mean == pytest.approx(float(conv.relu().mean()), rel=1e-5)
    assert [layer.is_relu for layer in recorder.layers.values()] == [False, True, False, True, False, True, False]
    assert recorder.layers["relu"].is_active.tolist() == (conv > 0).flatten(2).any(2).any(0).tolist()
    assert not recorder.layers["relu"].is_active[2]
    assert recorder.layers["relu"].dead_fraction == recorder.layers["relu"].num_dead / 4
    assert recorder.layers["conv"].dead_fraction is None
    assert recorder.layers["blocks.0"].shape == (6, 4, 4)
    assert not network.conv._forward_hooks
    assert not network.conv._forward_pre_hooks


def test_the_last_layers_of_each_resolution_are_the_default():
    _, recorder = record([torch.rand(2, 3, 8, 8)])
    assert recorder.map_layers == {8: "relu", 4: "relu"}


@pytest.mark.parametrize(
    ("shape", "axis", "maps"),
    [
        ((2, 5, 4, 4), 1, (2, 5, 4, 4)),
        ((2, 4, 4, 5), 3, (2, 5, 4, 4)),
        ((2, 17, 5), 2, (2, 5, 4, 4)),
        ((2, 7, 7, 7), 1, (2, 7, 7, 7)),
        ((2, 5), 1, None),
        ((2, 44, 5), 2, None),
    ],
)
def test_channels_of_maps_tokens_and_vectors(shape, axis, maps):
    output = torch.rand(shape)
    assert activations.channel_axis(output) == axis
    result = activations.to_maps(output)
    assert maps == (None if result is None else tuple(result.shape))


def test_outputs_by_name_are_not_overwritten_in_place():
    network = Network().eval()
    images = torch.rand(1, 3, 8, 8)
    with torch.inference_mode(), activations.recorded_outputs(network, ["conv"]) as outputs:
        network(images)
    torch.testing.assert_close(outputs["conv"], network.conv(images).detach())
    with pytest.raises(ConfigError, match="unknown layer 'cov'"):
        activations.check_layers(network, ["cov"])
    with pytest.raises(ConfigError, match="gives no activations"):
        activations.require_outputs({}, ["conv"])
