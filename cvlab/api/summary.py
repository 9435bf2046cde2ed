"""`cvlab summary`: the layers of a configuration's model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.config import loading
from cvlab.config.loading import Loaded
from cvlab.data.resolve import DownloadPolicy, describe_data, resolve_dataset
from cvlab.errors import ConfigError, DataError, RunDirError
from cvlab.experiments.base import HasSummary, has_capability
from cvlab.runs.find import LATEST, find_run

OFFLINE = DownloadPolicy(offline=True)


def source_of(reference: str, root: Path) -> str:
    """Return the configuration or the run directory that a reference names; a configuration comes first.

    Raises:
        ConfigError: Neither exists.
        RunDirError: `latest` is named, and there is no run with a model.
    """
    try:
        loading.find(reference)
        return reference
    except ConfigError:
        try:
            return str(find_run(reference, root, has_capability(HasSummary), "a training run"))
        except RunDirError:
            if reference == LATEST:
                raise
        raise


def summarize(loaded: Loaded) -> dict[str, Any]:
    """Build the model of a configuration and run one black image through it; nothing is written or downloaded.

    Args:
        loaded: A configuration that trains.

    Returns:
        `ok`, `config`, `experiment`, `data`, `input_shape`, `layers`, and the totals `parameters`,
        `trainable_parameters`, `parameter_bytes`, `flops` and `activation_bytes`.

    Raises:
        ConfigError: The experiment has no model of its own, or the model depends on a profile that is not named.
        DataError: The model depends on data or weights that are not on the disk.
    """
    config = loaded.config
    experiment = registry.get_experiment(config.experiment)
    if not isinstance(experiment, HasSummary):
        raise ConfigError(
            f"{loaded.source.name}: {config.experiment} has no model to summarize", "give a configuration that trains"
        )
    loaded.require_one_variant()
    from cvlab.models import summary

    data = config.data_config()
    try:
        spec = experiment.summary_spec(config, loaded.base)
    except DataError:
        if data is None or data.fallback is None:
            raise
        data = resolve_dataset(data, OFFLINE)
        spec = experiment.summary_spec(config.with_data(data), loaded.base)
    model = summary.summarize(spec)
    return {
        "ok": True,
        "config": str(loaded.source),
        "experiment": config.experiment,
        "data": describe_data(data) if data is not None else None,
        "input_shape": model.input_shape,
        "layers": [asdict(layer) for layer in model.layers],
        "parameters": model.parameters,
        "trainable_parameters": model.trainable_parameters,
        "parameter_bytes": model.parameter_bytes,
        "flops": model.flops,
        "activation_bytes": model.activation_bytes,
    }
