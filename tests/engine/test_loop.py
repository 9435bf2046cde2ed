"""The training loop against a plain loop; finite checks, clipping, moving average, restored state."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.config.metrics import require_finite
from cvlab.engine import device as engine_device
from cvlab.engine import loop
from cvlab.engine.device import ComputeContext
from cvlab.engine.loop import TrainState, fit
from cvlab.errors import CheckpointError, DeviceError, DivergedError

CPU = ComputeContext(torch.device("cpu"), "float32", 1)


def build_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def get_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def loss_fn(model, batch):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def lr_factor(step):
    return 1 - (step + 0.5) / 10


def test_fit_matches_a_plain_training_loop():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = []
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * lr_factor(step)
        x, y = get_batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
        expected.append(loss.item())
        for name, value in model.state_dict().items():
            decay = min(0.5, (2 + step) / (11 + step))
            average[name] = decay * average[name] + (1 - decay) * value if value.is_floating_point() else value.clone()

    fitted = build_model()
    training = TrainState(fitted, torch.optim.SGD(fitted.parameters(), lr=0.1, momentum=0.9), ema_decay=0.5)
    torch.manual_seed(1)
    losses = [
        step["loss"].item()
        for step in itertools.islice(fit(training, loss_fn, get_batch, lr_factor=lr_factor, ctx=CPU, clip_norm=0.5), 10)
    ]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value)
        torch.testing.assert_close(training.eval_model.state_dict()[name], average[name])


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = build_model()
    training = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def broken_loss_fn(model, batch):
        losses = loss_fn(model, batch)
        return {"loss": losses["loss"] * (math.nan if training.step == 3 else 1), "part": losses["loss"]}

    steps = fit(training, broken_loss_fn, get_batch, lr_factor=lambda step: 1.0, ctx=CPU)
    for _ in range(3):
        next(steps)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(DivergedError, match=r"not finite at step 3 \(batch 3, lr 0.1\): loss nan, part"):
        next(steps)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_evaluation_covers_each_item_once_and_changes_nothing():
    model = build_model().train()
    x, y = torch.randn(25, 4), torch.randint(0, 3, (25,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def measure(model, batch):
        scores = model(batch[0])
        right = (scores.argmax(1) == batch[1]).sum()
        return {"accuracy": right, "count": torch.tensor(len(batch[1]))}

    batches = [(x[k : k + 10], y[k : k + 10]) for k in range(0, 25, 10)]
    metrics = loop.evaluate(model, batches, measure, CPU)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    expected = (build_model().eval()(x).argmax(1) == y).float().mean().item()
    assert metrics == {"accuracy": pytest.approx(expected)}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_all_random_generators_are_restored():
    import random

    import numpy as np

    engine_device.seed_everything(5)
    state = engine_device.get_rng_state()
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    engine_device.set_rng_state(state)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


def test_a_missing_key_of_the_state_is_reported():
    model = build_model()
    training = TrainState(model, torch.optim.Adam(model.parameters()), ema_decay=0.9)
    for key in loop.STATE_KEYS:
        state = training.state_dict()
        del state[key]
        with pytest.raises(CheckpointError, match=key):
            training.load_state_dict(state)
    with pytest.raises(CheckpointError, match="moving average"):
        training.load_state_dict(training.state_dict() | {"ema_model": None})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_an_unavailable_device_is_an_error(device):
    with pytest.raises(DeviceError, match="0 CUDA devices") as error:
        engine_device.select_device(device)
    assert error.value.code == 8


def test_an_explicit_precision_is_used():
    for precision in ("float32", "bfloat16", "float64"):
        assert engine_device.select_device("cpu", precision).precision == precision
    fast = engine_device.fast_bfloat16(torch.device("cpu"))
    assert engine_device.select_device("cpu").precision == ("bfloat16" if fast else "float32")
    assert engine_device.select_device("cpu", "float64").dtype == torch.float64
    with engine_device.select_device("cpu", "bfloat16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_moving_average_of_a_short_run_is_near_the_weights():
    model = build_model()
    training = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.05), ema_decay=0.999)
    first = {name: value.clone() for name, value in model.named_parameters()}
    for _ in itertools.islice(fit(training, loss_fn, get_batch, lr_factor=lambda _: 1.0, ctx=CPU), 60):
        pass
    assert training.ema_model is not None
    pairs = zip(training.ema_model.parameters(), model.parameters(), strict=True)
    distance = sum((average - value).square().sum() for average, value in pairs)
    moved = sum((first[name] - value).square().sum() for name, value in model.named_parameters())
    assert distance < 0.25 * moved


def test_a_metric_that_is_not_finite_is_an_error():
    require_finite({"a": 1.0, "b": 0})
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(DivergedError, match="test_loss is not finite"):
            require_finite({"a": 1.0, "test_loss": value})
