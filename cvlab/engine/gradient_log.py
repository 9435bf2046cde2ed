"""Norms of gradients, and of updates relative to the weights, of a whole model and of each of its layers."""

import torch
from torch import Tensor, nn

TINY = 1e-12  # smallest norm of weights that an update is divided by


class GradientLog:
    """Measures one step at a time: `before_update`, the update, `metrics`.

    Args:
        model: The model; parameters that are not trained are left out.
        per_layer: Whether each module with parameters of its own is measured too.
    """

    def __init__(self, model: nn.Module, per_layer: bool) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.layers: dict[str, list[int]] = {}  # name of the module -> indices of its parameters
        for index, (name, _) in enumerate(named if per_layer else ()):
            self.layers.setdefault(name.rpartition(".")[0] or name, []).append(index)
        self.weights: list[Tensor] = []
        self.gradient_norms: list[Tensor] = []

    def before_update(self) -> None:
        """Measure the gradients, which are unscaled and not clipped yet, and store the weights."""
        self.weights = [parameter.detach().clone() for parameter in self.parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradient_norms = _norms(gradients)

    def metrics(self) -> dict[str, Tensor]:
        """Return `grad_norm` and `update_ratio` of the step, and `grad_norm/LAYER` and `update_ratio/LAYER`.

        A step that float16 skips counts as 0 in all of them.
        """
        weight_norms = _norms(self.weights)
        update_norms = _norms(list(torch._foreach_sub([p.detach() for p in self.parameters], self.weights)))
        everything = list(range(len(self.parameters)))
        metrics: dict[str, Tensor] = {}
        for suffix, indices in {"": everything, **{f"/{name}": of for name, of in self.layers.items()}}.items():
            gradient, update, weight = (
                torch.stack([norms[index] for index in indices]).norm()
                for norms in (self.gradient_norms, update_norms, weight_norms)
            )
            metrics[f"grad_norm{suffix}"] = gradient.nan_to_num(0.0, posinf=0.0)
            metrics[f"update_ratio{suffix}"] = update / weight.clamp(min=TINY)
        return metrics


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, scalars."""
    norms: list[Tensor] = list(torch._foreach_norm(tensors))
    return norms
