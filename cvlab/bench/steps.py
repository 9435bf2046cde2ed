"""`cvlab bench`: what a training step of a configuration costs, and the least that it could cost on this machine.

Two floors bound the time of a step (Williams et al., 2009, "Roofline: an insightful visual performance model"): its
FLOPs at the machine's rate of matrix products, and the bytes that it has to move at the machine's rate of copies.
The share of the floor is the larger of the two, divided by the measured time. FLOPs are those of convolutions, matrix
products, recurrent layers and attention; two for a multiply-add. Caches make the second floor a rough one: what fits
into them is not moved.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cvlab import console, registry
from cvlab.bench import machine
from cvlab.config import loading
from cvlab.config.loading import Loaded
from cvlab.console import Progress
from cvlab.engine import loop, probe
from cvlab.engine.config import TrainConfig
from cvlab.engine.task import TrainTask
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.base import HasTrainTask
from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.experiments import ClassifyExperiment
from cvlab.models import summary

MAX_FLOOR_SHARE = 0.1  # of the time for all rows, that the floor of a single step may take
MAX_SECONDS = 2.0  # of timed steps, for a row
MAX_STEPS = 100
HEAD_SECONDS = 1.0  # the quick ones are measured first: about the time of a step of a head on a backbone
aten = torch.ops.aten


@dataclass
class StepCost:
    """A row of the table.

    Attributes:
        config: Name of the configuration, with `profile=NAME` if it has several.
        phase: Which of its steps, if they differ: `finetune`, `reward`, or empty for those before.
        items: Images, photos or views of a step.
        precision: The precision of the step.
        step_seconds: The median time of a step.
        timed_steps: How many steps it is the median of.
        flops: FLOPs of a step.
        bytes: Bytes that a step has to move, see `min_bytes`.
        flop_seconds: The first floor.
        byte_seconds: The second floor.
    """

    config: str
    phase: str
    items: int
    precision: str
    step_seconds: float
    timed_steps: int
    flops: int
    bytes: int
    flop_seconds: float
    byte_seconds: float

    @property
    def bound(self) -> str:
        """Which floor is the higher one."""
        return "FLOPs" if self.flop_seconds >= self.byte_seconds else "bytes"

    @property
    def share(self) -> float:
        """The higher floor as a share of the time."""
        return max(self.flop_seconds, self.byte_seconds) / self.step_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and what follows from them, for JSON."""
        return asdict(self) | {
            "items_per_second": self.items / self.step_seconds,
            "bound": self.bound,
            "share": self.share,
        }


def _recurrent_flops(input_shape: Sequence[int], *args: Any, **_: Any) -> int:
    """Return the FLOPs of a recurrent layer: every weight is used for every item of a sequence (T, N, I)."""
    weights = args[0] if isinstance(args[0], list) else args[:2]  # of cuDNN; of oneDNN
    return 2 * input_shape[0] * input_shape[1] * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _recurrent_backward_flops(*args: Any, **_: Any) -> int:
    return 2 * _recurrent_flops(*args)


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


FUSED = {  # fused kernels that torch's own table lacks
    aten._cudnn_rnn: _recurrent_flops,
    aten._cudnn_rnn_backward: _recurrent_backward_flops,
    aten.mkldnn_rnn_layer: _recurrent_flops,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass
class SavedTensors:
    """Wraps a loss function and counts the bytes that its forward passes save for the backward pass, weights excluded.

    Attributes:
        task: Whose loss is wrapped.
        is_counting: Whether it counts; its backward pass is not slower otherwise.
        bytes: The bytes so far.
    """

    task: TrainTask
    is_counting: bool = True
    bytes: int = 0

    def loss_fn(self, model: nn.Module, batch: Any) -> loop.Losses:
        """Compute the losses of a batch."""
        if not self.is_counting:
            return self.task.loss_fn(model, batch)
        sizes: dict[int, int] = {}  # by address of the storage

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        tensors = itertools.chain(model.parameters(), model.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            losses = self.task.loss_fn(model, batch)
        self.bytes += sum(size for address, size in sizes.items() if address not in weights)
        return losses


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def min_bytes(state: loop.TrainState, saved: int) -> int:
    """Return the bytes that a step reads and writes at least, if nothing stays in a cache.

    Weights are read in the forward and in the backward pass, gradients written and read, weights and the optimizer's
    state read and written, what the forward pass saves written and read, the moving average read and written. Weights
    that are not trained are read once.

    Args:
        state: The training state, after a step.
        saved: Bytes that the forward pass saves.
    """
    trained = _num_bytes([p for p in state.model.parameters() if p.requires_grad])
    frozen = _num_bytes([p for p in state.model.parameters() if not p.requires_grad])
    slots = [value for slot in state.optimizer.state.values() for value in slot.values() if isinstance(value, Tensor)]
    average = _num_bytes(list(state.ema_model.parameters())) if state.ema_model is not None else 0
    return 6 * trained + frozen + 2 * _num_bytes(slots) + 2 * saved + 2 * average


class Rates:
    """The rates of this machine, measured when they are needed."""

    def __init__(self, rounds: int, device: str) -> None:
        self.rounds, self.device = rounds, device
        self.measured = machine.machine(rounds, device)

    def flops_per_second(self, precision: str) -> float:
        """Return the rate of matrix products."""
        rates = self.measured["product_gflops"]
        if precision not in rates:
            rates[precision] = machine.product_gflops(self.rounds, self.device, precision)
        return float(rates[precision]) * 1e9

    @property
    def bytes_per_second(self) -> float:
        """The rate of copies, bytes read and bytes written."""
        return float(self.measured["copy_gb_per_second"]) * 1e9


def configurations(names: Sequence[str], device: str) -> dict[str, Loaded]:
    """Load configurations that train, each of its variants by itself; without names, all shipped ones.

    Raises:
        ConfigError: A configuration that is named does not train.
    """
    configs: dict[str, Loaded] = {}
    for name in names or loading.shipped_names():
        if not isinstance(loading.load(name).config, TrainConfig):
            if names:
                raise ConfigError(f"{name} does not train a model by itself", "give a configuration for `cvlab train`")
            continue
        loaded = loading.load(name, [f"device={device}", "threads=null"])
        configs |= {f"{name} {override}": each for override, each in loaded.variants.items()} or {name: loaded}
    return configs


def run(names: Sequence[str], rounds: int, seconds: float, device: str) -> dict[str, Any]:
    """Measure the machine and the steps of configurations.

    Args:
        names: The configurations; none for all shipped ones that train.
        rounds: Measurements of each rate of the machine.
        seconds: Time for everything; each row has at least one step.
        device: Where.

    Returns:
        `machine`, `rows`, and `not_measured`: the configurations that would take too long or lack something, and why.
    """
    end = time.perf_counter() + seconds
    loaded = configurations(names, device)
    rates = Rates(rounds, device)
    floors = {name: 0.0 if names else _estimated_floor(each, rates) for name, each in loaded.items()}
    rows: list[StepCost] = []
    skipped: list[dict[str, str]] = []
    with Progress("bench", len(loaded), 0) as progress:
        for done, name in enumerate(sorted(loaded, key=lambda name: floors[name] or HEAD_SECONDS)):
            progress.update(done, name)
            left = end - time.perf_counter()
            reason = "" if names else _too_long(floors[name], left, seconds)
            if not reason:
                try:
                    rows += measure(name, loaded[name], rates, left / (len(loaded) - done))
                except DataError as error:  # weights that have to be fetched, a file of the user's
                    if names:
                        raise
                    reason = str(error)
            if reason:
                skipped.append({"config": name, "reason": reason})
    order = list(loaded)
    rows.sort(key=lambda row: order.index(row.config))
    return {
        "ok": True,
        "machine": rates.measured,
        "rows": [row.as_dict() for row in rows],
        "not_measured": skipped,
    }


def _too_long(floor: float, left: float, seconds: float) -> str:
    """Return why a configuration is left out; empty if it is not.

    Args:
        floor: The least that one of its steps takes, in seconds.
        left: The time that is left for all configurations.
        seconds: The time that there was for all of them.
    """
    if left < 0:
        return f"the {seconds:g} s are over; raise --seconds, or name it"
    if floor > MAX_FLOOR_SHARE * seconds:
        return f"a step takes {floor:.0f} s or more; raise --seconds, or name it"
    return ""


def _estimated_floor(loaded: Loaded, rates: Rates) -> float:
    """Return about how long the FLOPs of a step take: three times those of the forward pass of its images.

    The steps of a head on a backbone, which are shorter, count as 0.
    """
    config = loaded.config
    if not isinstance(config, ClassifyConfig) or config.is_transfer or config.data.has_photos:
        return 0.0
    spec = ClassifyExperiment().summary_spec(config, loaded.base)
    precision = config.compute_context().precision
    return 3 * summary.summarize(spec).flops * config.batch_size / rates.flops_per_second(precision)


def measure(name: str, loaded: Loaded, rates: Rates, seconds: float) -> Iterator[StepCost]:
    """Yield the row of each phase of a configuration, measured in about `seconds`."""
    config = loaded.config
    experiment = registry.get_experiment(config.experiment)
    assert isinstance(config, TrainConfig)
    assert isinstance(experiment, HasTrainTask)
    start = time.perf_counter()
    with console.shown(False):
        task = experiment.synthetic_task(config, loaded.base)
    phases = _phases(config, task.steps_per_epoch)
    for done, (phase, first_step) in enumerate(phases.items()):
        left = (seconds - (time.perf_counter() - start)) / (len(phases) - done)
        yield _measure_phase(name, phase, config, task, first_step, rates, left)


def _phases(config: TrainConfig, steps_per_epoch: int) -> dict[str, int]:
    """Return the first step of each phase of a training run."""
    phase, epochs = config.final_phase
    if not epochs:
        return {"": 0}
    first = max(0, config.duration.num_steps(steps_per_epoch) - epochs * steps_per_epoch)
    return {"": 0, phase: first} if first else {phase: 0}


def _measure_phase(
    name: str, phase: str, config: TrainConfig, task: TrainTask, first_step: int, rates: Rates, seconds: float
) -> StepCost:
    saved = SavedTensors(task)
    state, steps = probe.train_steps(config, replace(task, loss_fn=saved.loss_fn), first_step)
    start = time.perf_counter()
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        next(steps)
        task.ctx.synchronize()
    saved.is_counting = False
    first = time.perf_counter() - start
    times = _time_steps(steps, min(MAX_SECONDS, seconds - first), task.ctx.synchronize) or [first]
    flops, moved = counter.get_total_flops(), min_bytes(state, saved.bytes)
    precision = task.ctx.precision
    return StepCost(
        config=name,
        phase=phase,
        items=task.items_per_step,
        precision=precision,
        step_seconds=statistics.median(times),
        timed_steps=len(times),
        flops=flops,
        bytes=moved,
        flop_seconds=flops / rates.flops_per_second(precision),
        byte_seconds=moved / rates.bytes_per_second,
    )


def _time_steps(steps: Iterator[object], seconds: float, synchronize: Callable[[], None]) -> list[float]:
    """Return the times of the steps that fit into a number of seconds; none if it is negative."""
    times: list[float] = []
    while seconds > 0 and len(times) < MAX_STEPS and sum(times) < seconds:
        start = time.perf_counter()
        next(steps)
        synchronize()
        times.append(time.perf_counter() - start)
    return times
