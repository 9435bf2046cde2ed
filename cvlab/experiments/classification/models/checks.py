"""Check a model before its run: what it returns, in training too, and which memory format it can be trained in."""

import copy
import traceback

import torch
from torch import Tensor, nn

from cvlab import console
from cvlab.errors import ConfigError


def prepare(
    model: nn.Module, name: str, batch_size: int, in_channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """Check a model on noise, and lay out its weights as it can be trained: channels_last if possible.

    Convolutions are fastest on channels_last tensors, but `x.view(len(x), -1)` fails on them. Such a model gets
    contiguous weights, and a hook that makes its input contiguous. The weights and the random generators stay as they
    are.

    Args:
        model: Maps images (N, C, H, W) to logits; its weights are laid out in place.
        name: What it is called in messages.
        batch_size: Images per training step.
        in_channels: C.
        image_size: H and W.
        num_classes: The smallest number of logits.

    Returns:
        The model, in training mode.

    Raises:
        ConfigError: The model fails, does not return logits (N, >= num_classes), or has nothing to train.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((2, in_channels, image_size, image_size), generator=generator)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.no_grad():
                _check_logits(model.eval()(images), name, num_classes, "")  # also initializes lazy modules
            model.train()
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ConfigError(f"model {name}: has no trainable weights")
            logits, reason = _train_forward(model, images[: min(2, batch_size)])
            _check_logits(logits, name, num_classes, " in training")
        except ConfigError:
            raise
        except Exception as error:  # of the user's model
            frame = traceback.extract_tb(error.__traceback__)[-1]
            size = f"{in_channels} x {image_size} x {image_size}"
            message = f"model {name}: fails on images of {size}: {type(error).__name__}: {error}"
            raise ConfigError(message, f"{frame.filename}:{frame.lineno}, {frame.line}") from error
    if reason is None:
        return _to_channels_last(model)
    console.info(f"model {name}: trained on contiguous tensors, because it cannot take channels_last ones ({reason})")
    model.register_forward_pre_hook(_make_contiguous)
    return model


def _train_forward(model: nn.Module, images: Tensor) -> tuple[object, str | None]:
    """Call a copy of a model on channels_last tensors, or on contiguous ones if that fails.

    Returns:
        What the model returns, and why it fails on channels_last tensors; None if it does not.
    """
    try:
        return _to_channels_last(copy.deepcopy(model))(images.to(memory_format=torch.channels_last)), None
    except Exception as error:  # of the user's model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    return copy.deepcopy(model)(images), reason


def _to_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _make_contiguous(_model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def _check_logits(logits: object, name: str, num_classes: int, when: str) -> None:
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] >= num_classes:
        return
    output = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    hint = "a model with auxiliary outputs needs a key that leaves them out, such as model.aux_logits=false"
    raise ConfigError(f"model {name}: returns {output}{when}, expected logits (N, {num_classes})", hint if when else "")
