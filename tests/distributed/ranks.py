"""Scenarios of several connected ranks.

`python -m tests.distributed.ranks SCENARIO FILE`, started by tests/distributed/test_processes.py."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cvlab.distributed import collectives, ddp, process_group, sharding
from cvlab.distributed.step_flags import StepFlags
from cvlab.engine import device, loop, optimizers
from cvlab.experiments.classification.data.images import build_normalization, eval_batches

BATCH = 12


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()


def loss_fn(model, batch):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def gradients():
    """Return the largest difference between the gradient of a batch and the mean over its shards."""
    model, reference = build_model().eval(), build_model().eval()
    torch.manual_seed(1)
    images, labels = torch.rand(BATCH, 3, 8, 8).double(), torch.randint(0, 5, (BATCH,))
    loss_fn(reference, (images, labels))["loss"].backward()
    flags = StepFlags(signal.SIGTERM, save=True) if process_group.world().rank == 1 else StepFlags()
    step = ddp.make_step(model, loss_fn, torch.device("cpu"), lambda: flags)
    indices = sharding.shard(torch.arange(BATCH))
    losses = step.losses((images[indices], labels[indices]))
    losses["loss"].backward()
    assert step.reduce(losses) == (StepFlags(signal.SIGTERM, save=True), True)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def evaluation():
    """Return `[count, mean, times each item was evaluated]` for sets of several sizes, some smaller than the world."""
    ctx = device.select_device("cpu", "float32", 1)
    results = []
    for count in (1, 2, 3, 7, 1001):
        images = torch.randint(0, 255, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        evaluated = torch.zeros(count)

        def measure(model, batch, evaluated=evaluated):
            evaluated[batch[1]] += 1
            return {"sum": batch[1].sum(), "count": torch.tensor(len(batch[1]))}

        batches = eval_batches(
            images, torch.arange(count), build_normalization(images, "mean", torch.float32, ctx.device)
        )
        mean = loop.evaluate(nn.Identity(), batches, measure, ctx)["sum"]
        counts = collectives.all_reduce_sums({str(k): value for k, value in enumerate(evaluated)})
        results.append([count, mean, sorted({float(value) for value in counts.values()})])
    return results


def collective_results():
    """Return the results of the collectives."""
    rank = process_group.world().rank
    model = build_model()
    model[1].running_mean.fill_(rank)
    collectives.broadcast_buffers(model)
    return {
        "from_main": collectives.broadcast_from_rank0(lambda: f"of {rank}"),
        "gathered": collectives.all_gather_object(rank),
        "concatenated": collectives.all_gather_cat(torch.tensor([rank, 10 * rank])).tolist(),
        "buffer": float(model[1].running_mean[0]),
    }


def weights_after_steps():
    """Return some of the weights after four steps with each optimizer, and with sharpness-aware minimization."""
    ctx = device.select_device("cpu", "float64", 1)
    torch.manual_seed(1)
    images, labels = torch.rand(4 * BATCH, 3, 8, 8).double(), torch.randint(0, 5, (4 * BATCH,))
    weights = {}
    for name, sam in (*((name, None) for name in (*optimizers.OPTIMIZERS.names, "torch:NAdam")), ("sgd", 0.05)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.Flatten())
        model = model.append(nn.Linear(64, 5)).double()
        state = loop.TrainState(model, optimizers.build_optimizer(name, model, {"lr": 0.01}))

        def get_batch(step):
            indices = BATCH * step + sharding.shard(torch.arange(BATCH))
            return images[indices], labels[indices]

        steps = loop.fit(state, loss_fn, get_batch, lr_factor=lambda _: 1.0, ctx=ctx, sam=sam)
        for _ in range(4):
            next(steps)
        weights[f"{name}, sam {sam}"] = torch.cat([p.flatten() for p in model.parameters()])[::7].tolist()
    return weights


def connect_pairs(count):
    """Fork pairs of processes that connect and disconnect; return their exit codes. Forking saves the imports."""
    codes = []
    for _ in range(count):
        pids, port = [], free_port()
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in environment.items()})
                with process_group.init_process_group():
                    is_connected = collectives.all_gather_object(rank) == [0, 1]
                os._exit(0 if is_connected else 1)
            pids.append(pid)
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes


SCENARIOS = {
    function.__name__: function for function in (gradients, evaluation, collective_results, weights_after_steps)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "connect_pairs":
        print(json.dumps(connect_pairs(int(sys.argv[2]))))
        sys.exit()
    with process_group.init_process_group():
        result = SCENARIOS[sys.argv[1]]()
        Path(f"{sys.argv[2]}.{process_group.world().rank}").write_text(json.dumps(result))
