"""Transfer learning: a linear classifier on a pretrained backbone, whose last stages may be fine-tuned."""

import copy
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from cvlab.config.schema import NonNegativeInt, PositiveInt
from cvlab.errors import ConfigError
from cvlab.models import pretrained
from cvlab.models.depthwise import freeze_depthwise
from cvlab.models.names import DEFAULT_MODEL, WeightsFile
from cvlab.models.split import split


class TransferClassifier(nn.Module):
    """A frozen trunk, a tail that is trained in the last epochs, and a linear classifier.

    It takes normalized images (N, 3, S, S), or what the trunk or the tail makes of them, which is computed once for
    many epochs. Trunk and tail stay in evaluation mode: the statistics of their BatchNorm, which is folded into the
    convolutions, are those of the pretraining.

    References:
        Yosinski et al., 2014, "How transferable are features in deep neural networks?"; Kornblith et al., 2019, "Do
        better ImageNet models transfer better?", section 3.

    Attributes:
        trunk: Maps images to the maps that the tail takes.
        tail: Maps maps to features (N, F).
        map_shape: Shape of the maps of one image.
        lr_factors: Factors of the learning rate, by the first letters of the weights' names.
        classifier: Maps standardized features to logits.
    """

    def __init__(
        self,
        backbone: pretrained.PretrainedClassifier,
        num_classes: int,
        trainable_stages: int = 0,
        finetune_lr: float = 0.1,
    ) -> None:
        super().__init__()
        self.lr_factors = {"tail.": finetune_lr}
        parts = split(backbone, trainable_stages)
        self.trunk, self.tail = copy.deepcopy(parts.trunk), copy.deepcopy(parts.tail)
        if trainable_stages:
            self.tail.requires_grad_(True)
            freeze_depthwise(self.tail)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(parts.num_features))
        self.register_buffer("std", torch.ones(parts.num_features))
        self.classifier = nn.Linear(parts.num_features, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.map_shape = parts.map_shape
        self.image_shape = (3, backbone.transform.size_px, backbone.transform.size_px)
        self.trunk.eval()
        self.tail.eval()

    def train(self, mode: bool = True) -> "TransferClassifier":
        """Set the mode of the classifier; trunk and tail always stay in evaluation mode."""
        self.training = mode  # trunk and tail are in evaluation mode already: a step need not visit all their modules
        self.classifier.train(mode)
        return self

    def standardize(self, features: Tensor) -> None:
        """Set mean and standard deviation of the features from those (N, F) of the training images."""
        std, mean = torch.std_mean(features.float(), 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-3 * float(std.mean()) + 1e-12))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W), of the trunk's maps, or of features (N, F)."""
        if inputs.shape[1:] == self.image_shape or inputs.shape[1:] not in (self.map_shape, self.mean.shape):
            with torch.no_grad() if not inputs.requires_grad else torch.enable_grad():
                inputs = self.trunk(inputs)
        features = inputs if inputs.shape[1:] == self.mean.shape else self.tail(inputs)
        logits: Tensor = self.classifier((features.float() - self.mean) / self.std)
        return logits


def pretrained_classifier(
    backbone: str = DEFAULT_MODEL,
    weights: WeightsFile | None = None,
    trainable_stages: NonNegativeInt = 2,
    finetune_epochs: NonNegativeInt = 0,
    finetune_lr: Annotated[float, Gt(0), Le(10)] = 0.1,
    views: PositiveInt = 4,
    *,
    num_classes: int = 10,
) -> TransferClassifier:
    """Build a linear classifier on a pretrained backbone.

    Args:
        backbone: efficientnet_lite0, efficientnet_lite2, timm:NAME or torchvision:NAME.
        weights: File with its weights; None or `auto`: those found on this machine.
        trainable_stages: Last stages of the backbone that are trained in the last `finetune_epochs`.
        finetune_epochs: Number of final epochs in which they are trained; 0: the backbone stays frozen.
        finetune_lr: Their learning rate as a fraction of the classifier's.
        views: Augmented views of each image whose features are computed once and used in turn.
        num_classes: Number of classes.

    Returns:
        The classifier; all its weights are frozen but those of the classifier and, if fine-tuned, the tail.

    Raises:
        ConfigError: The backbone is unknown or cannot be split.
        DataError: Its weights are missing or damaged.
    """
    if finetune_epochs and not trainable_stages:
        raise ConfigError("model.finetune_epochs: there is no stage to train", "raise model.trainable_stages")
    model = pretrained.build(backbone, weights)
    return TransferClassifier(model, num_classes, trainable_stages if finetune_epochs else 0, finetune_lr)
