"""`cvlab bench profile`: where the time of a training goes."""

import itertools
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from cvlab.bench import harness, training
from cvlab.experiments.classification import throughput

WARM_UP_STEPS = 3
DATA = "cvlab: data"
KINDS = {  # a part of an operator's name -> what it is; the first that fits
    "conv": "convolution",
    "batch_norm": "normalisation",
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
    """Say what an operator's time was spent on: data and optimizer as a whole, all else by its own name."""
    above: Any = event
    while above is not None:
        if above.name == DATA:
            return "data"
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    return next((kind for part, kind in KINDS.items() if part in event.name), "everything else")


def shares(name: str, steps: int, device: str) -> dict[str, Any]:
    """Profile some steps of a configuration's training, on noise; return each kind's share of the time, largest first.

    On a GPU it is the time of the kernels that counts, elsewhere that of the processor.
    """
    chosen, parts = training.training(name, device)

    def batch_at(step: int) -> Any:
        with record_function(DATA):
            return parts.batches(step)

    taken = throughput.steps(chosen, parts, batch_at)
    for _ in itertools.islice(taken, WARM_UP_STEPS):
        pass
    on_gpu = parts.ctx.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in itertools.islice(taken, steps):
            pass
        parts.ctx.synchronize()
    totals: dict[str, float] = {}
    for event in profiler.events() or ():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[kind_of(event)] = totals.get(kind_of(event), 0.0) + spent
    whole = sum(totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    what = f"{name}, batch {chosen.batch_size}, {harness.about(parts.ctx, parts.ctx.precision, steps)} steps"
    return {"ok": True, "what": what, "shares": {kind: spent / whole for kind, spent in ranked}}
