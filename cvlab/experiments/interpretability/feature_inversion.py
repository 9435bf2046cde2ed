"""The images of feature inversion: target features, objective, evaluation of the saved files."""

from pathlib import Path

import torch
from torch import Tensor

from cvlab.data import photo_paths, photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.experiments.common import saved_images
from cvlab.experiments.interpretability.config import FeatureInversionConfig
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style
from cvlab.reports import images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir

LATE_FRACTION = 0.9  # of the steps, after which the learning rate is reduced
LATE_LR_FACTOR = 0.2


class FeatureInverter:
    """The features of the photo at each layer, and the losses of the images that are to reproduce them."""

    def __init__(self, config: FeatureInversionConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.ctx = config, ctx
        self.photo = model.transform(photos.load(photo_paths.find_images([config.image])[0]))
        self.photo_pixels = photos.to_tensor(self.photo).to(ctx.device)  # (3, S, S) in [0, 1]
        self.extractors = [FeatureExtractor(model, [name]) for name in config.layers]
        with torch.no_grad():
            self.targets = [self._extract_features(k, self.photo_pixels) for k in range(len(config.layers))]
        variations = [(target - target.mean((1, 2), keepdim=True)).square().sum() for target in self.targets]
        self.layer_weights = [config.content_weight / max(float(variation), 1e-30) for variation in variations]
        self._adam = image_optimizer.adam(self._lr)

    def _extract_features(self, k: int, pixels: Tensor) -> Tensor:
        """Return the features (C, h, w) of an image at layer number `k`."""
        with self.ctx.autocast():
            return self.extractors[k](pixels)[self.config.layers[k]].float()

    def initial_pixels(self) -> list[Tensor]:
        """Return uniform noise, the same for each layer."""
        noise = rng.uniform(self.config.seed, 0, torch.arange(self.photo_pixels.numel()), "inversion").float()
        return [noise.view(self.photo_pixels.shape).to(self.ctx.device) for _ in self.config.layers]

    def objective(self, state: ImageState) -> Losses:
        """Return the feature distances and the total variation, summed over the layers' images."""
        distances = [
            self.layer_weights[k] * style.content_loss(self._extract_features(k, pixels), self.targets[k])
            for k, pixels in enumerate(state.tensors)
        ]
        content_loss = torch.stack(distances).sum()
        num_pixels = self.photo_pixels.shape[1] * self.photo_pixels.shape[2]
        variations = torch.stack([style.tv_loss(pixels) for pixels in state.tensors])
        tv_loss = self.config.tv_weight / num_pixels * variations.sum()
        return {"loss": content_loss + tv_loss, "content_loss": content_loss, "tv_loss": tv_loss}

    def update(self, state: ImageState, gradients: list[Tensor]) -> None:
        """Take a step of Adam and clamp the pixels."""
        self._adam(state, gradients)
        state.tensors = [pixels.clamp(0, 1) for pixels in state.tensors]

    def _lr(self, step: int) -> float:
        return self.config.lr * (LATE_LR_FACTOR if step >= LATE_FRACTION * self.config.steps else 1.0)


def save_preview(run: RunDir, state: ImageState) -> None:
    """Save the intermediate images side by side."""
    run.folder("images")
    strip = images.strip([photos.to_image(pixels) for pixels in state.tensors])
    run.write_bytes("images/preview.png", images.png(strip))


def save_and_evaluate(inverter: FeatureInverter, state: ImageState, run: RunDir) -> list[PhotoResult]:
    """Save the images and a panel of them; return the PSNR of the saved files."""
    results, tiles = [], [("photo", inverter.photo)]
    for layer, pixels in zip(inverter.config.layers, state.tensors, strict=True):
        path = f"images/{layer.replace('/', '_')}.png"
        run.write_bytes(path, images.png(photos.to_image(pixels)))
        image = saved_images.load(run, path)
        psnr_db = style.psnr_db(photos.to_tensor(image), inverter.photo_pixels.cpu())
        tiles.append((f"{layer}: {psnr_db:.1f} dB", image))
        results.append(PhotoResult(path, {"layer": layer, "psnr_db": psnr_db}, {"panel": "images/panel.png"}))
    title = f"feature inversion by layer, PSNR with the photo: {Path(inverter.config.image).name}"
    run.write_bytes("images/panel.png", images.png(images.panel(tiles, title)))
    return results
