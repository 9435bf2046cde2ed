"""Training steps outside of a run, to measure them."""

from collections.abc import Iterator

from cvlab.engine import compilation, loop, parameters
from cvlab.engine.config import TrainConfig
from cvlab.engine.task import TrainTask

LR_FACTOR = 1e-3  # the weights do not matter but must stay finite


def train_steps(
    config: TrainConfig, task: TrainTask, first_step: int = 0
) -> tuple[loop.TrainState, Iterator[loop.Losses]]:
    """Return a new training state, and an iterator that takes the steps of a run from `first_step` on."""
    optimizer = parameters.build_optimizer(config, task.model)
    state = loop.TrainState(task.model, optimizer, config.ema, task.ctx.make_scaler())
    state.step = first_step
    steps = loop.fit(
        state,
        task.loss_fn,
        task.get_batch,
        lr_factor=lambda _: LR_FACTOR,
        ctx=task.ctx,
        clip_norm=config.clip_norm,
        sam=config.sam,
        split_batch=task.split_batch,
        attack=task.attack,
        forward_model=compilation.compile_model(task.model) if config.compile else None,
    )
    return state, steps
