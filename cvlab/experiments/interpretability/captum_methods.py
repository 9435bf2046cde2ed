"""Saliency methods of captum (Kokhlikyan et al., 2020), an extra: `pip install -e '.[explain]'`.

References:
    Zeiler and Fergus, 2014, "Visualizing and understanding convolutional networks", section 4.2 (`occlusion`).
    Springenberg et al., 2015, "Striving for simplicity", section 3.4 (`guided_backprop`).
    Castro et al., 2009, "Polynomial calculation of the Shapley value based on sampling" (`shapley`).
    Shrikumar et al., 2017, "Learning important features through propagating activation differences" (`deeplift`).
    Ribeiro et al., 2016, "Why should I trust you?" (`lime`).
"""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.ops import saliency

RELU_NODES = ("ReluBackward0", "HardtanhBackward0")
OTHER_ACTIVATION_NODES = {
    "EluBackward0": "ELU",
    "GeluBackward0": "GELU",
    "HardswishBackward0": "hardswish",
    "LeakyReluBackward0": "leaky ReLU",
    "MishBackward0": "Mish",
    "PreluKernelBackward0": "PReLU",
    "SiluBackward0": "SiLU",
}


RIDGE = 1.0  # penalty of the squared weights of LIME's regression, as in the authors' code for images
COMPLETENESS_TOLERANCE = 1e-2  # of the change of the score, relative to the sum of the attributions of DeepLift


class _ReLU6(nn.ReLU):
    """ReLU6 as a subclass of ReLU, by which captum recognizes the modules to guide."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input)


class Objective(nn.Module):
    """A classifier with an objective: from images (N, 3, H, W) and classes (N,) to values (N,), high for the class."""

    def __init__(self, model: nn.Module, objective: str) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the logit of each image's class, or the negative of its cross-entropy."""
        values = saliency.OBJECTIVES[self.objective](self.model(images), classes)
        return -values if self.objective == "loss" else values


def occlusion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    fill: Tensor,
    window_px: int,
    batch_size: int,
) -> Tensor:
    """Return by how much the objective falls when a square is covered, averaged over the squares that cover a pixel.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `saliency.OBJECTIVES`; of the loss, how much it rises.
        fill: Color (3,) of the square.
        window_px: Side of the square, which moves by half of it.
        batch_size: Number of squares in a forward pass.

    Returns:
        attributions (N, H, W), signed.
    """
    from captum.attr import Occlusion

    values = Occlusion(Objective(model, objective)).attribute(
        images,
        sliding_window_shapes=(images.shape[1], window_px, window_px),
        strides=(images.shape[1], max(1, window_px // 2), max(1, window_px // 2)),
        baselines=fill.view(1, -1, 1, 1).expand_as(images),
        additional_forward_args=(classes,),
        perturbations_per_eval=batch_size,
    )
    maps: Tensor = values[:, 0].detach()
    return maps


def guided_backprop(model: nn.Module, images: Tensor, classes: Tensor, objective: str = "score") -> Tensor:
    """Return the largest absolute value over the channels of a gradient that passes ReLUs only where positive.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `saliency.OBJECTIVES`; of the loss, the negative is differentiated.

    Returns:
        saliency (N, H, W), not negative.
    """
    from captum.attr import GuidedBackprop

    method = GuidedBackprop(Objective(_with_relu_modules(model), objective))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
        values = method.attribute(images.detach().clone().requires_grad_(), additional_forward_args=(classes,))
    maps: Tensor = values.abs().amax(1).detach()
    return maps


def shapley(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    fill: Tensor,
    grid: int,
    samples: int,
    seed: int,
) -> Tensor:
    """Return the sampled Shapley values of the squares of a grid: their mean gain in random orders of uncovering.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `saliency.OBJECTIVES`; of the loss, its negative.
        fill: Color (3,) of covered squares.
        grid: Number of squares along a side.
        samples: Number of orders, the same ones for every image.
        seed: Seed of the orders.

    Returns:
        attributions (N, H, W), signed; the value of a square at each of its pixels.
    """
    from captum.attr import ShapleyValueSampling

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = ShapleyValueSampling(Objective(model, objective)).attribute(
            images,
            baselines=fill.view(1, -1, 1, 1).expand_as(images),
            additional_forward_args=(classes,),
            feature_mask=grid_mask(images, grid),
            n_samples=samples,
            perturbations_per_eval=1,
        )
    maps: Tensor = values[:, 0].detach()
    return maps


def lime(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    objective: str = "score",
    *,
    fill: Tensor,
    grid: int,
    samples: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Return the weights of the squares of a grid in a linear model of the objective near the image.

    The linear model is a ridge regression on randomly covered images, weighted by their similarity to the image.

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        objective: One of `saliency.OBJECTIVES`; of the loss, its negative.
        fill: Color (3,) of covered squares.
        grid: Number of squares along a side.
        samples: Number of covered images.
        batch_size: Number of them in a forward pass.
        seed: Seed of what is covered.

    Returns:
        attributions (N, H, W), signed; the weight of a square at each of its pixels.
    """
    from captum.attr import Lime

    maps = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = Lime(Objective(model, objective), interpretable_model=ridge_regression())
        for image, image_class in zip(images, classes, strict=True):  # captum gives a batch of them to one regression
            values = method.attribute(
                image[None],
                baselines=fill.view(1, -1, 1, 1).expand_as(image[None]),
                additional_forward_args=(image_class[None],),
                feature_mask=grid_mask(images, grid),
                n_samples=samples,
                perturbations_per_eval=batch_size,
            )
            maps.append(values[0, 0].detach())
    return torch.stack(maps)


def ridge_regression(penalty: float = RIDGE) -> Any:
    """Return a weighted ridge regression with an intercept, as captum takes it; captum's own need scikit-learn."""
    from captum._utils.models.model import Model

    class Ridge(Model):  # type: ignore[misc]
        def fit(self, train_data: Any, **kwargs: object) -> None:
            parts = list(zip(*train_data, strict=True))
            x, y, weights = (torch.cat(part).double() for part in parts)
            weights = weights.flatten() / weights.sum()
            x_mean, y_mean = weights @ x, weights @ y.flatten()
            scaled = (x - x_mean) * weights[:, None] * len(x)
            matrix = scaled.T @ (x - x_mean) + penalty * torch.eye(x.shape[1]).to(x)
            self.weights: Tensor = torch.linalg.solve(matrix, scaled.T @ (y.flatten() - y_mean))

        def representation(self) -> Tensor:
            return self.weights.float()

        def __call__(self, x: Tensor) -> Tensor:
            prediction: Tensor = x @ self.weights.to(x)
            return prediction

    return Ridge()


def deeplift(model: nn.Module, images: Tensor, classes: Tensor, *, baseline: Tensor) -> Tensor:
    """Return what each input value contributes to the change of the logit from a baseline, by the rescale rule.

    The attributions sum to logit(image) - logit(baseline).

    Args:
        model: Maps images to logits (N, C).
        images: (N, 3, H, W) in [0, 1].
        classes: int64 (N,).
        baseline: Color (3,) of the image that stands for nothing.

    Returns:
        attributions (N, 3, H, W), signed.
    """
    from captum.attr import DeepLift
    from captum.attr._core import deep_lift

    deep_lift.SUPPORTED_NON_LINEAR.setdefault(nn.ReLU6, deep_lift.nonlinear)  # captum knows the rule only for ReLU
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")
        values: Tensor = DeepLift(_without_in_place(model)).attribute(
            images.detach().clone().requires_grad_(),
            baselines=baseline.view(1, -1, 1, 1).expand_as(images),
            target=classes,
        )
    return values.detach()


def require_completeness(model: nn.Module, size_px: int, baseline: Tensor) -> None:
    """Raise ConfigError unless the attributions of DeepLift sum to the change of the logit, for random images.

    They do not where its rules do not cover an activation, such as GELU, a function, or a module that is called twice.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size_px, size_px, generator=generator).to(next(model.parameters()))
    classes = torch.tensor([0, 1], device=images.device)
    with torch.no_grad():
        changes = (model(images) - model(baseline.view(1, -1, 1, 1).expand_as(images))).gather(1, classes[:, None])[
            :, 0
        ]
    try:
        totals = deeplift(model, images, classes, baseline=baseline).sum((1, 2, 3))
    except (AssertionError, AttributeError, RuntimeError):
        totals = torch.full_like(changes, math.inf)
    if not ((totals - changes).abs() <= COMPLETENESS_TOLERANCE * totals.abs().maximum(changes.abs())).all():
        raise ConfigError(
            "method=deeplift: is defined for ReLU modules that are called once, and this model has other activations",
            saliency.OTHER_METHOD,
        )


def grid_mask(images: Tensor, grid: int) -> Tensor:
    """Return for each pixel the number of its square in a grid: int64 (1, 1, H, W)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) * grid // height
    columns = torch.arange(width, device=images.device) * grid // width
    return (rows[:, None] * grid + columns)[None, None]


def require_relus(model: nn.Module, size_px: int) -> None:
    """Raise ConfigError unless every activation of a model is the module ReLU or ReLU6, which captum can guide.

    Without the check, guided backpropagation of another network would be a plain gradient, in part or as a whole.
    """
    guided: set[Any] = set()

    def record(_module: nn.Module, _args: object, output: Tensor) -> None:
        guided.add(output.grad_fn)

    modules = [module for module in model.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]
    hooks = [module.register_forward_hook(record) for module in modules]
    image = torch.rand(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    try:
        with torch.enable_grad():
            logits = model(image.to(next(model.parameters())).requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()
    names = {node.name(): node for node in _nodes(logits.grad_fn) if node not in guided}
    others = [title for name, title in OTHER_ACTIVATION_NODES.items() if name in names]
    if others:
        reason = f"is defined for ReLU, and this model has {others[0]}"
    elif any(name in names for name in RELU_NODES):
        reason = "guides ReLU modules, and this model calls ReLU as a function"
    elif not guided:
        reason = "is defined for ReLU, and this model has none"
    else:
        return
    raise ConfigError(f"method=guided_backprop: {reason}", saliency.OTHER_METHOD)


def _nodes(last: Any) -> Iterator[Any]:
    """Yield the nodes of an autograd graph, each once."""
    pending, visited = [last], {last}
    while pending:
        node = pending.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in visited:
                visited.add(parent)
                pending.append(parent)


def _without_in_place(model: nn.Module) -> nn.Module:
    """Return a copy in which no activation works in place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


def _with_relu_modules(model: nn.Module) -> nn.Module:
    """Return a copy in which each ReLU6 is a subclass of ReLU, and no activation works in place."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, _ReLU6())
            elif isinstance(child, nn.ReLU):
                child.inplace = False
    return model
