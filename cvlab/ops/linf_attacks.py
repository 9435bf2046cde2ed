"""Attacks on batches of images within an L-infinity bound, to measure how robust a classifier is.

All of them are untargeted and return, for each image, an example that is misclassified if one was found.

References:
    Goodfellow et al., 2015, "Explaining and harnessing adversarial examples", section 4 (`fgsm`).
    Madry et al., 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1 (`pgd`).
    Croce and Hein, 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", sections 3 and 4 (`apgd`, `dlr_loss`).
    Andriushchenko et al., 2020, "Square attack: a query-efficient black-box adversarial attack via random search",
    section 3.1, algorithm 2 (`square`).

Differences from the papers:
    The first start of `pgd` is the FGSM example, so that it never misses what `fgsm` finds; the others are random.
    By default an image is left alone as soon as it is misclassified.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.ops.attacks import project

LogitsFn = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] to logits (N, K)
LossFn = Callable[[Tensor, Tensor], Tensor]  # logits (N, K) and labels (N,) to losses (N,), which attacks maximize
UniformFn = Callable[[int, tuple[int, ...]], Tensor]  # number of a draw and a shape (N, ...) to numbers in [0, 1)

MOMENTUM = 0.75  # of `apgd`: alpha in equation 2 of Croce and Hein
MIN_INCREASES = 0.75  # of the steps between two checkpoints: rho in their condition 1
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries, where the fraction is halved
SQUARE_QUERIES = 10_000
SQUARE_FRACTION = 0.8  # of the image, that the first square covers


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (N,) of logits (N, K)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the label's logit, (N,), of logits (N, K): positive if misclassified."""
    label_logits = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - label_logits


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference-of-logits ratio (N,) of logits (N, K), K >= 3: `margin_loss` over the gap of 1st and 3rd.

    It does not change when all logits are scaled or shifted, unlike the cross-entropy, whose gradient vanishes where a
    classifier is very confident.
    """
    top = logits.topk(3, 1).values
    return margin_loss(logits, labels) / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


def loss_gradient(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, loss_fn: LossFn
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,), their gradient by the images (N, C, H, W), and which images are misclassified (N,).

    Labels are classes (N,), or probabilities of classes (N, K), whose largest is the class.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_fn(images).float()
        losses = loss_fn(logits, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach(), gradient, logits.argmax(1) != (labels if labels.ndim == 1 else labels.argmax(1))


@torch.no_grad()
def misclassified(logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images are not classified as their label, bool (N,)."""
    return logits_fn(images).argmax(1) != labels


def fgsm(logits_fn: LogitsFn, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Move every pixel by `eps` up the gradient of the cross-entropy.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        images: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        eps: Radius of the L-infinity ball, for pixels in [0, 1].

    Returns:
        The changed images (N, C, H, W) in [0, 1].
    """
    _, gradient, _ = loss_gradient(logits_fn, images, labels, cross_entropy)
    return (images + eps * gradient.sign()).clamp_(0, 1)


def pgd(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    alpha: float,
    uniform: UniformFn,
    restarts: int = 1,
    stops_early: bool = True,
) -> Tensor:
    """Take steps of `alpha` up the sign of the cross-entropy's gradient, projected onto the ball.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        images: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        eps: Radius of the L-infinity ball, for pixels in [0, 1].
        steps: Number of steps from each start.
        alpha: Length of a step.
        uniform: Random numbers for the starts after the first.
        restarts: Number of starts, each for the images that none before has changed the class of.
        stops_early: Leave an image alone as soon as it is misclassified. Examples that are to fool other classifiers
            too should take all steps, from one start.

    Returns:
        The changed images (N, C, H, W) in [0, 1].
    """
    result = fgsm(logits_fn, images, labels, eps)
    if not stops_early:
        return ascend(logits_fn, result, images, labels, eps, steps=steps, alpha=alpha)
    for restart in range(restarts):
        active = (~misclassified(logits_fn, result, labels)).nonzero()[:, 0]
        if not len(active):
            break
        starts = result if restart == 0 else random_starts(images, eps, uniform, restart)
        result[active] = _pgd_from(logits_fn, starts[active], images[active], labels[active], eps, steps, alpha)
    return result


def ascend(
    logits_fn: LogitsFn,
    x: Tensor,
    originals: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    alpha: float,
    loss_fn: LossFn = cross_entropy,
) -> Tensor:
    """Take steps of `alpha` up the sign of the loss's gradient, projected onto the ball: all steps, for all images.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        x: (N, C, H, W), where to start, within the ball.
        originals: (N, C, H, W) in [0, 1], the centers of the ball.
        labels: int64 (N,), or probabilities of classes (N, K) if the loss takes them.
        eps: Radius of the L-infinity ball, for pixels in [0, 1].
        steps: Number of steps.
        alpha: Length of a step.
        loss_fn: The loss to increase.

    Returns:
        The changed images (N, C, H, W) in [0, 1].
    """
    for _ in range(steps):
        _, gradient, _ = loss_gradient(logits_fn, x, labels, loss_fn)
        x = project(x + alpha * gradient.sign(), originals, eps)
    return x


def random_starts(images: Tensor, eps: float, uniform: UniformFn, draw: int) -> Tensor:
    """Return random points of the ball around each image."""
    noise = uniform(draw, tuple(images.shape)).to(images)
    return project(images + (2 * noise - 1) * eps, images, eps)


def _pgd_from(
    logits_fn: LogitsFn, x: Tensor, originals: Tensor, labels: Tensor, eps: float, steps: int, alpha: float
) -> Tensor:
    """Take the steps of `pgd` from one start; the images that are misclassified take no further ones."""
    result = x.clone()
    active = torch.arange(len(x), device=x.device)  # those of `result` that `x` continues
    for _ in range(steps):
        _, gradient, is_incorrect = loss_gradient(logits_fn, x, labels[active], cross_entropy)
        result[active] = x
        active, x, gradient = active[~is_incorrect], x[~is_incorrect], gradient[~is_incorrect]
        if not len(active):
            return result
        x = project(x + alpha * gradient.sign(), originals[active], eps)
    result[active] = x
    return result


def checkpoints(steps: int) -> list[int]:
    """Return the steps at which `apgd` may halve its step size, ascending (Croce and Hein, section 3.1)."""
    percents = [0, 22]
    while percents[-1] < 100:
        percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
    return sorted({min(steps, -(-percent * steps // 100)) for percent in percents[1:]})


def apgd(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    loss_fn: LossFn,
    steps: int,
    uniform: UniformFn,
    restarts: int = 1,
) -> Tensor:
    """Auto-PGD: ascent with momentum whose step size is halved where the loss stops to grow.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        images: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        eps: Radius of the L-infinity ball, for pixels in [0, 1].
        loss_fn: `cross_entropy` or `dlr_loss`.
        steps: Number of steps from each start.
        uniform: Random numbers for the starts.
        restarts: Number of random starts, each for the images that none before has changed the class of.

    Returns:
        The changed images (N, C, H, W) in [0, 1].
    """
    result = images.clone()
    for restart in range(restarts):
        active = (~misclassified(logits_fn, result, labels)).nonzero()[:, 0]
        if not len(active):
            break
        starts = random_starts(images, eps, uniform, restart)
        result[active] = _apgd_from(logits_fn, starts[active], images[active], labels[active], eps, loss_fn, steps)
    return result


@dataclass
class _Ascent:
    """The state of Auto-PGD for the images that are still attacked, each tensor with a row for every image.

    `numbers` are their positions in the batch; `last_step_size` and `last_best` are those at the checkpoint before.
    """

    numbers: Tensor
    originals: Tensor
    labels: Tensor
    x: Tensor
    before: Tensor
    losses: Tensor
    gradient: Tensor
    best_x: Tensor
    best_losses: Tensor
    best_gradient: Tensor
    step_size: Tensor
    last_step_size: Tensor
    last_best: Tensor
    num_increases: Tensor

    def select(self, keep: Tensor) -> None:
        """Leave out all images but those of a mask (N,)."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[keep])

    def step(self, eps: float, momentum: float) -> None:
        """Move `x` (Croce and Hein, equation 2)."""
        stepped = project(self.x + _per_image(self.step_size) * self.gradient.sign(), self.originals, eps)
        x = self.x + momentum * (stepped - self.x) + (1 - momentum) * (self.x - self.before)
        self.before, self.x = self.x, project(x, self.originals, eps)

    def record(self, losses: Tensor, gradient: Tensor) -> None:
        """Take over the loss and the gradient at the new `x`, and the best of both."""
        self.num_increases += losses > self.losses
        self.losses, self.gradient = losses, gradient
        is_better = losses > self.best_losses
        self.best_losses = torch.where(is_better, losses, self.best_losses)
        self.best_x = torch.where(_per_image(is_better), self.x, self.best_x)
        self.best_gradient = torch.where(_per_image(is_better), gradient, self.best_gradient)

    def halve_step_sizes(self, num_steps: int) -> None:
        """Halve the step size where the loss rarely grew in the last steps or is stuck, and go back to the best `x`."""
        is_slow = self.num_increases < MIN_INCREASES * num_steps
        is_stuck = (self.step_size == self.last_step_size) & (self.best_losses == self.last_best)
        halved = is_slow | is_stuck
        self.last_step_size, self.last_best = self.step_size, self.best_losses
        self.step_size = torch.where(halved, self.step_size / 2, self.step_size)
        self.x = torch.where(_per_image(halved), self.best_x, self.x)
        self.gradient = torch.where(_per_image(halved), self.best_gradient, self.gradient)
        self.losses = torch.where(halved, self.best_losses, self.losses)
        self.num_increases = torch.zeros_like(self.num_increases)


def _per_image(values: Tensor) -> Tensor:
    """Return values (N,) such that they broadcast over images (N, C, H, W)."""
    return values.view(-1, 1, 1, 1)


def _apgd_from(
    logits_fn: LogitsFn, x: Tensor, originals: Tensor, labels: Tensor, eps: float, loss_fn: LossFn, steps: int
) -> Tensor:
    """Run Auto-PGD from one start; the images that are misclassified take no further steps."""
    result = x.clone()
    losses, gradient, is_incorrect = loss_gradient(logits_fn, x, labels, loss_fn)
    sizes = torch.full_like(losses, 2 * eps)
    ascent = _Ascent(
        *(torch.arange(len(x), device=x.device), originals, labels, x, x, losses, gradient, x, losses, gradient),
        *(sizes, sizes, losses, torch.zeros_like(losses)),
    )
    last_checkpoint, ahead = 0, checkpoints(steps)
    for step in range(1, steps + 1):
        ascent.select(~is_incorrect)
        if not len(ascent.numbers):
            break
        ascent.step(eps, MOMENTUM if step > 1 else 1.0)
        losses, gradient, is_incorrect = loss_gradient(logits_fn, ascent.x, ascent.labels, loss_fn)
        ascent.record(losses, gradient)
        result[ascent.numbers] = torch.where(_per_image(is_incorrect), ascent.x, ascent.best_x)
        if step == ahead[0]:
            ascent.halve_step_sizes(step - last_checkpoint)
            last_checkpoint = ahead.pop(0)
    return result


def square_fraction(query: int, queries: int) -> float:
    """Return which fraction of the image the square of a query covers (Andriushchenko et al., section 4)."""
    position = query / queries * SQUARE_QUERIES
    num_halvings = sum(position > halving for halving in SQUARE_HALVINGS)
    return SQUARE_FRACTION * 0.5**num_halvings


@torch.no_grad()
def square(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, eps: float, *, queries: int, uniform: UniformFn
) -> Tensor:
    """Change random squares by plus or minus `eps`, keeping a change if the margin loss grows: no gradients needed.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits.
        images: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        eps: Radius of the L-infinity ball, for pixels in [0, 1].
        queries: Number of evaluations of each image, the first one included.
        uniform: Random numbers.

    Returns:
        The changed images (N, C, H, W) in [0, 1].
    """
    count, channels, height, width = images.shape
    stripes = (uniform(0, (count, channels, 1, width)).to(images) * 2 - 1).sign()
    result = (images + eps * stripes).clamp_(0, 1)
    losses = margin_loss(logits_fn(result).float(), labels)
    for query in range(1, queries):
        # Numbers for all images, so that those of one do not depend on which others are still attacked.
        u = uniform(query, (count, 2 + channels)).to(images)
        active = (losses <= 0).nonzero()[:, 0]
        if not len(active):
            break
        side = min(max(round(math.sqrt(square_fraction(query, queries) * height * width)), 1), height, width)
        top = (u[active, 0] * (height - side + 1)).long().clamp(max=height - side)
        left = (u[active, 1] * (width - side + 1)).long().clamp(max=width - side)
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
        in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
        signs = (u[active, 2:] * 2 - 1).sign()[:, :, None, None]
        originals = images[active]
        candidates = torch.where(inside, (originals + eps * signs).clamp_(0, 1), result[active])
        candidate_losses = margin_loss(logits_fn(candidates).float(), labels[active])
        is_better = candidate_losses > losses[active]
        result[active] = torch.where(_per_image(is_better), candidates, result[active])
        losses[active] = torch.where(is_better, candidate_losses, losses[active])
    return result
