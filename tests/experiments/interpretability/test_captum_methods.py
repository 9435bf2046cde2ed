"""The methods of captum, compared with direct calls."""

import pytest
import torch
from torch import nn

from cvlab.errors import ConfigError
from cvlab.experiments.interpretability import captum_methods

attr = pytest.importorskip("captum.attr")


class Function(nn.Module):
    def forward(self, x):
        return x.relu()


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    )
    return model.double().eval(), torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 4])


def test_occlusion_equals_captum(small_model):
    model, x, classes = small_model
    fill = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    values = captum_methods.occlusion(model, x, classes, fill=fill, window_px=4, batch_size=5)
    expected = attr.Occlusion(model).attribute(
        x, (3, 4, 4), (3, 2, 2), fill.view(1, 3, 1, 1).expand_as(x), target=classes
    )
    torch.testing.assert_close(values, expected[:, 0])
    log_p = captum_methods.occlusion(model, x, classes, "loss", fill=fill, window_px=4, batch_size=2)
    expected = attr.Occlusion(lambda images: model(images).log_softmax(1)).attribute(
        x, (3, 4, 4), (3, 2, 2), fill.view(1, 3, 1, 1).expand_as(x), target=classes
    )
    torch.testing.assert_close(log_p, expected[:, 0])


def test_shapley_equals_captum_and_is_complete(small_model):
    model, x, classes = small_model
    fill = torch.zeros(3, dtype=torch.float64)
    state = torch.get_rng_state()
    values = captum_methods.shapley(model, x, classes, fill=fill, grid=3, samples=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    mask = captum_methods.grid_mask(x, 3)
    torch.manual_seed(5)
    expected = attr.ShapleyValueSampling(model).attribute(
        x, torch.zeros_like(x), target=classes, feature_mask=mask, n_samples=4
    )
    torch.testing.assert_close(values, expected[:, 0])
    gain = (model(x) - model(torch.zeros_like(x))).gather(1, classes[:, None])[:, 0]
    total = sum(values[:, (mask == k)[0, 0]][:, 0] for k in range(9))
    torch.testing.assert_close(total.double(), gain.detach(), rtol=1e-5, atol=1e-6)


def test_lime_equals_captum_with_the_same_regression(small_model):
    model, x, classes = small_model
    fill = torch.zeros(3, dtype=torch.float64)
    values = captum_methods.lime(model, x, classes, fill=fill, grid=2, samples=20, batch_size=8, seed=5)
    mask = captum_methods.grid_mask(x, 2)
    torch.manual_seed(5)
    direct = attr.Lime(model, interpretable_model=captum_methods.ridge_regression())
    for k in range(3):
        options = {"target": int(classes[k]), "feature_mask": mask, "n_samples": 20}
        expected = direct.attribute(x[k : k + 1], torch.zeros_like(x[:1]), **options)
        torch.testing.assert_close(values[k], expected[0, 0])


def test_ridge_regression_minimizes_the_weighted_squares():
    torch.manual_seed(0)
    x, y, weights = torch.rand(30, 4).double(), torch.rand(30, 1).double(), torch.rand(30).double()
    regression = captum_methods.ridge_regression(0.7)
    regression.fit([(x[:20], y[:20], weights[:20]), (x[20:], y[20:], weights[20:])])
    solution = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    scaled = weights / weights.mean()
    loss = (scaled * (x @ solution[:4] + solution[4] - y[:, 0]) ** 2).sum() + 0.7 * (solution[:4] ** 2).sum()
    gradient = torch.autograd.grad(loss, solution, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(g, solution, retain_graph=True)[0] for g in gradient])
    expected = -torch.linalg.solve(hessian, gradient.detach())
    torch.testing.assert_close(regression.representation().double(), expected[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deeplift_equals_captum_and_is_complete(small_model):
    model, x, classes = small_model
    baseline = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    values = captum_methods.deeplift(model, x, classes, baseline=baseline)
    empty = baseline.view(1, 3, 1, 1).expand_as(x)
    plain = captum_methods._without_in_place(model)  # captum cannot hook activations that work in place
    torch.testing.assert_close(
        values, attr.DeepLift(plain).attribute(x.clone().requires_grad_(), empty, target=classes)
    )
    change = (model(x) - model(empty)).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(values.sum((1, 2, 3)), change.detach())
    captum_methods.require_completeness(model, 16, baseline)


def test_deeplift_accepts_relu6_and_rejects_other_activations():
    torch.manual_seed(0)
    for activation, is_allowed in ((nn.ReLU6(inplace=True), True), (nn.GELU(), False), (Function(), False)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Flatten(), nn.Linear(8 * 36, 4)).double()
        model[0].weight.data *= 5
        if is_allowed:
            captum_methods.require_completeness(model, 8, torch.full((3,), 0.4, dtype=torch.float64))
        else:
            with pytest.raises(ConfigError, match=r"method=deeplift: .*other activations; choose another method"):
                captum_methods.require_completeness(model, 8, torch.full((3,), 0.4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_backprop_equals_captum(small_model):
    model, x, classes = small_model
    values = captum_methods.guided_backprop(model, x, classes)
    expected = attr.GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=classes)
    torch.testing.assert_close(values, expected.abs().amax(1))


class GuidedReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * ((x > 0) & (x < 6))


def test_guided_backprop_supports_relu6():
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3).double(), nn.Linear(8 * 36, 4).double()
    model = nn.Sequential(first, nn.ReLU6(inplace=True), nn.Flatten(), last)
    x, classes = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 20, torch.tensor([1, 2])
    values = captum_methods.guided_backprop(model, x, classes)
    reference_x = x.clone().requires_grad_()
    logits = last(GuidedReLU6.apply(first(reference_x)).flatten(1))
    (expected,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), reference_x)
    torch.testing.assert_close(values, expected.abs().amax(1))
    assert isinstance(model[1], nn.ReLU6)  # the model is unchanged
    captum_methods.require_relus(model, 8)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.GELU(), "this model has GELU"),
        (Function(), "calls ReLU as a function"),
        (nn.Identity(), "this model has none"),
    ],
)
def test_guided_backprop_rejects_other_activations(activation, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ConfigError, match=f"method=guided_backprop: .*{reason}; choose another method"):
        captum_methods.require_relus(model, 8)
