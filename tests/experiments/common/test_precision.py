"""The precision of the shipped configurations, on machines with and without hardware support for bfloat16."""

from typing import get_args

import pytest

from cvlab.config import loading
from cvlab.engine import device
from cvlab.experiments.common.photo_config import PretrainedConfig


def base_config(name):
    config = loading.load(name).config
    if "precision" not in type(config).model_fields:
        return None
    has_choice = "auto" in get_args(type(config).model_fields["precision"].annotation)
    return config if has_choice or isinstance(config, PretrainedConfig) else None


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("name", [name for name in loading.shipped_names() if base_config(name) is not None])
def test_photos_are_processed_in_float32_and_training_uses_the_fast_precision(monkeypatch, name, is_fast):
    monkeypatch.setattr(device, "fast_bfloat16", lambda _: is_fast)
    config = base_config(name)
    expected = "bfloat16" if is_fast and not isinstance(config, PretrainedConfig) else "float32"
    assert device.select_device("cpu", config.precision).precision == expected
