"""Gradient accumulation: the same step as with the whole batch, in less memory."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.engine import loop
from cvlab.engine.device import ComputeContext
from cvlab.engine.loop import TrainState
from tests import tiny
from tests.distributed.test_processes import start

MODEL = "model={name: fc_net, hidden: [8]}"


def train(precision, num_parts, steps=5):
    """Return the losses, the state and the sizes of the batches that the model has seen."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "float64" else torch.float32
    ctx = ComputeContext(torch.device("cpu"), precision, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), scaler=ctx.make_scaler())

    def get_batch(step):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(100, 3, 2, 2, generator=generator).to(dtype)
        return images, torch.randint(0, 3, (100,), generator=generator)

    def loss_fn(model, batch):
        loss = F.cross_entropy(model(batch[0]).to(dtype), batch[1])
        return {"loss": loss, "half": loss.detach() / 2}

    def split_batch(batch):
        return list(zip(*(part.chunk(num_parts) for part in batch), strict=True))

    steps = itertools.islice(
        loop.fit(state, loss_fn, get_batch, lr_factor=lambda _: 1.0, ctx=ctx, clip_norm=0.5, split_batch=split_batch),
        steps,
    )
    return [{name: value.item() for name, value in losses.items()} for losses in steps], state, sizes


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)]
)
@pytest.mark.parametrize("num_parts", [2, 5])
def test_accumulated_gradients_equal_those_of_the_whole_batch(precision, tolerance, num_parts):
    whole, whole_state, _ = train(precision, 1)
    parts, state, sizes = train(precision, num_parts)
    assert set(sizes) == {100 // num_parts}, "the model sees one part at a time"
    assert len(sizes) == 5 * num_parts
    for expected, actual in zip(whole, parts, strict=True):
        assert actual == pytest.approx(expected, rel=tolerance)
    for expected, actual in zip(whole_state.model.parameters(), state.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_run_with_accumulation_resumes_bitwise(tmp_path):
    from cvlab.errors import StoppedError
    from tests.engine.test_early_stopping import stop_at

    class Batches:
        """A task whose batches are split into two parts, without a loss that depends on the whole batch."""

        def __call__(self, config, on_step=lambda step: None):
            task = original(config, on_step)

            def loss_fn(model, batch):
                return {"loss": F.cross_entropy(model(batch[0]), batch[1])}

            def split_batch(batch):
                return list(zip(*(part.chunk(2) for part in batch), strict=True))

            return dataclasses.replace(task, loss_fn=loss_fn, split_batch=split_batch, extra_state={})

    original = tiny.job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "job", Batches())
        summary = tiny.train(tmp_path / "whole")[1]
        with pytest.raises(StoppedError):
            tiny.train(tmp_path / "stopped", on_step=stop_at(5))
        assert tiny.train(tmp_path / "stopped")[1] == summary


def run(cvlab, *overrides):
    defaults = ("data.num_train=200", "batch_size=100", "duration={steps: 6}", "log_every=1", "expect=[]", MODEL)
    code, out, err = cvlab("train", "quickstart", *defaults, "precision=float32", *overrides, "--json")
    assert code == 0, err
    return json.loads(out)["metrics"]


@pytest.mark.parametrize(
    "overrides", [(), ("class_weights=balanced", "loss=focal", "augment={mixup: 0.2, flip: true}", "reg=1e-3")]
)
def test_a_configuration_with_accumulation_trains_like_one_without(overrides, cvlab):
    whole, parts = run(cvlab, *overrides), run(cvlab, *overrides, "accumulate=4")
    timed = ("train_seconds", "images_per_second")
    for name in set(whole) - set(timed):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("accumulate=3",), "3 does not divide batch_size: 100"),
        (("accumulate=0",), "accumulate"),
        (("accumulate=2", "skip_easy=0.5"), "whole batch"),
        (("accumulate=50", "--nproc", "4"), "25 images per process have no 50 equal parts"),
    ],
)
def test_batches_that_cannot_be_split_are_rejected(overrides, message, cvlab):
    code, _, err = cvlab("train", "quickstart", "batch_size=100", *overrides)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_two_processes_with_accumulation_train_like_one_without(tmp_path):
    from cvlab.runs.records import read_metrics

    args = ("quickstart", MODEL, "data.num_train=200", "batch_size=100", "duration={steps: 6}", "log_every=1")
    args = (*args, "sam=0.05")
    rows = {}
    for root, options in {"one": (), "two": ("accumulate=2", "--nproc", "2")}.items():
        process = start(
            tmp_path, root, command=("train", *args, "precision=float32", "threads=1", "expect=[]", *options)
        )
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        rows[root] = [row["train_loss"] for row in read_metrics(tmp_path / root / "latest") if "train_loss" in row]
    assert len(rows["one"]) == 6
    assert rows["two"] == pytest.approx(rows["one"], rel=1e-4)
