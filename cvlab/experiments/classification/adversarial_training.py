"""Adversarial training: each step trains on examples that increase the loss of the current weights.

References:
    Madry et al., 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1 (`pgd`).
    Wong et al., 2020, "Fast is better than free: revisiting adversarial training", algorithm 3 (`fast`).

Differences from the papers:
    The network is attacked in evaluation mode, with BatchNorm's running statistics and without dropout, as it is used
    later and as in TRADES (Zhang et al., 2019) and in Pang et al., 2021, "Bag of tricks for adversarial training"; both
    papers attack it in training mode. So the attack changes no statistics, and the example of an image does
    not depend on the rest of its batch, on `accumulate` or on the shares of several processes.
    The attack increases the cross-entropy, whatever loss is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvlab.data import rng
from cvlab.distributed import collectives, process_group, sharding
from cvlab.experiments.classification.config import AdversarialConfig
from cvlab.experiments.classification.data.images import Images, Normalization
from cvlab.experiments.common.labeled_classifier import to_pixels
from cvlab.ops import linf_attacks

FLOAT16_SCALE = 256.0  # of the attacked loss: gradients of images that are classified with confidence underflow


@dataclass(frozen=True)
class Adversary:
    """Replaces the images of a batch by adversarial examples.

    Attributes:
        config: Bound and method.
        normalize: The normalization of the images; the bound is one of pixels.
        seed: Seed of the run; random starts are a function of the seed, the step and the position in the batch.
        num_parts: The parts in which a batch goes through the model, to save memory.
    """

    config: AdversarialConfig
    normalize: Normalization
    seed: int
    num_parts: int = 1

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Return adversarial examples of this rank's shard of a batch, and its labels.

        Args:
            model: The model in evaluation mode, with the weights of the step.
            batch: Normalized images (N, C, H, W), and labels (N,) or targets (N, K) of mixtures.
            step: The step.
        """
        images, labels = batch
        first = len(images) * process_group.world().rank
        numbers = torch.arange(first, first + len(images), device=images.device)
        parts = zip(*(tensor.chunk(self.num_parts) for tensor in (images, labels, numbers)), strict=True)
        return torch.cat([self._attack(model, x, y, indices, step) for x, y, indices in parts]), labels

    def _attack(self, model: nn.Module, images: Tensor, labels: Tensor, numbers: Tensor, step: int) -> Tensor:
        """Return examples (N, C, H, W), normalized, of images with these numbers (N,) in the batch."""

        def uniform(draw: int, shape: tuple[int, ...]) -> Tensor:
            return rng.uniform_items(self.seed, draw, numbers, shape[1:], "adversarial")

        originals = self.normalize.to_pixels(images)
        eps, alpha = self.config.eps / 255, self.config.step_size / 255
        examples = linf_attacks.ascend(
            logits_of_pixels(model, self.normalize),
            linf_attacks.random_starts(originals, eps, uniform, step),
            originals,
            labels,
            eps,
            steps=self.config.num_steps,
            alpha=alpha,
            loss_fn=_scaled_cross_entropy if _is_float16(images.device) else linf_attacks.cross_entropy,
        )
        return self.normalize.of_pixels(examples)


def _is_float16(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def _scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return FLOAT16_SCALE * linf_attacks.cross_entropy(logits, labels)


def logits_of_pixels(model: nn.Module, normalize: Normalization) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, C, H, W) in [0, 1] to logits (N, K), at least float32, differentiable."""
    dtype = next(model.parameters()).dtype

    def compute_logits(pixels: Tensor) -> Tensor:
        logits: Tensor = model(normalize.of_pixels(pixels).to(dtype, memory_format=torch.channels_last))
        return logits.float()

    return compute_logits


def robust_accuracy(
    model: nn.Module,
    images: Images,
    labels: Tensor,
    normalize: Normalization,
    config: AdversarialConfig,
    batch_size: int,
) -> float:
    """Return the accuracy under PGD, as `cvlab attack RUN --method pgd` measures it; over all ranks.

    Args:
        model: Attacked in evaluation mode; its mode is restored.
        images: uint8 (N, H, W, C).
        labels: int64 (N,).
        normalize: The normalization of the images.
        config: The bound of the evaluation and its steps.
        batch_size: Images at a time.
    """
    was_training = model.training
    model.eval()
    logits_fn = logits_of_pixels(model, normalize)
    eps, steps = config.evaluation_eps / 255, config.eval_steps
    num_correct = torch.zeros((), device=labels.device)
    first, end = sharding.shard_range(len(labels))
    for start in range(first, end, batch_size):
        rows = slice(start, min(start + batch_size, end))
        pixels = to_pixels(images[rows])
        examples = linf_attacks.pgd(
            logits_fn,
            pixels,
            labels[rows],
            eps,
            steps=steps,
            alpha=2.5 * eps / steps,
            uniform=lambda _, shape: torch.zeros(shape),  # it starts from the FGSM example only
        )
        num_correct += (~linf_attacks.misclassified(logits_fn, examples, labels[rows])).sum()
    model.train(was_training)
    return collectives.all_reduce_sums({"correct": num_correct})["correct"].item() / len(labels)
