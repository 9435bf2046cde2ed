"""Compare saliency and attack with bare loops of the same model and with captum, in the same process.

Command: python benchmarks/photos.py --rounds 9
"""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.bench import harness
from cvlab.data import photo_paths, photos
from cvlab.engine import device as engine_device
from cvlab.experiments.adversarial import config as adversarial_config
from cvlab.experiments.adversarial.attack import Attack
from cvlab.experiments.common.photo_batches import Photo
from cvlab.models import pretrained
from cvlab.models.efficientnet import EfficientNetLite
from cvlab.models.names import DEFAULT_MODEL
from cvlab.ops import saliency
from cvlab.runs.run_dir import RunDir

STEPS = 4
TARGET = 9
SIZE_PX, RESIZE_PX = 224, 256  # preprocessing of the bundled model
SMALL = 1e-9  # so small a step that no attack succeeds before all steps are measured


def bare_model(device: torch.device) -> nn.Module:
    """Build the bundled model unchanged: float32, contiguous, batch normalization not folded."""
    model, preprocessing = EfficientNetLite(DEFAULT_MODEL), pretrained.preprocessing(DEFAULT_MODEL)
    pretrained.load_weights(model, DEFAULT_MODEL)
    return pretrained.NormalizedModel(model.eval().requires_grad_(False), preprocessing.mean, preprocessing.std).to(
        device
    )


def run(rounds: int, device: str, batch_size: int) -> dict[str, Any]:
    """Return `{"ok", "what", "loops": [{"loop", "seconds", "times_as_fast"}]}`, with the seconds of one step."""
    ctx = engine_device.select_device(device, "float32")
    model, bare = pretrained.build(device=ctx.device), bare_model(ctx.device)
    whole = photos.load(photo_paths.find_images([photo_paths.SAMPLE])[0])
    batch = [
        Photo(Path(f"{k}.png"), str(k), whole.crop((4 * k, 4 * k, 300 + 4 * k, 280 + 4 * k))) for k in range(batch_size)
    ]
    x = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch]).to(ctx.device)
    originals = [photos.to_tensor(photo.image).to(ctx.device) for photo in batch]
    y = torch.full((batch_size,), TARGET, device=ctx.device)
    with tempfile.TemporaryDirectory() as folder:
        out = RunDir(Path(folder))
        loops = {
            "bare gradient": harness.synchronized(ctx, lambda: _gradient(bare, x, y)),
            "saliency": harness.synchronized(ctx, lambda: saliency.vanilla_gradient(model.module, _last(x), y)),
            **_captum(ctx, bare, x, y),
            "bare attack, model size": harness.synchronized(ctx, lambda: _bare_attack(bare, list(x), y)),
            "bare attack, original size": harness.synchronized(ctx, lambda: _bare_attack(bare, originals, y)),
            **{
                f"attack, {size} size, {precision}": _attack(size, precision, device, model, batch, out)
                for size in ("model", "original")
                for precision in dict.fromkeys(("float32", engine_device.select_device(device).precision))
            },
        }
        seconds = harness.alternate(loops, rounds)
    rows = []
    for name, measured in seconds.items():
        is_attack = "attack" in name
        size = "original" if "original" in name else "model"
        base = seconds[f"bare attack, {size} size" if is_attack else "bare gradient"]
        times = statistics.median(b / a for a, b in zip(measured, base, strict=True))
        rows.append(
            {"loop": name, "seconds": statistics.median(measured) / (STEPS if is_attack else 1), "times_as_fast": times}
        )
    return {"ok": True, "what": f"{harness.describe(ctx, 'float32', rounds)}, batch {batch_size}", "loops": rows}


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    return torch.autograd.grad(model(leaf).gather(1, y[:, None]).sum(), leaf)[0].abs().amax(1)


def _captum(ctx: engine_device.ComputeContext, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    if importlib.util.find_spec("captum") is None:
        return {}
    method = importlib.import_module("captum.attr").Saliency(model)
    leaf = x.detach().requires_grad_(True)
    return {"captum's saliency": harness.synchronized(ctx, lambda: method.attribute(leaf, target=y).amax(1))}


def _bare_attack(model: nn.Module, images: list[Tensor], y: Tensor) -> None:
    """Attack photos (3, h, w) with a plain loop; those of another size are resized by torch."""
    attacked = images
    for _ in range(STEPS):
        leaves = [image.detach().requires_grad_(True) for image in attacked]
        logits = model(torch.stack([_resized(leaf) for leaf in leaves]))
        gradients = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), leaves)
        logits.argmax(1).tolist()
        pairs = zip(leaves, gradients, strict=True)
        attacked = [(leaf.detach() + SMALL * gradient / gradient.norm()).clamp(0, 1) for leaf, gradient in pairs]


def _resized(image: Tensor) -> Tensor:
    if image.shape[1:] == (SIZE_PX, SIZE_PX):
        return image
    short = min(image.shape[1:])
    size = [RESIZE_PX * side // short for side in image.shape[1:]]
    resized = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = ((side - SIZE_PX) // 2 for side in size)
    return resized[:, top : top + SIZE_PX, left : left + SIZE_PX]


def _attack(
    size: str, precision: str, device: str, model: pretrained.PretrainedClassifier, batch: list[Photo], out: RunDir
) -> Callable[[], None]:
    config = adversarial_config.AttackConfig(experiment="attack", target=str(TARGET), size=size, steps=STEPS, lr=SMALL)
    ctx = engine_device.select_device(device, precision)
    attacker = Attack(config, model, ctx, TARGET, out)
    examples = attacker.make_examples(batch)

    def loop() -> None:
        for example in examples:
            example.steps = 0
        attacker.optimize(examples, lambda *_: None)
        ctx.synchronize()

    return loop


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = harness.argument_parser(__doc__ or "", rounds=9)
    parser.add_argument("--batch-size", type=int, default=8, help="photos per batch")
    options = parser.parse_args(arguments)
    result = run(options.rounds, options.device, options.batch_size)
    rows = [(row["loop"], row["seconds"], row["times_as_fast"]) for row in result["loops"]]
    columns = ("loop", "seconds per step (median)", "speedup over bare")
    harness.print_result(result, options.json, columns, rows)


if __name__ == "__main__":
    main()
