"""Losses that are read every few steps, float16 with loss scaling, and compiled models."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.config import loading
from cvlab.engine import compilation, device
from cvlab.engine.config import TrainConfig
from cvlab.engine.device import ComputeContext
from cvlab.engine.loop import TrainState, fit
from cvlab.errors import CheckpointError, ConfigError, DivergedError, StoppedError
from cvlab.experiments.classification import setup, throughput
from cvlab.runs import checkpoint
from tests import tiny
from tests.engine.test_resume import stop_at

GROUPED = ComputeContext(torch.device("cpu"), "float32", 1, read_every=4)


def nan_from(training, first_bad):
    def loss_fn(model, batch):
        loss = F.mse_loss(model(batch), torch.zeros(6, 2))
        return {"loss": loss * (math.nan if training.step >= first_bad else 1), "part": loss}

    return loss_fn


def make_state():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def train_steps(training, first_bad):
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 3, generator=generator)
    return fit(training, nan_from(training, first_bad), lambda _: batch, lr_factor=lambda _: 1.0, ctx=GROUPED)


@pytest.mark.parametrize("first_bad", [0, 1, 3, 4, 6])
def test_a_loss_that_is_not_finite_is_reported_with_its_step(first_bad):
    training = make_state()
    message = rf"not finite at step {first_bad} \(batch {first_bad}, lr 0.1\): loss nan, part"
    with pytest.raises(DivergedError, match=message):  # noqa: PT012
        for _ in train_steps(training, first_bad):
            assert training.step < 4 * (first_bad // 4 + 1), "the group of steps was not read"


def test_the_state_is_not_saved_after_a_loss_that_is_not_finite():
    training = make_state()
    for _ in itertools.islice(train_steps(training, 1), 3):
        pass
    with pytest.raises(DivergedError, match="at step 1 "):
        training.state_dict()


def read_losses_every(patch, read_every):
    select_device = device.select_device
    patch.setattr(device, "CUDA_READ_EVERY", read_every)
    patch.setattr(
        TrainConfig,
        "compute_context",
        lambda config: dataclasses.replace(
            select_device("cpu", config.precision, config.threads), read_every=read_every
        ),
    )


def test_a_run_whose_losses_are_read_every_few_steps_is_bitwise_identical(tmp_path, monkeypatch):
    metrics, summary = tiny.train(tmp_path / "each", tiny.settings())
    read_losses_every(monkeypatch, 7)
    other_metrics, other_summary = tiny.train(tmp_path / "grouped", tiny.settings())
    assert tiny.untimed(other_metrics) == tiny.untimed(metrics)
    assert other_summary == summary
    assert tiny.rows(tmp_path / "grouped") == tiny.rows(tmp_path / "each")


def test_no_checkpoint_is_written_between_a_bad_loss_and_its_report(tmp_path, monkeypatch):
    read_losses_every(monkeypatch, 1000)
    job = tiny.job

    def broken_job(config, on_step):
        steps = []
        task = job(config, steps.append)

        def loss_fn(model, batch):
            losses = task.loss_fn(model, batch)
            return {"loss": losses["loss"] * (math.nan if steps[-1] == 13 else 1)}

        return dataclasses.replace(task, loss_fn=loss_fn)

    monkeypatch.setattr(tiny, "job", broken_job)
    with pytest.raises(DivergedError, match="at step 13 "):
        tiny.train(tmp_path / "run", tiny.settings(log_every=1000, save_seconds=0.0))
    assert all(step <= 13 for step in checkpoint.steps(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])  # optimizers with and without a fused kernel
def test_float16_resumes_bitwise_with_its_scale(tmp_path, optimizer):
    config = tiny.settings(optimizer, precision="float16")
    metrics, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(13))
    path = checkpoint.path_of(tmp_path / "stopped" / "checkpoints", 14)
    scaler = checkpoint.load(path)["scaler"]
    assert scaler["scale"] > 1
    assert scaler["_growth_tracker"] > 0
    resumed, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert tiny.untimed(resumed) == tiny.untimed(metrics)
    assert resumed_summary == summary
    assert tiny.rows(tmp_path / "stopped") == tiny.rows(tmp_path / "whole")


def test_a_changed_scale_is_rejected(tmp_path):
    config = tiny.settings(precision="float16")
    with pytest.raises(StoppedError):
        tiny.train(tmp_path, config, stop_at(13))
    path = checkpoint.path_of(tmp_path / "checkpoints", 14)
    state = checkpoint.load(path)
    checkpoint.write(path, state | {"scaler": {}})
    with pytest.raises(CheckpointError, match="cannot be restored"):
        tiny.train(tmp_path, config)


def test_a_step_whose_gradient_overflows_is_skipped_and_the_scale_is_halved():
    training = make_state()
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = training.model.weight.detach().clone()
    batch = torch.ones(6, 3)
    steps = fit(
        training,
        lambda model, x: {"loss": 1000 * model(x).square().mean()},
        lambda _: batch,
        lr_factor=lambda _: 1e-4,
        ctx=GROUPED,
    )
    for _ in itertools.islice(steps, 1):
        pass
    assert torch.equal(training.model.weight, before)
    assert training.scaler.get_scale() == 2.0**126
    for _ in itertools.islice(steps, 40):
        pass
    assert not torch.equal(training.model.weight, before)


def test_float16_follows_float32(tmp_path):
    losses = [
        tiny.train(tmp_path / precision, tiny.settings(precision=precision))[0]["train_loss"]
        for precision in ("float32", "float16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_auto_selects_float16_only_on_a_fast_gpu_and_for_training(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert device._fast_precision(gpu, scales_loss=True) == "float16"
    assert device._fast_precision(gpu, scales_loss=False) == "float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert device._fast_precision(gpu, scales_loss=True) == "float32"
    assert device._fast_precision(torch.device("cpu"), scales_loss=True) == "float32"
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: True)
    assert device._fast_precision(gpu, scales_loss=True) == "bfloat16"


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_first_step_does_not_initialize_momentum(fused):
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    training = TrainState(model, optimizer, scaler=torch.amp.GradScaler("cpu"))
    before = model.weight.detach().clone()
    upstream = iter((math.inf, 1.0, 1.0))
    ctx = ComputeContext(torch.device("cpu"), "float32", 1)
    batch = torch.randn(6, 50)
    steps = fit(
        training,
        lambda model, x: {"loss": (model(x).sum() * 0.01).requires_grad_()},
        lambda _: batch,
        lr_factor=lambda _: 1.0,
        ctx=ctx,
    )
    hook = model.weight.register_hook(lambda gradient: gradient * next(upstream))
    next(steps)
    assert torch.equal(model.weight, before)
    next(steps)
    gradient = 0.01 * batch.sum(0).expand(40, 50)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * gradient)
    next(steps)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * (1 + 1.9) * gradient)
    hook.remove()


def require_compiler():
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler")


@pytest.mark.slow
def test_a_compiled_run_resumes_bitwise_and_has_plain_names(tmp_path):
    require_compiler()
    config = tiny.settings(compile=True)
    metrics, summary = tiny.train(tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        tiny.train(tmp_path / "stopped", config, stop_at(13))
    weights = checkpoint.load(checkpoint.path_of(tmp_path / "stopped" / "checkpoints", 14))["model"]
    assert weights.keys() == tiny.job(tiny.settings()).model.state_dict().keys()
    resumed, resumed_summary = tiny.train(tmp_path / "stopped", config)
    assert tiny.untimed(resumed) == tiny.untimed(metrics)
    assert resumed_summary == summary
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "compiled the model in" in log
    assert metrics["train_seconds"] < float(log.split("compiled the model in ")[1].split()[0])


def test_compiling_does_not_change_the_state(monkeypatch):
    task = tiny.job(tiny.settings())
    before = checkpoint.weights_digest(task.model.state_dict())
    losses, rng_state = task.extra_state["losses"].clone(), torch.get_rng_state()
    compilation.warm_up(task, task.model)
    assert checkpoint.weights_digest(task.model.state_dict()) == before
    assert torch.equal(task.extra_state["losses"], losses)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_60s", "cifar_96"])
def test_a_compiled_step_in_bfloat16_has_the_gradients_of_an_eager_step(name):
    require_compiler()
    small = ("model.widths=[8,16,16]", "batch_size=50", "precision=bfloat16", "device=cpu")
    loaded = loading.load(name, small)
    training = throughput.build_on_synthetic_images(loaded.config, loaded.base)
    loss_fn = setup.build_loss_fn(loaded.config, training.train_loader)
    gradients = []
    for model in (training.model.train(), torch.compile(training.model)):
        training.model.zero_grad(set_to_none=True)
        with training.ctx.autocast():
            loss_fn(model, training.train_loader.get_batch(0))["loss"].backward()
        gradients.append([p.grad.flatten() for p in training.model.parameters() if p.grad is not None])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.cosine_similarity(eager, compiled, 0) > 0.95


def test_a_model_that_cannot_be_compiled_is_rejected_before_the_first_step(tmp_path, monkeypatch):
    def without_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_with(model, backend=without_compiler))
    with pytest.raises(ConfigError, match=r"compile: the model cannot be compiled: .*No working C") as error:
        tiny.train(tmp_path / "run", tiny.settings(compile=True))
    assert "compile: false" in error.value.hint
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints")
