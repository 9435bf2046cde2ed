"""The summary of a model: parameters, FLOPs, memory and receptive fields against simple reference counts."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cvlab.config import loading
from cvlab.models.summary import REST, SummarySpec, summarize

CLASSIFIERS = (
    *("quickstart", "cifar_resnet32", "cifar_94", "cifar_three_layer_epoch", "cifar_api_barebones"),
    *("cifar_fc_overfit_3", "cifar_vgg_half_60s"),
)


def summarize_model(model, size=24, channels=3):
    return summarize(SummarySpec({"": model}, model, torch.zeros(1, channels, size, size)))


def measured_receptive_field(model, size=64):
    """Return the size of the input region that the gradient of the map's central element is nonzero in."""
    image = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    output = model.double()(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    columns = image.grad.abs().sum((0, 1, 2)).nonzero()[:, 0]
    return (int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1))


class Residual(nn.Module):
    """Two paths with receptive fields of 7 x 3 and 5 x 5, added, and a functional pooling."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, (7, 3), padding=(3, 1))
        self.b = nn.Conv2d(3, 4, 3, padding=2, dilation=2)

    def forward(self, x):
        return F.avg_pool2d(F.silu(self.a(x) + self.b(x)), 2)


def make_positive(model):
    """Make all weights positive, so that no gradient is zero by chance."""
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.AvgPool2d(3, 2), nn.Conv2d(4, 4, (1, 5))),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, dilation=3)),
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 5)),
        nn.Sequential(Residual(), nn.Conv2d(4, 2, 3, padding=1)),
    ],
    ids=["strides", "dilation", "padding", "two paths"],
)
def test_receptive_fields_equal_those_of_the_gradient(model):
    model = make_positive(model).eval()
    last = [layer for layer in summarize_model(model, 64).layers if layer.name != REST][-1]
    assert last.receptive_field == measured_receptive_field(model)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_totals_of_shipped_classifiers(cvlab, name):
    code, out, err = cvlab("summary", name, "--json")
    assert code == 0, err
    document = json.loads(out)
    loaded = loading.load(name)
    from cvlab.experiments.classification.setup import build_model, expected_size

    model = build_model(loaded.config, loaded.base, expected_size(loaded.config, loaded.base)[0]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(document["input_shape"]))
    assert document["flops"] == counter.get_total_flops() == sum(layer["flops"] for layer in document["layers"])
    assert document["parameters"] == sum(p.numel() for p in model.parameters())
    assert document["parameters"] == sum(layer["parameters"] for layer in document["layers"])
    assert document["activation_bytes"] > 0


def test_memory_counts_each_tensor_once_and_no_views():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 24 * 24, 5))
    by_layer = [layer.activation_bytes for layer in summarize_model(model).layers]
    assert by_layer == [4 * 24 * 24 * 4, 0, 0, 5 * 4]


def test_undefined_receptive_fields_are_none():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(3, 4, 3), gate, nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x * self.gate(x))

    layers = {layer.name: layer.receptive_field for layer in summarize_model(Gated()).layers}
    assert layers["first"] == (3, 3)
    assert layers["last"] is None
    up = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3))
    assert [layer.receptive_field for layer in summarize_model(up).layers] == [(3, 3), None, None]


def test_a_shared_layer_has_a_row_for_each_call_and_its_parameters_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    rows = summarize_model(nn.Sequential(layer, layer)).layers
    assert [row.parameters for row in rows] == [84, 0]
    assert [row.receptive_field for row in rows] == [(3, 3), (5, 5)]


def test_attention_and_recurrent_layers_are_counted():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 5, batch_first=True)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            x = x.flatten(2).mT
            return self.lstm(self.attention(x, x, x, need_weights=False)[0])[0]

    summary = summarize_model(Sequence(), size=4, channels=8)
    rows = {row.name: row for row in summary.layers}
    tokens = 16
    projections = 2 * tokens * 8 * (24 + 8)
    assert rows["attention"].flops == projections + 2 * 2 * tokens * tokens * 8
    assert rows["lstm"].flops == 2 * tokens * (8 + 5) * 20
    assert rows[REST].parameters == 12 + 72  # the unused layer, and the projection that the attention reads itself
    assert summary.parameters == sum(row.parameters for row in summary.layers)


def test_the_model_is_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summarize_model(model)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("yolo_scenes", "size=64"), ("backbone.", "head.")),
        (("faster_rcnn_scenes", "size=64"), ("backbone.", "head.")),
        (("caption_scenes", "size=64", "min_word_count=1"), ("backbone.", "decoder.")),
        (("yolo_voc07", "size=64"), ("backbone.", "head.")),  # the number of classes is that of the fallback
    ],
)
def test_detectors_and_captioners_have_two_parts(cvlab, tmp_path, arguments, parts):
    code, out, err = cvlab("summary", *arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    names = [layer["name"] for layer in document["layers"]]
    assert all(any(name.startswith(part) for name in names) for part in parts)
    assert document["parameters"] > document["trainable_parameters"] > 0
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_is_summarized(cvlab, tmp_path):
    short = ("data.num_train=100", "batch_size=20", "duration={steps: 1}", "evaluate_test=false", "expect=[]", "-q")
    assert cvlab("train", "quickstart", *short)[0] == 0
    run = json.loads(cvlab("summary", "latest", "--json")[1])
    assert run["layers"] == json.loads(cvlab("summary", "quickstart", "--json")[1])["layers"]
    code, out, _ = cvlab("summary", "latest")
    assert code == 0
    assert "34,058" in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("saliency",), 2, "saliency has no model to summarize; give a configuration that trains"),
        (("cifar_bn_lr_sweep",), 2, "sweep has no model"),
        (("cifar_60s",), 2, "comes in several variants; add profile=small or"),
        (("latest",), 5, "no run 'latest'"),
        (("quickstat",), 2, "did you mean 'quickstart'?"),
        (("quickstart", "model.filters=[]"), 2, "at least one block"),
    ],
)
def test_errors_are_one_line(cvlab, arguments, code, text):
    exit_code, out, err = cvlab("summary", *arguments)
    assert (exit_code, out) == (code, "")
    assert text in err
    assert len(err.splitlines()) == 1


def test_from_python():
    import cvlab

    document = cvlab.summary("quickstart", {"model.filters": [8], "model.pools": [0]})
    assert document["layers"][0]["layer"] == "Conv2d"
    assert document["parameters"] == 8 * 28 + 16 + 8 * 16 * 16 * 10 + 10
