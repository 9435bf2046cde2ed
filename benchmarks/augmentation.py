"""CPU time per image of each augmentation of training images, in one thread.

    python benchmarks/augmentation.py

CPU time is less affected by other programs than wall time.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from cvlab.experiments.classification.data.augment import Augmentation

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "flip": {"flip": True},
    "flip, translate_px: 2": {"flip": True, "translate_px": 2},
    "cutout_px: 8": {"cutout_px": 8},
    "crop: [0.6, 1.0]": {"crop": (0.6, 1.0)},
    "mixup: 0.2": {"mixup": 0.2},
    "cutmix: 1.0": {"cutmix": 1.0},
    "erase: 0.25": {"erase": 0.25},
    "policy: trivial": {"policy": "trivial"},
    "policy: rand": {"policy": "rand"},
    "rotate: 10": {"rotate": 10.0},
    "color: 0.4": {"color": 0.4},
}
BATCHES = {32: 100, 224: 16}  # height and width of the images -> batch size
NUM_CLASSES = 10


def seconds_per_image(augment: Augmentation, size_px: int, step: int) -> float:
    """Return the CPU seconds per image of a batch."""
    count = BATCHES[size_px]
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (count, size_px, size_px, 3), generator=generator, dtype=torch.uint8)
    normalized = torch.randn(count + 1, 3, size_px, size_px, generator=generator)
    targets = torch.eye(NUM_CLASSES)[torch.arange(count + 1) % NUM_CLASSES]
    indices = torch.arange(count)
    start = time.process_time()
    augment(images, indices, 0, step)
    augment.cutout(normalized[1:], indices, 0, step)
    if augment.has_mixtures:
        augment.mix(normalized, targets, 0, step)
    return (time.process_time() - start) / count


def main() -> None:
    """Print the median cost of each augmentation, measured in turn."""
    parser = argparse.ArgumentParser(description="Measure the CPU time of augmentations.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    augmentations = {name: Augmentation(**arguments) for name, arguments in AUGMENTATIONS.items()}
    for size_px in BATCHES:
        seconds: dict[str, list[float]] = {name: [] for name in augmentations}
        for step in range(rounds + 1):
            for name, augment in augmentations.items():
                seconds[name].append(seconds_per_image(augment, size_px, step))
        for name, values in seconds.items():
            measured = [1e6 * value for value in values[1:]]  # the first round is a warm-up
            spread = f"{min(measured):.0f} to {max(measured):.0f}"
            print(f"{size_px} px  {name:24} {statistics.median(measured):8.0f} us  ({spread}, n={rounds})")


if __name__ == "__main__":
    main()
