"""Pretrained models with random weights."""

import torch

from cvlab.models import pretrained


def random_model(name, folder):
    from cvlab.models import zoo

    prefix, _, model_name = name.partition(":")
    torch.manual_seed(0)
    module = (
        zoo.build_timm(model_name, num_classes=None)
        if prefix == "timm"
        else zoo.build_torchvision(model_name, num_classes=1000)
    )
    torch.save(module.state_dict(), folder / "weights.pth")
    return pretrained.build(name, str(folder / "weights.pth"))


def squeezenet(version, folder):
    return random_model(f"torchvision:squeezenet{version}", folder)
