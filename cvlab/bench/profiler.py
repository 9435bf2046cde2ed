"""`cvlab bench profile`: where training spends its time."""

import itertools
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from cvlab.bench import harness, training
from cvlab.experiments.classification import throughput

WARM_UP_STEPS = 3
DATA = "cvlab: data"
KINDS = {  # substring of an operator's name -> its kind; the first match counts
    "conv": "convolution",
    "batch_norm": "normalization",
    "pool": "pooling",
    "amax": "pooling",
    "relu": "activation",
    "silu": "activation",
    "gelu": "activation",
    "threshold": "activation",
    "mm": "matrix products",
    "linear": "matrix products",
}


def kind_of(event: FunctionEvent) -> str:
    """Return the kind of an operator: everything inside data loading or the optimizer counts as that."""
    parent: Any = event
    while parent is not None:
        if parent.name == DATA:
            return "data"
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        parent = parent.cpu_parent
    return next((kind for part, kind in KINDS.items() if part in event.name), "everything else")


def shares(name: str, steps: int, device: str) -> dict[str, Any]:
    """Profile training steps of a configuration on noise; return each kind's share of the time, largest first.

    The time of the kernels counts on a GPU, that of the processor elsewhere.
    """
    config, parts = training.training(name, device)

    def get_batch(step: int) -> Any:
        with record_function(DATA):
            return parts.train_loader.get_batch(step)

    training_steps = throughput.train_steps(config, parts, get_batch)
    for _ in itertools.islice(training_steps, WARM_UP_STEPS):
        pass
    on_gpu = parts.ctx.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # else torch 2.10 warns
        for _ in itertools.islice(training_steps, steps):
            pass
        parts.ctx.synchronize()
    totals: dict[str, float] = {}
    for event in profiler.events() or ():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[kind_of(event)] = totals.get(kind_of(event), 0.0) + spent
    whole = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    what = f"{name}, batch {config.batch_size}, {harness.describe(parts.ctx, parts.ctx.precision, steps)} steps"
    return {"ok": True, "what": what, "shares": {kind: spent / whole for kind, spent in ranked}}
