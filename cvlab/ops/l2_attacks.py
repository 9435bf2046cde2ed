"""Attacks that change an image as little as possible, by the L2 norm.

References:
    Moosavi-Dezfooli et al., 2016, "DeepFool: a simple and accurate method to fool deep neural networks", algorithm 2.
    Carlini and Wagner, 2017, "Towards evaluating the robustness of neural networks", section V-A.

Differences from the papers:
    Images stay in [0, 1]: `deepfool_step` clamps. With a target class it steps to the boundary between the target and
    the class with the highest other logit. In `carlini_wagner` Adam's rate falls to 0 with each constant: a step of LR
    changes all pixels together by more than many attacks need. What counts as fooled is up to the caller, for example
    the image as it is after rounding to 8 bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cvlab.ops.linf_attacks import LogitsFn, margin_loss

ListLogitsFn = Callable[[Sequence[Tensor]], Tensor]  # N images (C, H, W) in [0, 1], of any sizes, to logits (N, K)
FooledFn = Callable[[int, Tensor], bool]  # number of an image, and the attacked image (C, H, W)

MIN_STEP = 1e-4  # L2 norm that DeepFool's step has at least; of the authors' implementation
LR = 0.01  # of Adam in `carlini_wagner`; so are the next three numbers of the authors' implementation
CONST_FACTOR = 10.0  # of the constant, as long as no image fools
TANH_MARGIN = 1 - 1e-6  # keeps black and white off the infinite ends of the hyperbolic tangent
MIN_PROGRESS = 0.9999  # of the loss within a tenth of the steps, else the search continues with the next constant


def attack_margins(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Return by how much each attack falls short of its aim, in logits: (N,), negative if it succeeds.

    Args:
        logits: (N, K).
        classes: int64 (N,), the target class if `targeted`, else the class to move away from.
        targeted: Whether the attack aims at a class.
    """
    margins = margin_loss(logits.float(), classes)
    return margins if targeted else -margins


def deepfool_step(
    logits_fn: LogitsFn, image: Tensor, attacked_class: int, candidates: Tensor | None, overshoot: float = 0.02
) -> Tensor:
    """Step to the nearest boundary of the linearized classifier, and a little beyond.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        image: (C, H, W) in [0, 1].
        attacked_class: The class to move away from, or the target class if `candidates` is None.
        candidates: int64 (M,), the classes to choose from, without the attacked class; None for a targeted attack.
        overshoot: By which share of its length the step is longer.

    Returns:
        The changed image (C, H, W) in [0, 1].
    """
    count = 1 if candidates is None else len(candidates)
    copies = image.expand(count, *image.shape).clone().requires_grad_()  # one for each class, whose gradients differ
    with torch.enable_grad():
        logits = logits_fn(copies).float()
        if candidates is None:
            margins = attack_margins(logits, torch.tensor([attacked_class], device=logits.device), True)
        else:
            margins = logits[:, attacked_class] - logits.gather(1, candidates[:, None])[:, 0]  # (M,)
        (gradients,) = torch.autograd.grad(margins.sum(), copies)
    norms = gradients.flatten(1).norm(dim=1).clamp(min=1e-6)
    lengths = margins.detach().abs() / norms + MIN_STEP
    k = int(lengths.argmin())
    stepped: Tensor = image - (1 + overshoot) * lengths[k] / norms[k] * gradients[k]
    return stepped.clamp_(0, 1)


def carlini_wagner(
    logits_fn: ListLogitsFn,
    images: Sequence[Tensor],
    classes: Tensor,
    targeted: bool,
    *,
    scales: Sequence[float],
    steps: int,
    search_steps: int,
    is_fooled: FooledFn,
    confidence: float = 0.0,
    initial_const: float = 1.0,
) -> Iterator[list[Tensor]]:
    """Minimize the squared L2 norm of the change plus a constant, found by bisection, times the margin of the logits.

    Args:
        logits_fn: N images to logits (N, K).
        images: N images (C, H, W) in [0, 1], of any sizes.
        classes: int64 (N,), as in `attack_margins`.
        targeted: Whether the attack aims at a class.
        scales: What the L2 norm of each image is divided by, so that images of all sizes are changed alike.
        steps: Number of steps for each constant.
        search_steps: Number of constants that are tried.
        is_fooled: Whether a changed image counts.
        confidence: By how much, in logits, the attack is to exceed its aim.
        initial_const: The first constant.

    Yields:
        After each step the images with the smallest change so far that count, or else as they are now.
    """
    starts = [torch.atanh((2 * image - 1) * TANH_MARGIN) for image in images]  # Adam changes copies of these
    smallest = _Smallest(list(images), is_fooled)
    constants = _Bisection([initial_const] * len(images))
    squared_scales = torch.tensor(scales, device=classes.device) ** 2
    for _ in range(search_steps):
        variables = [start.clone().requires_grad_() for start in starts]
        adam = torch.optim.Adam(variables, lr=LR)
        weights = torch.tensor(constants.values, device=classes.device)
        fooled, last_loss = [False] * len(images), math.inf
        for step in range(steps):
            adam.param_groups[0]["lr"] = LR * (1 - step / steps)
            with torch.enable_grad():
                attacked = [(variable.tanh() + 1) / 2 for variable in variables]
                margins = attack_margins(logits_fn(attacked), classes, targeted)
                changes = [(a - b).square().sum() for a, b in zip(attacked, images, strict=True)]
                distances = torch.stack(changes) / squared_scales
                losses = distances + weights * margins.clamp(min=-confidence)
            for k, (l2, margin) in enumerate(zip(distances.tolist(), margins.tolist(), strict=True)):
                fooled[k] |= smallest.record(k, attacked[k].detach(), l2, margin < 0 and margin <= -confidence)
            adam.zero_grad()
            losses.sum().backward()
            adam.step()
            yield list(smallest.images)
            if (step + 1) % max(1, steps // 10) == 0:
                loss = float(losses.detach().sum())
                if loss > MIN_PROGRESS * last_loss:
                    break
                last_loss = loss
        constants.update(fooled)


class _Smallest:
    """The images with the smallest change so far that fool, or else the last ones."""

    def __init__(self, images: list[Tensor], is_fooled: FooledFn) -> None:
        self.images, self.is_fooled = images, is_fooled
        self.l2 = [math.inf] * len(images)

    def record(self, number: int, image: Tensor, l2: float, succeeds: bool) -> bool:
        """Take over an image if it is better; return whether it fools, as far as that is looked at."""
        if succeeds and l2 < self.l2[number]:
            if not self.is_fooled(number, image):
                return False
            self.images[number], self.l2[number] = image, l2
        elif math.isinf(self.l2[number]):
            self.images[number] = image
        return succeeds


class _Bisection:
    """The constant of each image, between one that was too small and one that was large enough."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.lower, self.upper = [0.0] * len(values), [math.inf] * len(values)

    def update(self, is_enough: Sequence[bool]) -> None:
        """Take the next constants."""
        for k, enough in enumerate(is_enough):
            if enough:
                self.upper[k] = self.values[k]
            else:
                self.lower[k] = self.values[k]
            is_bounded = self.upper[k] < math.inf
            self.values[k] = (self.lower[k] + self.upper[k]) / 2 if is_bounded else self.values[k] * CONST_FACTOR
