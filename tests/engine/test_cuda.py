"""Training on a GPU: results of the CPU within tolerances, the same in every run, no synchronization in each step."""

import contextlib
import itertools
import json
import math
import time
import warnings

import pytest
import torch

from cvlab.config import loading
from cvlab.data import rng
from cvlab.engine import device, muon
from cvlab.errors import DivergedError, StoppedError
from cvlab.experiments.captioning import model as captioner_model
from cvlab.experiments.classification import throughput
from cvlab.ops import nms, sampling
from cvlab.runs import checkpoint
from tests import tiny
from tests.engine.test_precision import make_state, nan_from
from tests.engine.test_resume import stop_at

pytestmark = pytest.mark.cuda

PRECISIONS = ["float32", "bfloat16", "float16"]
CONFIGURATIONS = ["cifar_94", "cifar_96"]
SMALL = ["device=cuda", "batch_size=32"]


def build_steps(name, *overrides):
    loaded = loading.load(name, [*SMALL, *overrides])
    setup = throughput.build_on_synthetic_images(loaded.config, loaded.base)
    return setup, throughput.train_steps(loaded.config, setup)


@contextlib.contextmanager
def forbid_synchronization():
    """Make operations that synchronize with the GPU raise an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_random_numbers_equal_those_of_the_cpu():
    indices = torch.arange(10_000)
    on_gpu = rng.uniform(3, 5, indices.cuda(), "flip").cpu()
    assert torch.equal(on_gpu, rng.uniform(3, 5, indices, "flip"))
    assert torch.equal(
        rng.permutation(3, 5, 999, torch.device("cuda")).cpu(), rng.permutation(3, 5, 999, indices.device)
    )


def test_float32_is_not_rounded_to_tf32():
    ctx = device.select_device("cuda", "float32")
    assert ctx.as_dict()["tf32"] is False
    torch.manual_seed(0)
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    exact = (a.double() @ b.double()).float()
    assert ((a.cuda() @ b.cuda()).cpu() - exact).abs().max() < 1e-3
    x, w = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), w.double()).float()
    assert (torch.nn.functional.conv2d(x.cuda(), w.cuda()).cpu() - exact).abs().max() < 1e-3


def test_training_follows_the_cpu(tmp_path):
    losses = {}
    for name in ("cpu", "cuda"):
        config = tiny.settings("sgd", device=name, duration={"steps": 6})
        task = tiny.job(config)
        task.model[4].p = 0.0  # each device draws its own dropout masks
        tiny_fit = throughput.loop.fit(
            throughput.loop.TrainState(task.model, torch.optim.SGD(task.model.parameters(), lr=0.01)),
            task.loss_fn,
            task.get_batch,
            lr_factor=lambda _: 1.0,
            ctx=task.ctx,
        )
        losses[name] = [step["loss"].item() for step in itertools.islice(tiny_fit, 6)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_and_a_resumed_run_are_bitwise_identical(tmp_path, precision, optimizer):
    config = tiny.settings(optimizer, device="cuda", precision=precision)
    metrics, summary = tiny.train(tmp_path / "one", config)
    repeated, repeated_summary = tiny.train(tmp_path / "two", config)
    assert repeated_summary == summary
    assert tiny.untimed(repeated) == tiny.untimed(metrics)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(13))
    resumed, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert resumed_summary == summary
    assert tiny.untimed(resumed) == tiny.untimed(metrics)
    assert tiny.rows(tmp_path / "stopped") == tiny.rows(tmp_path / "one")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_runs_of_a_shipped_configuration_are_bitwise_identical(name):
    digests = []
    for _ in range(2):
        setup, steps = build_steps(name)
        for _ in itertools.islice(steps, 12):
            pass
        digests.append(checkpoint.weights_digest(setup.model.state_dict()))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("overrides", [(), ("optimizer={name: sgd, lr: 0.01}",), ("skip_easy=0.5",)])
def test_a_step_does_not_synchronize(overrides):
    setup, steps = build_steps("cifar_96", *overrides)
    assert setup.ctx.read_every == device.CUDA_READ_EVERY
    for _ in itertools.islice(steps, device.CUDA_READ_EVERY):
        pass
    with forbid_synchronization():
        for _ in itertools.islice(steps, device.CUDA_READ_EVERY - 1):
            pass


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    training = make_state()
    training.model.cuda()
    loss_fn = nan_from(training, 5)
    batch = torch.randn(6, 3, device="cuda")

    def on_gpu(model, batch):
        losses = loss_fn(lambda x: model(x).cpu(), batch)
        return {name: value.cuda() for name, value in losses.items()}

    ctx = device.select_device("cuda", "float32")
    steps = throughput.loop.fit(training, on_gpu, lambda _: batch, lr_factor=lambda _: 1.0, ctx=ctx)
    with pytest.raises(DivergedError, match="at step 5 "):  # noqa: PT012
        for _ in steps:
            assert training.step <= device.CUDA_READ_EVERY


def test_images_and_weights_are_channels_last():
    setup, _ = build_steps("cifar_94")
    images, _ = setup.train_loader.get_batch(0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    weights = [weight for weight in setup.model.parameters() if weight.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_cudnn_benchmarks_unless_runs_are_deterministic():
    for deterministic in (False, True):
        device.select_device("cuda", deterministic=deterministic)
        assert torch.backends.cudnn.deterministic is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic


def test_uploads_do_not_synchronize():
    tensor = torch.arange(1000)
    with forbid_synchronization():
        uploaded = device.upload(tensor, torch.device("cuda"))
    assert torch.equal(uploaded.cpu(), tensor)


def test_operations_equal_those_of_the_cpu():
    torch.manual_seed(0)
    corners = torch.rand(200, 2) * 100
    boxes, scores = torch.cat([corners, corners + 5 + torch.rand(200, 2) * 40], 1), torch.rand(200)
    assert torch.equal(nms.nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), nms.nms(boxes, scores, 0.5))
    matrix = torch.randn(30, 50)
    expected = muon.orthogonalize(matrix, 3)
    torch.testing.assert_close(muon.orthogonalize(matrix.cuda(), 3).cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "padding_mode"), [("bilinear", "zeros"), ("bilinear", "reflection"), ("bicubic", "zeros")]
)
def test_gradients_of_grid_sample_are_bitwise_identical(mode, padding_mode):
    torch.manual_seed(0)
    grid = 2.4 * torch.rand(2, 300, 300, 2, device="cuda") - 1.2
    upstream = torch.randn(2, 3, 316, 316, device="cuda")
    gradients = []
    for _ in range(3):
        images = torch.linspace(0, 1, 2 * 3 * 64 * 64, device="cuda").view(2, 3, 64, 64).requires_grad_()
        sampled = sampling.pad_edges(sampling.grid_sample(images, grid, mode, padding_mode), 8, 8, 8, 8)
        gradients.append(torch.autograd.grad((sampled * upstream).sum(), images)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_recurrent_layers_compute_gradients_in_evaluation_mode(cell):
    torch.manual_seed(0)
    gates = {"rnn": 1, "lstm": 4}[cell]
    tensors = [torch.randn(*shape) for shape in ((5, 7, 6), (5, 8), (gates * 8, 6), (gates * 8, 8), (gates * 8,))]
    results = []
    for name in ("cpu", "cuda"):
        inputs = [tensor.to(name).requires_grad_() for tensor in tensors]
        states = captioner_model.torch_rnn(cell, *inputs)  # without a warning about the layout of the weights
        results.append([x.cpu() for x in (states, *torch.autograd.grad(states.square().sum(), inputs))])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_a_compiled_run_resumes_bitwise(tmp_path):
    pytest.importorskip("triton")
    config = tiny.settings(device="cuda", compile=True)
    start = time.perf_counter()
    metrics, summary = tiny.train(tmp_path / "whole", config)
    assert metrics["train_seconds"] < time.perf_counter() - start
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(13))
    _, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert resumed_summary == summary
    assert math.isfinite(metrics["train_loss"])


def test_a_run_plots_its_mistakes_without_warnings(cvlab, tmp_path):
    short = ("data.num_train=300", "duration={steps: 3}", "expect=[]", "expect_fallback=[]", "device=cuda")
    code, out, err = cvlab("train", "quickstart", *short, "--json")
    assert code == 0, err
    run = tmp_path / json.loads(out)["run"]
    assert "warning" not in (run / "log.txt").read_text()
    assert list(run.glob("*/*_mistakes.png"))
