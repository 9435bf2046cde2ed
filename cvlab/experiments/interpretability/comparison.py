"""The saliency maps of all methods of a photo on one sheet, with their scores and a check by randomized weights."""

import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import rng
from cvlab.errors import ConfigError, install_command
from cvlab.experiments.interpretability.config import CAPTUM_METHODS, SaliencyConfig, SaliencyMethod, has_captum
from cvlab.experiments.interpretability.saliency_methods import (
    FORWARD_BATCH,
    METHOD_TITLES,
    check_method,
    compute_maps,
    fill_color,
    strongest_fraction,
)
from cvlab.models.pretrained import NormalizedModel, PretrainedClassifier
from cvlab.ops.saliency_scores import insertion_and_deletion, randomize_last_layers, rank_correlation
from cvlab.reports import images

RANDOM = "random"  # the order that a map should beat


def allowed_methods(config: SaliencyConfig, model: PretrainedClassifier) -> tuple[list[SaliencyMethod], list[str]]:
    """Return the methods that a model allows, and why each of the others is left out."""
    allowed: list[SaliencyMethod] = []
    reasons = []
    for method in typing.get_args(SaliencyMethod):
        try:
            if method in CAPTUM_METHODS and not has_captum():
                raise ConfigError(f"method={method}: captum is not installed", install_command("explain"))
            if method == "deeplift" and config.objective == "loss":
                raise ConfigError("method=deeplift: explains the score of the class, not its loss")
            check_method(method, model)
            allowed.append(method)
        except ConfigError as error:
            reasons.append(error.message)
    return allowed, reasons


def compare(
    config: SaliencyConfig,
    methods: list[SaliencyMethod],
    model: PretrainedClassifier,
    photo_input: Tensor,
    class_index: int,
    view: Image.Image,
    on_method: Callable[[str, float], None],
) -> tuple[list[dict[str, Any]], list[tuple[str, Image.Image]]]:
    """Compute and score the maps of one photo.

    Args:
        config: The keys of the methods.
        methods: Those to compare.
        model: The classifier.
        photo_input: The model's input (3, S, S).
        class_index: What to explain.
        view: The same as an image.
        on_method: Called before each method with a note and the fraction of the methods that are done.

    Returns:
        For each method and for a random order `method`, `inside`, `insertion` and `deletion`, for each method also
        `randomized` if layers are; and the captioned overlays of the methods.
    """
    classes = torch.tensor([class_index], device=photo_input.device)
    rows: list[dict[str, Any]] = []
    tiles = [("the model's input", view)]
    randomized = _randomize(config, model)
    for number, method in enumerate(methods):
        on_method(f"{METHOD_TITLES[method]}, {number + 1} of {len(methods)} methods", number / len(methods))
        values = compute_maps(config, method, model, photo_input[None], classes.clone())[0].float()
        areas = _score(config, model, photo_input, class_index, values)
        rows.append({"method": method, "inside": strongest_fraction(values.cpu()), **areas})
        caption = f"{METHOD_TITLES[method]}: insertion {areas['insertion']:.3f}, deletion {areas['deletion']:.3f}"
        if randomized is not None:
            other = compute_maps(config, method, randomized, photo_input[None], classes.clone())[0].float()
            rows[-1]["randomized"] = rank_correlation(values, other)
            caption += f", randomized {rows[-1]['randomized']:.2f}"
        tiles.append((caption, images.overlay(view, images.scaled(values), (0, 0, *view.size))))
    values = rng.uniform(config.seed, 0, torch.arange(photo_input[0].numel()), RANDOM).view(photo_input.shape[1:])
    areas = _score(config, model, photo_input, class_index, values.to(photo_input))
    rows.append({"method": RANDOM, "inside": strongest_fraction(values.float()), **areas})
    return rows, tiles


def _randomize(config: SaliencyConfig, model: PretrainedClassifier) -> PretrainedClassifier | None:
    """Return the classifier with its last layers randomized; None if none are to be."""
    if not config.randomized:
        return None
    module = randomize_last_layers(model.module, config.randomized, config.seed)
    return replace(model, module=cast("NormalizedModel", module))


@torch.no_grad()
def _score(
    config: SaliencyConfig, model: PretrainedClassifier, photo_input: Tensor, class_index: int, values: Tensor
) -> dict[str, float]:
    def probability(batch: Tensor) -> Tensor:
        return model.probabilities(batch)[:, class_index]

    fill = fill_color(model)
    return insertion_and_deletion(probability, photo_input, values, fill, config.curve_steps, FORWARD_BATCH).areas()
