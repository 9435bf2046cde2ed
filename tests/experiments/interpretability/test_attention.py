"""Attention rollout, compared with manually computed products of attention."""

import pytest
import torch

from cvlab import _compat
from cvlab.errors import ConfigError
from cvlab.experiments.interpretability import attention
from cvlab.models import pretrained
from cvlab.ops import saliency
from cvlab.ops.resample import EvalTransform


def test_rollout_of_artificial_attention():
    to_third = torch.zeros(1, 2, 4, 4)
    to_third[..., 2] = 1
    flow = saliency.attention_rollout([to_third, to_third])[0]
    torch.testing.assert_close(flow[0], torch.tensor([0.25, 0, 0.75, 0]))
    torch.testing.assert_close(flow.sum(1), torch.ones(4))


def test_rollout_of_a_vit_equals_a_manual_computation():
    torch.manual_seed(0)
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    network = _compat.timm().models.VisionTransformer(**sizes).eval()
    for block in network.blocks:
        block.attn.qkv.weight.data *= 40  # attention that is far from uniform
    module = pretrained.NormalizedModel(network, (0.5,) * 3, (0.5,) * 3)
    model = pretrained.PretrainedClassifier("vit", module, EvalTransform(40, 40, "bilinear"), ("a",) * 5)
    image = torch.rand(1, 3, 40, 40)
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in network.blocks]
    with torch.no_grad():
        module(image)
        for hook in hooks:
            hook.remove()
        flow = torch.eye(26)
        for block, x in zip(network.blocks, inputs, strict=True):
            queries, keys, _ = block.attn.qkv(x[0]).view(26, 3, 3, 8).unbind(1)  # (T, heads, 8) each
            weights = [(queries[:, h] @ keys[:, h].T / 8**0.5).softmax(1) for h in range(3)]
            flow = (sum(weights) / 3 + torch.eye(26)) / 2 @ flow
    expected = torch.nn.functional.interpolate(flow[0, 1:].view(1, 1, 5, 5), size=(40, 40), mode="bilinear")[:, 0]
    assert float(flow[0, 1:].std() / flow[0, 1:].mean()) > 0.1
    torch.testing.assert_close(attention.rollout(model, image), expected)
    assert all(block.attn.fused_attn for block in network.blocks), "the model is unchanged"


def test_other_models_are_rejected():
    with pytest.raises(ConfigError, match=r"needs a ViT or DeiT of timm.*gradient, smoothgrad"):
        attention.rollout(pretrained.build(), torch.rand(1, 3, 224, 224))
