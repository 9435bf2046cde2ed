"""Photos that one perturbation or one patch is optimized on, and those that are held out to evaluate it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageOptimization
from cvlab.engine.loop import Losses
from cvlab.errors import DataError
from cvlab.experiments.adversarial.config import PhotoSetConfig
from cvlab.experiments.common import photo_batches
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir

MIN_PHOTOS = 4


@dataclass(frozen=True)
class PhotoSet:
    """Photos as the model sees them.

    Attributes:
        inputs: The photos, resized and cropped to S x S pixels.
        labels: int64 (N,), the classes that the model predicts for them.
        used: int64 (U,), numbers of the photos to optimize on.
        held_out: int64 (H,), numbers of the others.
    """

    inputs: list[Image.Image]
    labels: Tensor
    used: Tensor
    held_out: Tensor

    def batch(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Return the photos of some numbers, (N, 3, S, S) in [0, 1]."""
        return torch.stack([photos.to_tensor(self.inputs[k]) for k in numbers.tolist()]).to(device)


def load(
    config: PhotoSetConfig, model: PretrainedClassifier, ctx: ComputeContext, target: int | None, run: RunDir
) -> PhotoSet:
    """Read and classify the photos; leave out those that are classified as the target, and hold some out at random.

    Raises:
        DataError: There are fewer than `MIN_PHOTOS` photos to attack.
        StoppedError: A signal was received.
    """
    inputs: list[Image.Image] = []
    with StopRequest() as stop:
        for path in photo_batches.resolve_images(config.images)[1]:
            stop.raise_if_set(0, run.path.name)
            try:
                inputs.append(model.transform(photos.load(path)))
            except DataError as error:
                run.log(f"warning: {error}")
    predicted = predict(model, inputs, ctx, config.batch_size)
    attacked = (predicted != target).nonzero()[:, 0] if target is not None else torch.arange(len(inputs))
    if len(attacked) < MIN_PHOTOS:
        raise DataError(f"too few photos to attack: {len(attacked)}", f"name a folder with at least {MIN_PHOTOS}")
    order = attacked[rng.permutation(config.seed, 0, len(attacked), torch.device("cpu"))]
    num_held_out = min(max(1, round(config.held_out * len(order))), len(order) - 1)
    return PhotoSet(inputs, predicted, order[num_held_out:], order[:num_held_out])


def predict(model: PretrainedClassifier, inputs: Sequence[Image.Image], ctx: ComputeContext, batch_size: int) -> Tensor:
    """Return the classes int64 (N,) of images of the model's size."""
    classes = []
    with torch.inference_mode():
        for start in range(0, len(inputs), batch_size):
            batch = photos.to_batch(inputs[start : start + batch_size]).to(ctx.device)
            classes.append(model.probabilities(batch).argmax(1).cpu())
    return torch.cat(classes) if classes else torch.zeros(0, dtype=torch.int64)


def optimize(
    config: PhotoSetConfig,
    initial: Tensor,
    objective: Callable[[image_optimizer.ImageState], Losses],
    update: image_optimizer.Update,
    ctx: ComputeContext,
    run: RunDir,
) -> tuple[Tensor, dict[str, float]]:
    """Optimize one tensor over all steps, from the latest checkpoint; return it and the last losses."""
    task = ImageOptimization(
        state=image_optimizer.ImageState([initial]),
        objective=objective,
        update=update,
        steps=config.steps,
        ctx=ctx,
        config_digest=config.digest(),
        frame_steps=frozenset(),
        save_frame=lambda *_: None,
    )
    losses = image_optimizer.optimize_image(task, run, config.experiment)
    return task.state.tensors[0], losses
