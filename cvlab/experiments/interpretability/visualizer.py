"""A picture for each of several classes, optimised together: how it starts, is seen by the net, moves and is judged."""

import re
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.loop import Compute, Losses, Pixels
from cvlab.models.pretrained import Pretrained
from cvlab.ops import visualize
from cvlab.reports import images
from cvlab.runs.run_dir import Row, RunDir

START_DEVIATION = 0.225  # of noise around mid-grey: that of ImageNet's colours
START_FOURIER = 0.01
BLURRED_SHARE = 0.7  # of the steps, where there is a blur


def shape(config: Any, model: Pretrained) -> tuple[int, ...]:
    """Return the shape of what is optimised."""
    count, size = len(config.targets), model.frame.size_px
    return visualize.spectrum_shape(count, size) if config.parametrization == "fourier" else (count, 3, size, size)


class Easel:
    """What is done to the pictures; `config` is that of the experiment `class_visualization`."""

    def __init__(self, config: Any, model: Pretrained, where: Compute, classes: list[int], out: RunDir) -> None:
        self.config, self.model, self.where, self.out = config, model, where, out
        self.classes = torch.tensor(classes, device=where.device)
        self.names = [f"{index}-{re.sub(r'[^a-zA-Z0-9]+', '_', model.classes[index])}" for index in classes]
        self.is_fourier = config.parametrization == "fourier"
        self.adam = image_optimizer.adam(lambda step: config.lr * (1 - step / config.steps))

    def start(self) -> Tensor:
        """Return what the optimisation starts from: coefficients or pixels."""
        config, size = self.config, self.model.frame.size_px
        noise = rng.normal(config.seed, 0, shape(config, self.model), "classvis").to(self.where.device)
        if config.init == "image":
            view = self.model.frame.view(photos.load(photos.find(config.images)[0]))
            pixels = photos.to_tensor(view).to(self.where.device).expand(len(self.classes), 3, size, size)
            return visualize.encode(pixels) if self.is_fourier else pixels.clone()
        return noise * START_FOURIER if self.is_fourier else (0.5 + START_DEVIATION * noise).clamp(0, 1)

    def _uniform(self, step: int, use: str) -> Callable[[int], Tensor]:
        return lambda count: rng.uniform(self.config.seed, step, torch.arange(count), f"classvis {use}").float()

    def _decoded(self, pixels: Pixels) -> Tensor:
        if not self.is_fourier:
            return pixels.tensors[0]
        octave = min(self.config.octaves - 1, pixels.step * self.config.octaves // self.config.steps)
        band = 2.0 ** (octave - self.config.octaves + 1)
        return visualize.decode(pixels.tensors[0], self.model.frame.size_px, band)

    def objective(self, pixels: Pixels) -> Losses:
        """Return the loss: minus the classes' scores, of the pictures as they are seen through random movements."""
        config, step = self.config, pixels.step
        drawn = self._decoded(pixels)
        seen = drawn
        if config.jitter_px:
            seen = visualize.rolled(seen, self._uniform(step, "jitter"), config.jitter_px)
        if config.turn_degrees or config.zoom or config.shift:
            most = {"turn_degrees": config.turn_degrees, "zoom": config.zoom, "shift": config.shift}
            seen = visualize.moved(seen, self._uniform(step, "move"), **most)
        blurs, by = self._uniform(step, "blur")(2).tolist()
        if config.blur and blurs < BLURRED_SHARE:
            seen = visualize.blurred(seen, 0.3 + by * config.blur)
        if config.grey or config.contrast:
            colour = self._uniform(step, "colour")
            seen = visualize.recoloured(seen, colour, grey=config.grey, contrast=config.contrast)
        with self.where.autocast():
            scores = self.model.net(seen.contiguous(memory_format=torch.channels_last)).float()
        picked = scores.gather(1, self.classes[:, None])[:, 0]
        loss = -picked.sum()
        if config.l2:
            loss = loss + config.l2 * ((drawn - 0.5) / START_DEVIATION).square().sum()
        if config.tv:
            across, down = drawn.diff(dim=3).square().sum(), drawn.diff(dim=2).square().sum()
            loss = loss + config.tv * (across + down)
        return {"loss": loss, "score": picked.detach().mean()}

    def update(self, pixels: Pixels, gradients: list[Tensor]) -> None:
        """Step: Adam on coefficients; on pixels a step of fixed length, into [0, 1], blurred now and then."""
        if self.is_fourier:
            self.adam(pixels, gradients)
            return
        norms = gradients[0].flatten(1).norm(dim=1).clamp(min=1e-20).view(-1, 1, 1, 1)
        moved = (pixels.tensors[0] - self.config.lr * gradients[0] / norms).clamp_(0, 1)
        if self.config.blur_every and (pixels.step + 1) % self.config.blur_every == 0:
            moved = visualize.blurred(moved, self.config.blur_sigma)
        pixels.tensors[0] = moved

    @torch.no_grad()
    def _images(self, pixels: Pixels) -> list[Image.Image]:
        return [photos.to_image(picture) for picture in self._decoded(pixels)]

    def keep_frame(self, step: int, pixels: Pixels) -> None:
        """Write the pictures as they are, a file each."""
        folder = self.out.folder("images") / "frames"
        folder.mkdir(exist_ok=True)
        for name, image in zip(self.names, self._images(pixels), strict=True):
            self.out.write_bytes(f"images/frames/{name}-{step:06d}.png", images.png(image))

    def finish(self, pixels: Pixels) -> list[Row]:
        """Write the pictures, their strips and animations; return how the files are classified."""
        files = [f"images/{name}.png" for name in self.names]
        for file, image in zip(files, self._images(pixels), strict=True):
            self.out.write_bytes(file, images.png(image))
        probabilities = self.model.probabilities(self._read(files)).cpu()
        rows = []
        for name, file, p, index in zip(self.names, files, probabilities, self.classes.tolist(), strict=True):
            frames = [photos.load(path) for path in sorted((self.out.path / "images" / "frames").glob(f"{name}-*.png"))]
            self.out.write_bytes(f"images/{name}-frames.png", images.png(images.strip(frames)))
            self.out.write_bytes(f"images/{name}.gif", images.gif(frames))
            told = {"target": self.model.classes[index], "score_target": float(p[index])}
            made = {"frames": f"images/{name}-frames.png", "animation": f"images/{name}.gif"}
            rows.append({"image": file, **self.model.found(int(p.argmax()), float(p.max())), **told, **made})
        return rows

    def _read(self, files: list[str]) -> Tensor:
        return torch.stack([photos.to_tensor(photos.load(self.out.path / file)) for file in files]).to(
            self.where.device
        )

    def ask(self, second: Callable[[Tensor], Tensor], rows: list[Row]) -> None:
        """Add to the results what a second net sees in the files: its top class, and the target's rank from 1."""
        probabilities = second(self._read([row["image"] for row in rows])).cpu()
        for row, p, index in zip(rows, probabilities, self.classes.tolist(), strict=True):
            row["second_label"] = self.model.classes[int(p.argmax())]
            row["second_rank"] = int((p > p[index]).sum()) + 1
