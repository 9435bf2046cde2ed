"""Attack batches of photos: optimize, save as PNG, evaluate the saved file, continue until it fools the model."""

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.experiments.adversarial import drawing
from cvlab.experiments.adversarial.config import JPEG_QUALITIES, AttackConfig
from cvlab.experiments.common import saved_images
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import attacks, saliency
from cvlab.ops.resample import DifferentiableResize, build_resize
from cvlab.reports import images
from cvlab.runs.records import Row
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir

MEDIANS = ("steps", "l2", "l2_photo", "linf_255", "psnr_db")


@dataclass(eq=False)
class AdversarialExample:
    """A photo under attack.

    Attributes:
        photo: The photo.
        image: The image that is changed: the photo, or for `size: model` the photo reduced to the model's input size.
        resize: The differentiable resize of the cropped region to the model's input.
        original: Original pixels (3, h, w) in [0, 1] of the region of the image that the model sees.
        adversarial: Attacked pixels of that region.
        clean_probabilities: Probabilities (classes,) of the original photo.
        attacked_class: Class whose logit is maximized if the attack is targeted, and minimized if not.
        steps: Number of steps done.
        steps_left: Remaining steps after the first success; None before it.
    """

    photo: Photo
    image: Image.Image
    resize: DifferentiableResize
    original: Tensor
    adversarial: Tensor
    clean_probabilities: Tensor
    attacked_class: int
    steps: int = 0
    steps_left: int | None = None


class Attack:
    """An attack on batches of photos; `target` is the index of the target class, None for an untargeted attack."""

    def __init__(
        self, config: AttackConfig, model: PretrainedClassifier, ctx: ComputeContext, target: int | None, out: RunDir
    ) -> None:
        self.config, self.model, self.ctx, self.target, self.out = config, model, ctx, target, out

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Attack a batch of photos, save the images, return one result for each photo."""
        examples = self.make_examples(batch)
        results = {example: self._save_and_evaluate(example) for example in examples if self._is_target(example)}
        active = [example for example in examples if example not in results]
        while active:  # until the saved files succeed
            self.optimize(active, check_interrupt)
            results |= {example: self._save_and_evaluate(example) for example in active}
            active = [
                example
                for example in active
                if not results[example].values["success"] and example.steps < self._max_steps
            ]
        for example in examples:
            results[example].files |= self._save_panels(example, results[example])
        return [results[example] for example in examples]

    @property
    def _max_steps(self) -> int:
        return 1 if self.config.method == "fgsm" else int(self.config.steps)

    def _is_target(self, example: AdversarialExample) -> bool:
        """Whether the photo is classified as the target without an attack."""
        return self.target is not None and int(example.clean_probabilities.argmax()) == self.target

    def make_examples(self, batch: list[Photo]) -> list[AdversarialExample]:
        """Classify the photos and initialize their adversarial examples."""
        transform = self.model.transform
        # An image of the model's input size is a photo too: whoever reads its file resizes and crops it.
        is_reduced = self.config.size == "model"
        attacked_images = [transform(photo.image) if is_reduced else photo.image for photo in batch]
        inputs = [transform(image) for image in attacked_images]
        with torch.inference_mode():
            stacked = torch.stack([photos.to_tensor(model_input) for model_input in inputs]).to(self.ctx.device)
            probabilities = self.model.probabilities(stacked).cpu()
        examples = []
        for photo, image, p in zip(batch, attacked_images, probabilities, strict=True):
            resize = build_resize(transform, *image.size, self.ctx.device)
            original = resize.crop(photos.to_tensor(image)).contiguous().to(self.ctx.device)
            attacked_class = int(p.argmax()) if self.target is None else self.target
            start = self._initial_pixels(photo, original)
            examples.append(AdversarialExample(photo, image, resize, original, start, p, attacked_class))
        return examples

    def _initial_pixels(self, photo: Photo, original: Tensor) -> Tensor:
        if self.config.method != "pgd" or not self.config.random_start:
            return original.clone()
        counters = torch.arange(original.numel()).view(original.shape)
        noise = rng.uniform(self.config.seed, 0, counters, f"pgd {photo.label}").float().to(original.device)
        return attacks.random_start(original, noise, self.config.bound)

    def optimize(self, active: list[AdversarialExample], check_interrupt: CheckInterrupt) -> None:
        """Take steps until each example has succeeded and done its extra steps, or has used up its steps."""
        for example in active:
            example.steps_left = None
        while active:
            step = max(example.steps for example in active)
            check_interrupt(f"step {step} of {self._max_steps}", step / self._max_steps)
            state = ImageState([example.adversarial for example in active])
            losses = next(image_optimizer.optimization_steps(state, self._objective(active), self._update(active)))
            for example, pixels, success in zip(active, state.tensors, losses["success"].tolist(), strict=True):
                example.adversarial = pixels
                example.steps += 1
                if success and example.steps_left is None:  # before this step, which is the first of the extra ones
                    example.steps_left = self.config.extra_steps
                example.steps_left = example.steps_left - 1 if example.steps_left is not None else None
            active = [e for e in active if e.steps < self._max_steps and (e.steps_left is None or e.steps_left > 0)]

    def _objective(self, active: list[AdversarialExample]) -> Callable[[ImageState], Losses]:
        targeted = self.target is not None
        classes = torch.tensor([example.attacked_class for example in active], device=self.ctx.device)

        def objective(state: ImageState) -> Losses:
            inputs = torch.stack([e.resize(pixels) for e, pixels in zip(active, state.tensors, strict=True)])
            with self.ctx.autocast():
                logits = self.model.module(inputs.contiguous(memory_format=torch.channels_last))
            success = attacks.attack_succeeded(logits, classes, targeted)
            return {"loss": attacks.attack_loss(logits, classes, targeted).sum(), "success": success}

        return objective

    def _update(self, active: list[AdversarialExample]) -> image_optimizer.Update:
        config, eps = self.config, self.config.bound
        alpha = eps if config.method == "fgsm" else config.alpha / attacks.MAX_UINT8

        def update(state: ImageState, gradients: list[Tensor]) -> None:
            for k, (example, gradient) in enumerate(zip(active, gradients, strict=True)):
                pixels = state.tensors[k]
                if config.method == "l2":  # the same mean change of a pixel at any resolution
                    state.tensors[k] = attacks.l2_step(pixels, gradient, config.lr * example.resize.scale)
                else:
                    state.tensors[k] = attacks.linf_step(pixels, gradient, example.original, alpha, eps)

        return update

    def _save_and_evaluate(self, example: AdversarialExample) -> PhotoResult:
        """Save the attacked image, read it back and classify it, also after JPEG compression."""
        image = example.image.copy()
        if not self._is_target(example):
            image.paste(photos.to_image(example.adversarial), example.resize.region[:2])
        name = f"images/{example.photo.label}-attacked.png"
        self.out.write_bytes(name, images.png(image, photos.read_metadata(example.photo.path)))
        saved = saved_images.load(self.out, name)
        variants = [saved, *(_compress_jpeg(saved, quality) for quality in JPEG_QUALITIES)]
        inputs = torch.stack([photos.to_tensor(self.model.transform(variant)) for variant in variants])
        with torch.inference_mode():
            probabilities = self.model.probabilities(inputs.to(self.ctx.device)).cpu()
        classes = torch.full((len(inputs),), example.attacked_class)
        success, *jpeg_success = attacks.attack_succeeded(probabilities, classes, self.target is not None).tolist()
        input_distances = attacks.distances(photos.to_tensor(self.model.transform(example.image)), inputs[0])
        photo_distances = attacks.distances(photos.to_tensor(example.image), photos.to_tensor(saved))
        values = {
            **self._predictions(example, probabilities[0]),
            "outcome": self._outcome(example, success),
            "success": success,
            "already": self._is_target(example),
            "steps": example.steps,
            "l2": input_distances["l2"],
            "l2_photo": photo_distances["l2"],
            "linf_255": photo_distances["linf_255"],
            "psnr_db": photo_distances["psnr_db"],
            **{f"success_jpeg{quality}": s for quality, s in zip(JPEG_QUALITIES, jpeg_success, strict=True)},
        }
        return PhotoResult(str(example.photo.path), values, {"attacked": name})

    def _outcome(self, example: AdversarialExample, success: bool) -> str:
        """Describe the result for people."""
        if self._is_target(example):
            return f"already {self.model.classes[example.attacked_class]}, left as it is"
        return "prediction changed" if success else "prediction not changed"

    def _predictions(self, example: AdversarialExample, probabilities: Tensor) -> Row:
        """Return the predicted class after and before the attack, and the probabilities of the target."""
        clean = example.clean_probabilities
        row = {
            **self.model.class_score(int(probabilities.argmax()), float(probabilities.max())),
            "before": self.model.class_score(int(clean.argmax()), float(clean.max())),
        }
        if self.target is None:
            return row
        name, k = self.model.classes[self.target], self.target
        return row | {"target": name, "target_before": float(clean[k]), "target_after": float(probabilities[k])}

    def _save_panels(self, example: AdversarialExample, result: PhotoResult) -> dict[str, str]:
        """Save the panel of the attack, and the saliency maps if they are configured; return their paths."""
        values = result.values
        before, after = example.image, saved_images.load(self.out, result.files["attacked"])
        panel = drawing.attack_panel(example.photo.path.name, values, before, after, example.resize.region)
        name = f"images/{example.photo.label}-panel.png"
        self.out.write_bytes(name, images.png(panel))
        return {"panel": name} | (self._save_saliency(example, before, after) if self.config.then else {})

    def _save_saliency(self, example: AdversarialExample, before: Image.Image, after: Image.Image) -> dict[str, str]:
        """Save a panel of the saliency maps of the predictions before and after the attack; return its path."""
        inputs = torch.stack([photos.to_tensor(self.model.transform(image)) for image in (before, after)])
        inputs = inputs.to(self.ctx.device).contiguous(memory_format=torch.channels_last)
        classes = self.model.module(inputs).argmax(1)
        maps = saliency.vanilla_gradient(self.model.module, inputs, classes)
        tiles = []
        for when, image, values, index in zip(
            ("before", "after"), (before, after), maps, classes.tolist(), strict=True
        ):
            box = self.model.transform.crop_box(*image.size)
            tiles += images.saliency_tiles(f"{when}: {self.model.classes[index]}", image, images.scaled(values), box)
        name = f"images/{example.photo.label}-saliency.png"
        title = f"gradient saliency before and after the attack: {example.photo.path.name}"
        self.out.write_bytes(name, images.png(images.panel(tiles, title, has_color_bar=True)))
        return {"saliency": name}


def _compress_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def compute_metrics(results: list[PhotoResult]) -> dict[str, float]:
    """Return the success rates and medians over the photos that were not classified as the target before."""
    attacked = [result.values for result in results if not result.values["already"]]
    metrics: dict[str, float] = {"num_photos": len(results), "num_attacked": len(attacked)}
    if attacked:
        metrics["success_rate"] = statistics.fmean(row["success"] for row in attacked)
        metrics |= {name: statistics.median(row[name] for row in attacked) for name in MEDIANS}
        for quality in JPEG_QUALITIES:
            successes = [row[f"success_jpeg{quality}"] for row in attacked]
            metrics[f"success_rate_jpeg{quality}"] = statistics.fmean(successes)
    return metrics
