"""Universal adversarial perturbations: one perturbation that changes the predictions for most photos."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.experiments.adversarial.config import UniversalConfig
from cvlab.experiments.base import PhotoExperiment
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cvlab.experiments.adversarial.photo_set import PhotoSet
    from cvlab.models.pretrained import PretrainedClassifier

PERTURBATION, PANEL = "images/perturbation.png", "images/panel.png"
ZERO_LEVEL = 128  # gray level of the saved perturbation that stands for no change
MAX_LOSS = 9.0  # where the cross-entropy is clipped; beta of Shafahi et al.
MAX_SHIFT = 0.2  # of a photo in the optimization, in parts of its side
NUM_SHOWN = 3  # held-out photos in the panel


class UniversalExperiment(PhotoExperiment[UniversalConfig]):
    """One perturbation for all photos, evaluated on photos that were held out.

    References:
        Moosavi-Dezfooli et al., 2017, "Universal adversarial perturbations"; Shafahi et al., 2020, "Universal
        adversarial training", algorithm 2 (projected gradient steps on batches, clipped cross-entropy).

    Differences from the papers:
        The step size falls linearly to 0. Labels are the model's predictions. Photos are flipped and shifted at random
        in the optimization. The perturbation, of the size of the model's input, is saved in steps of 1/255, read back
        and added to the photos.

    Metrics:
        `fooling_rate`, `held_out_fooling_rate`: share of the photos whose prediction changes (with a target: becomes
        the target), of those that it was optimized on and of those that were held out.
        `noise_fooling_rate`: the same of the latter for random signs, as large as the perturbation's largest change.
        `linf_255`: largest change of a pixel.

    Command:
        cvlab attack photos/ --method universal
    """

    name = "universal_perturbation"
    Config = UniversalConfig
    columns = (
        Column("fooling_rate", "fooled, photos used"),
        Column("held_out_fooling_rate", "fooled, held out"),
        Column("noise_fooling_rate", "fooled by noise, held out", is_detail=True),
        Column("linf_255", "largest change", "1/255"),
        Column("panel", "panel", is_file=True),
    )
    metrics = (
        Metric("num_photos"),
        Metric("num_held_out"),
        Metric("fooling_rate", "fraction", "higher"),
        Metric("held_out_fooling_rate", "fraction", "higher"),
        Metric("noise_fooling_rate", "fraction"),
        Metric("linf_255", better="lower"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("loss", better="lower"),
    )

    def problems(self, config: UniversalConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also classes that the model does not have."""
        return super().problems(config, base) + config.class_problems("target", [config.target])

    def plan(self, config: UniversalConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class."""
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()
        target = "anything else" if config.target is None else model.classes[model.class_index(config.target)]
        return {"target": target, "steps": config.steps, **photo_batches.plan(config, ctx, model)}

    def run(self, config: UniversalConfig, run: RunDir) -> dict[str, float]:
        """Optimize the perturbation, save it, read it back and evaluate it."""
        import torch

        from cvlab.data import rng
        from cvlab.engine.image_optimizer import ImageState
        from cvlab.engine.loop import Losses
        from cvlab.experiments.adversarial import photo_set
        from cvlab.ops import linf_attacks

        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        photos = photo_set.load(config, model, ctx, target, run)
        sampler = rng.BatchSampler(config.seed, len(photos.used), config.batch_size, torch.device("cpu"))
        eps = config.eps / 255

        def objective(state: ImageState) -> Losses:
            numbers = photos.used[sampler(state.step)[1]]
            labels = photos.labels[numbers] if target is None else torch.full_like(numbers, target)
            uniform = rng.uniform(config.seed, state.step, torch.arange(3 * len(numbers)), "universal").view(-1, 3)
            moved = _flip_and_shift(photos.batch(numbers, ctx.device), uniform.tolist())
            images = (moved + state.tensors[0]).clamp(0, 1)
            with ctx.autocast():
                logits = model.module(images.contiguous(memory_format=torch.channels_last))
            losses = linf_attacks.cross_entropy(logits.float(), labels.to(ctx.device))
            return {"loss": losses.mean() if target is not None else -losses.clamp(max=MAX_LOSS).mean()}

        def update(state: ImageState, gradients: list[torch.Tensor]) -> None:
            alpha = config.alpha / 255 * (1 - state.step / config.steps)
            state.tensors[0] = (state.tensors[0] - alpha * gradients[0].sign()).clamp_(-eps, eps)

        size = model.transform.size_px
        initial = torch.zeros(3, size, size, device=ctx.device)
        perturbation, losses = photo_set.optimize(config, initial, objective, update, ctx, run)
        levels = _save_and_load(run, perturbation)
        after = photo_set.predict(model, [_attack(x, levels) for x in photos.inputs], ctx, config.batch_size)
        noise = _random_signs(config.seed, levels)
        inputs = [_attack(photos.inputs[k], noise) for k in photos.held_out.tolist()]
        after_noise = photo_set.predict(model, inputs, ctx, config.batch_size)
        fooled = _is_fooled(after, photos.labels, target)
        fooled_by_noise = _is_fooled(after_noise, photos.labels[photos.held_out], target)
        rates = {
            "fooling_rate": fooled[photos.used],
            "held_out_fooling_rate": fooled[photos.held_out],
            "noise_fooling_rate": fooled_by_noise,
        }
        values = {name: float(success.float().mean()) for name, success in rates.items()}
        values["linf_255"] = float(levels.abs().max())
        _save_panel(config, model, photos, levels, after, run)
        run.extra_summary |= summarize([PhotoResult(PERTURBATION, dict(values), {"panel": PANEL})], self.columns)
        run.extra_summary["headline"] = (
            f"fools {values['held_out_fooling_rate']:.2f} of {len(photos.held_out)} photos that were held out, "
            f"{values['fooling_rate']:.2f} of the {len(photos.used)} that it was optimized on; noise of its size fools "
            f"{values['noise_fooling_rate']:.2f} of the former"
        )
        return {"num_photos": len(photos.used), "num_held_out": len(photos.held_out), **values, **losses}


def _is_fooled(predicted: "Tensor", labels: "Tensor", target: int | None) -> "Tensor":
    """Return which predictions (N,) are the target, or without one differ from the labels (N,): bool (N,)."""
    return predicted == target if target is not None else predicted != labels


def _flip_and_shift(images: "Tensor", uniform: list[list[float]]) -> "Tensor":
    """Return photos (N, 3, S, S), flipped half of the time and rolled: few photos are fitted by heart otherwise."""
    import torch

    size = images.shape[3]
    rows = []
    for image, (flip, x, y) in zip(images, uniform, strict=True):
        shifts = [round((2 * u - 1) * MAX_SHIFT * size) for u in (y, x)]
        rows.append(torch.roll(image.flip(2) if flip < 0.5 else image, shifts, (1, 2)))
    return torch.stack(rows)


def _save_and_load(run: RunDir, perturbation: "Tensor") -> "Tensor":
    """Save a perturbation (3, S, S) as a picture around mid-gray; return it in steps of 1/255, int (3, S, S)."""
    from cvlab.data import photos
    from cvlab.experiments.common import saved_images
    from cvlab.reports import images

    run.folder("images")
    run.write_bytes(PERTURBATION, images.png(photos.to_image(perturbation + ZERO_LEVEL / 255)))
    saved = photos.to_tensor(saved_images.load(run, PERTURBATION))
    return (saved * 255).round().int() - ZERO_LEVEL


def _random_signs(seed: int, levels: "Tensor") -> "Tensor":
    """Return noise of a perturbation's shape and largest change."""
    import torch

    from cvlab.data import rng

    uniform = rng.uniform(seed, 0, torch.arange(levels.numel()), "random signs").view(levels.shape)
    return torch.where(uniform < 0.5, -1, 1) * levels.abs().max()


def _attack(image: "Image.Image", levels: "Tensor") -> "Image.Image":
    """Add a perturbation in steps of 1/255 to a photo of the model's size."""
    from cvlab.data.photos import to_image, to_tensor

    return to_image((to_tensor(image) + levels / 255).clamp(0, 1))


def _save_panel(
    config: UniversalConfig,
    model: "PretrainedClassifier",
    photos: "PhotoSet",
    levels: "Tensor",
    after: "Tensor",
    run: RunDir,
) -> None:
    """Save a panel of the amplified perturbation and of attacked photos, which are now of the classes `after` (N,)."""
    from cvlab.data.photos import to_image
    from cvlab.reports import images

    gain = ZERO_LEVEL // max(1, int(levels.abs().max()))
    tiles = [(f"perturbation x {gain}", to_image((ZERO_LEVEL + gain * levels) / 255))]
    for k in photos.held_out[:NUM_SHOWN].tolist():
        caption = f"{model.classes[photos.labels[k]]} becomes {model.classes[after[k]]}"
        tiles.append((caption, _attack(photos.inputs[k], levels)))
    title = f"universal perturbation of at most {config.eps:g}/255, on photos that were held out"
    run.write_bytes(PANEL, images.png(images.panel(tiles, title)))
