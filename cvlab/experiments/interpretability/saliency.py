"""Saliency maps of photos: compute them, save them as images and arrays."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvlab.data import photos
from cvlab.engine.device import ComputeContext
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.experiments.interpretability import comparison
from cvlab.experiments.interpretability.config import SaliencyConfig
from cvlab.experiments.interpretability.saliency_methods import METHOD_TITLES, compute_maps, strongest_fraction
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.reports import images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir


@contextlib.contextmanager
def _checking(module: nn.Module, check_interrupt: Callable[[], None]) -> Iterator[None]:
    """Check for an interrupt before each forward pass; some methods take hundreds of them for a photo."""
    hook = module.register_forward_pre_hook(lambda _module, _args: check_interrupt())
    try:
        yield
    finally:
        hook.remove()


class SaliencyMaps:
    """Computes and saves the saliency maps of batches of photos; `target` None: of the predicted classes."""

    def __init__(
        self, config: SaliencyConfig, model: PretrainedClassifier, ctx: ComputeContext, target: int | None, run: RunDir
    ) -> None:
        self.config, self.model, self.ctx, self.target, self.run = config, model, ctx, target, run
        if config.compare:
            self.methods, reasons = comparison.allowed_methods(config, model)
            for reason in reasons:
                run.log(f"not compared: {reason}")

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return one result for each photo."""
        model, ctx = self.model, self.ctx
        inputs = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch]).to(ctx.device)
        with torch.inference_mode():
            probabilities = model.probabilities(inputs)
        predicted = probabilities.argmax(1)
        classes = predicted if self.target is None else torch.full((len(batch),), self.target, device=ctx.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with ctx.autocast(), _checking(model.module, check_interrupt):
            maps = compute_maps(self.config, self.config.method, model, inputs, classes.clone()).float().cpu()
        results = []
        for k, (photo, values, p, index) in enumerate(zip(batch, maps, probabilities, classes.tolist(), strict=True)):
            row = {
                **model.class_score(index, float(p[index])),
                "predicted": model.class_score(int(p.argmax()), float(p.max())),
                "inside": strongest_fraction(values),
            }
            files = self._save(photo, values, model.classes[index])
            if self.config.compare:
                share = (k / len(batch), (k + 1) / len(batch))
                row["methods"], files["comparison"] = self._compare(photo, inputs[k], index, check_interrupt, share)
            results.append(PhotoResult(str(photo.path), row, files))
        return results

    def _compare(
        self,
        photo: Photo,
        photo_input: Tensor,
        index: int,
        check_interrupt: CheckInterrupt,
        share: tuple[float, float],
    ) -> tuple[list[dict[str, Any]], str]:
        """Save the sheet of all methods of a photo; return their scores and its path.

        `share` is where the photo begins and ends in the batch, as fractions, for the progress.
        """
        view = self.model.transform(photo.image)
        note, done = "", share[0]

        def show(method: str, fraction: float) -> None:
            nonlocal note, done
            note, done = method, share[0] + fraction * (share[1] - share[0])
            check_interrupt(note, done)

        with self.ctx.autocast(), _checking(self.model.module, lambda: check_interrupt(note, done)):
            rows, tiles = comparison.compare(self.config, self.methods, self.model, photo_input, index, view, show)
        random = rows[-1]
        title = (
            f"saliency of the {self.config.objective}: {self.model.classes[index]}. Good maps: high insertion, low "
            f"deletion (a random order: {random['insertion']:.3f}, {random['deletion']:.3f})"
        )
        name = f"images/{photo.label}-comparison.png"
        self.run.write_bytes(name, images.png(images.panel(tiles, title, has_color_bar=True)))
        return rows, name

    def _save(self, photo: Photo, values: Tensor, class_name: str) -> dict[str, str]:
        """Save a map as an image, as an overlay, in a panel, and as an array; return the paths."""
        transform, config = self.model.transform, self.config
        scaled = images.scaled(values)
        heat = images.heat(scaled)
        overlay = images.overlay(photo.image, scaled, transform.crop_box(*photo.image.size))
        caption = f"{METHOD_TITLES[config.method]} of the {config.objective}: {class_name}"
        box = transform.crop_box(*photo.image.size)
        tiles = [("the model's input", transform(photo.image))]
        tiles += images.saliency_tiles(caption, photo.image, scaled, box)
        panel = images.panel(tiles, f"saliency: {photo.path.name}", has_color_bar=True)
        files = {}
        for key, image in (("map", heat), ("overlay", overlay), ("panel", panel)):
            files[key] = f"images/{photo.label}-{key}.png"
            self.run.write_bytes(files[key], images.png(image))
        array = io.BytesIO()
        np.save(array, values.numpy())
        files["values"] = f"images/{photo.label}-map.npy"
        self.run.write_bytes(files["values"], array.getvalue())
        return files
