"""Attack batches of photos: optimize, save as PNG, evaluate the saved file, continue until it fools the model."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
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
from cvlab.experiments.adversarial.config import JPEG_NAMES, AttackConfig
from cvlab.experiments.adversarial.minimal import MINIMIZERS
from cvlab.experiments.common import saved_images
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import attacks, photo_changes, saliency
from cvlab.ops.resample import DifferentiableResize, build_resize
from cvlab.reports import images
from cvlab.runs.records import Row
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir

CHANGED = "success_"  # before the name of a change: whether the attack succeeds after it
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
        self.changes = {name: photo_changes.build(name) for name in config.survive}

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Attack a batch of photos, save the images, return one result for each photo."""
        examples = self.make_examples(batch)
        results = {example: self._save_and_evaluate(example) for example in examples if self._is_target(example)}
        active = [example for example in examples if example not in results]
        if self.config.method in MINIMIZERS and active:
            MINIMIZERS[self.config.method](self, active, check_interrupt)
            results |= {example: self._save_and_evaluate(example) for example in active}
            active = []
        while active:  # until the saved files succeed
            self.optimize(active, check_interrupt)
            results |= {example: self._save_and_evaluate(example) for example in active}
            active = [
                example
                for example in active
                if not results[example].values["survived"] and example.steps < self._max_steps
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
            size = max(1, self.config.batch_size // (1 + len(self.changes)))  # inputs of the model in memory
            for k in range(0, len(active), size):
                self._step(active[k : k + size])
            active = [e for e in active if e.steps < self._max_steps and (e.steps_left is None or e.steps_left > 0)]

    def _step(self, active: list[AdversarialExample]) -> None:
        """Take one step of each example."""
        state = ImageState([example.adversarial for example in active])
        losses = next(image_optimizer.optimization_steps(state, self._objective(active), self._update(active)))
        for example, pixels, success in zip(active, state.tensors, losses["success"].tolist(), strict=True):
            example.adversarial = pixels
            example.steps += 1
            if success and example.steps_left is None:  # before this step, which is the first of the extra ones
                example.steps_left = self.config.extra_steps
            example.steps_left = example.steps_left - 1 if example.steps_left is not None else None

    def _objective(self, active: list[AdversarialExample]) -> Callable[[ImageState], Losses]:
        targeted = self.target is not None
        classes = torch.tensor([example.attacked_class for example in active], device=self.ctx.device)

        def objective(state: ImageState) -> Losses:
            inputs = [self._inputs(e, pixels) for e, pixels in zip(active, state.tensors, strict=True)]
            logits = self.logits(list(itertools.chain(*inputs)))
            classes_of_inputs = classes.repeat_interleave(len(inputs[0]))
            success = attacks.attack_succeeded(logits, classes_of_inputs, targeted).view(len(active), -1).all(1)
            return {"loss": attacks.attack_loss(logits, classes_of_inputs, targeted).sum(), "success": success}

        return objective

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits (N, K) of inputs of the model, each (3, S, S)."""
        with self.ctx.autocast():
            logits: Tensor = self.model.module(torch.stack(list(inputs)).contiguous(memory_format=torch.channels_last))
        return logits

    def fools(self, example: AdversarialExample, pixels: Tensor) -> bool:
        """Whether the photo with these pixels, rounded to 8 bits as it would be saved, fools the model."""
        model_input = photos.to_tensor(self.model.transform(_with_pixels(example, pixels))).to(self.ctx.device)
        with torch.inference_mode():
            probabilities = self.model.probabilities(model_input[None])
        classes = torch.tensor([example.attacked_class], device=self.ctx.device)
        return bool(attacks.attack_succeeded(probabilities, classes, self.target is not None))

    def _inputs(self, example: AdversarialExample, pixels: Tensor) -> Tensor:
        """Return the model's inputs (1 + number of changes, 3, S, S): of the image and of its changed copies."""
        inputs = [example.resize(pixels)]
        if self.changes:
            image = attacks.paste(photos.to_tensor(example.image).to(pixels.device), pixels, example.resize.region)
            indices = torch.arange(len(self.changes) * photo_changes.NUM_UNIFORM)
            uniform = rng.uniform(self.config.seed, example.steps, indices, f"survive {example.photo.label}")
            rows = uniform.view(len(self.changes), -1).tolist()
            for change, row in zip(self.changes.values(), rows, strict=True):
                changed = change(image, row)
                resize = build_resize(self.model.transform, changed.shape[2], changed.shape[1], self.ctx.device)
                inputs.append(resize(resize.crop(changed).contiguous()))
        return torch.stack(inputs)

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
        """Save the attacked image, read it back and classify it, also after it was changed as photos are."""
        image = example.image if self._is_target(example) else _with_pixels(example, example.adversarial)
        name = f"images/{example.photo.label}-attacked.png"
        self.out.write_bytes(name, images.png(image, photos.read_metadata(example.photo.path)))
        saved = saved_images.load(self.out, name)
        evaluated = {name: photo_changes.build(name) for name in JPEG_NAMES} | self.changes
        variants = {name: change.variants(saved) for name, change in evaluated.items()}
        inputs = [self.model.transform(image) for image in [saved, *itertools.chain(*variants.values())]]
        with torch.inference_mode():
            batch = torch.stack([photos.to_tensor(image) for image in inputs])
            probabilities = self.model.probabilities(batch.to(self.ctx.device)).cpu()
        classes = torch.full((len(inputs),), example.attacked_class)
        success, *others = attacks.attack_succeeded(probabilities, classes, self.target is not None).tolist()
        after = iter(others)
        success_after = {name: all(list(itertools.islice(after, len(v)))) for name, v in variants.items()}
        survives = [name for name in self.changes if success_after[name]]
        input_distances = attacks.distances(photos.to_tensor(self.model.transform(example.image)), batch[0])
        photo_distances = attacks.distances(photos.to_tensor(example.image), photos.to_tensor(saved))
        values = {
            **self._predictions(example, probabilities[0]),
            "outcome": self._outcome(example, success),
            "success": success,
            "survived": success and len(survives) == len(self.changes),
            **({"survives": ", ".join(survives) or "nothing"} if self.changes else {}),
            "is_target_before": self._is_target(example),
            "steps": example.steps,
            "l2": input_distances["l2"],
            "l2_photo": photo_distances["l2"],
            "linf_255": photo_distances["linf_255"],
            "psnr_db": photo_distances["psnr_db"],
            **{CHANGED + name: value for name, value in success_after.items()},
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


def _with_pixels(example: AdversarialExample, pixels: Tensor) -> Image.Image:
    """Return the image with other pixels (3, h, w) in the region that the model sees, rounded to 8 bits."""
    image = example.image.copy()
    image.paste(photos.to_image(pixels), example.resize.region[:2])
    return image


def compute_metrics(config: AttackConfig, results: list[PhotoResult]) -> dict[str, float]:
    """Return the success rates and medians over the photos that were not classified as the target before."""
    attacked = [result.values for result in results if not result.values["is_target_before"]]
    metrics: dict[str, float] = {"num_photos": len(results), "num_attacked": len(attacked)}
    if attacked:
        metrics["success_rate"] = statistics.fmean(row["success"] for row in attacked)
        metrics |= {name: statistics.median(row[name] for row in attacked) for name in MEDIANS}
        names = [key.removeprefix(CHANGED) for key in attacked[0] if key.startswith(CHANGED)]
        metrics |= {f"success_rate_{name}": statistics.fmean(row[CHANGED + name] for row in attacked) for name in names}
        if config.survive:
            metrics["survival_rate"] = statistics.fmean(row["survived"] for row in attacked)
    return metrics


def survival_headline(config: AttackConfig, metrics: Mapping[str, float]) -> str:
    """Return in a line which share of the photos fools the model after each change, and at which L2 norm."""
    rates = ", ".join(f"{name} {metrics[f'success_rate_{name}']:.2f}" for name in config.survive)
    return f"survives {rates}, of {metrics['num_attacked']:.0f} photos; median L2 {metrics['l2']:.2f}"
