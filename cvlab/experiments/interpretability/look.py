"""Look into a network: its weights, what its layers compute, its feature space, its loss landscape.

The methods import torch, not this module.
"""

from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.config import loading
from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.experiments.base import HasLabeledImages, PhotoExperiment
from cvlab.experiments.interpretability.config import SPLITS, LookConfig
from cvlab.runs.find import config_path
from cvlab.runs.results import Column, summarize
from cvlab.runs.run_dir import RunDir


class LookExperiment(PhotoExperiment[LookConfig]):
    """Look into a network: filters, histograms, feature maps, dead units, neighbors, t-SNE, loss landscape.

    References:
        Zeiler and Fergus, 2014, "Visualizing and understanding convolutional networks"; van der Maaten and Hinton,
        2008 (t-SNE); Li et al., 2018, "Visualizing the loss landscape of neural nets"; CS231n (Stanford).

    Differences from the papers:
        The batch normalization of pretrained models is folded into their convolutions, so filters and weights are
        those of the folded model. The landscape is measured in evaluation mode, on a part of the data.

    Metrics:
        `images`: number of images behind the statistics of the layers.
        `dead_fraction`: of the channels of all ReLUs, the fraction that is positive for none of these images.
        `same_class_fraction`: with classes, fraction of the images whose nearest neighbor is of the same class.
        `kl_divergence` of t-SNE.
        `loss`, `loss_at_radius`: cross-entropy of the run, and its mean at the four ends of the two directions.

    Command:
        cvlab look efficientnet_lite0 photo.jpg
    """

    name = "look"
    Config = LookConfig
    columns = (Column("shows", "shows"),)
    saves_checkpoints = False
    metrics = (
        Metric("images"),
        Metric("dead_fraction", "fraction", "lower"),
        Metric("same_class_fraction", "fraction", "higher"),
        Metric("kl_divergence", better="lower"),
        Metric("loss", better="lower", when=lambda config: config.landscape),
        Metric("loss_at_radius", better="lower", when=lambda config: config.landscape),
    )

    def problems(self, config: LookConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also a run without labeled images, if these are needed."""
        problems = super().problems(config, base)
        needs_data = config.landscape or config.on in SPLITS or (config.on is None and not config.images)
        if config.is_run and needs_data:
            trained = loading.load(str(config_path(Path(config.model))), []).config
            if not isinstance(registry.get_experiment(trained.experiment), HasLabeledImages):
                message = f"model: a run of {trained.experiment} has no labeled images; name photos or a folder"
                problems.append((("model",), message))
        return problems

    def run(self, config: LookConfig, run: RunDir) -> dict[str, float]:
        """Write the pictures; an interrupted run computes them again, but no row of the landscape."""
        from cvlab.experiments.interpretability.network_report import NetworkReport

        report = NetworkReport(config, run)
        metrics = report.write()
        run.extra_summary |= summarize(report.results, self.columns)
        return metrics

    def plan(self, config: LookConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown layer, DataError for missing photos."""
        from cvlab.experiments.interpretability.network_report import plan

        return plan(config)
