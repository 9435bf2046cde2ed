"""Attention rollout, compared with products of attention that are computed by hand."""

import pytest
import torch

from cvlab.errors import ConfigError
from cvlab.experiments.interpretability import attention
from cvlab.models import pretrained
from cvlab.ops import saliency
from tests.models.random_models import random_model


def test_rollout_of_planted_attention():
    to_third = torch.zeros(1, 2, 4, 4)
    to_third[..., 2] = 1
    flow = saliency.attention_rollout([to_third, to_third])[0]
    torch.testing.assert_close(flow[0], torch.tensor([0.25, 0, 0.75, 0]))
    torch.testing.assert_close(flow.sum(1), torch.ones(4))


def test_rollout_of_a_vit_equals_one_by_hand(tmp_path):
    model = random_model("timm:vit_tiny_patch16_224", tmp_path)
    network = model.module.model
    image = torch.rand(1, 3, 224, 224)
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in network.blocks]
    with torch.no_grad():
        model.module(image)
        for hook in hooks:
            hook.remove()
        flow = torch.eye(197)
        for block, x in zip(network.blocks, inputs, strict=True):
            queries, keys, _ = block.attn.qkv(x[0]).view(197, 3, 3, 64).unbind(1)  # heads of 64
            weights = [(queries[:, h] @ keys[:, h].T / 8).softmax(1) for h in range(3)]
            flow = (sum(weights) / 3 + torch.eye(197)) / 2 @ flow
    maps = attention.rollout(model, image)
    assert maps.shape == (1, 224, 224)
    expected = flow[0, 1:].view(14, 14)
    centers = maps[0, 7::16, 7::16] + maps[0, 8::16, 8::16]
    assert float(torch.corrcoef(torch.stack([centers.flatten(), expected.flatten()]))[0, 1]) > 0.99
    assert all(block.attn.fused_attn for block in network.blocks), "the model is as it was"


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match=r"needs a ViT or DeiT of timm.*gradient, smoothgrad"):
        attention.rollout(pretrained.build(), torch.rand(1, 3, 224, 224))
