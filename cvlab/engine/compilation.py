"""Compile the model of a training run before its first step: failures come early, and the time is not counted."""

import copy
import time

import torch
from torch import nn

from cvlab.engine import device
from cvlab.engine.parameters import set_train_mode
from cvlab.engine.task import TrainTask
from cvlab.errors import ConfigError


def compile_model(model: nn.Module) -> nn.Module:
    """Return a module that shares the weights of a model and compiles its forward and backward pass when called."""
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def warm_up(task: TrainTask, compiled: nn.Module) -> float:
    """Compile for the batches of a task by a forward and a backward pass, which change no state.

    Args:
        task: The task, before its first step.
        compiled: What `compile_model` returned.

    Returns:
        The seconds that it took.

    Raises:
        ConfigError: The model cannot be compiled, for example because there is no C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    start = time.perf_counter()
    before = copy.deepcopy((task.model.state_dict(), task.extra_state, device.get_rng_state()))
    set_train_mode(task.model)
    batch = task.get_batch(0)
    if task.split_batch is not None:
        batch = task.split_batch(batch)[0]
    try:
        with task.ctx.autocast():
            loss = task.loss_fn(compiled, batch)["loss"]
        loss.backward()
        task.ctx.synchronize()
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:200]
        hint = "set compile: false, or install a C++ compiler (g++) on the CPU, triton on a GPU"
        raise ConfigError(f"compile: the model cannot be compiled: {reason}", hint) from error
    weights, extra_state, rng_state = before
    task.model.zero_grad(set_to_none=True)
    task.model.load_state_dict(weights)
    for name, tensor in task.extra_state.items():
        tensor.copy_(extra_state[name])
    device.set_rng_state(rng_state)
    return time.perf_counter() - start
