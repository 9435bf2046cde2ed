"""Interpretability: saliency maps, class visualization, feature inversion. The methods import torch."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.data import photo_paths
from cvlab.errors import install_command
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.interpretability.config import (
    CAPTUM_METHODS,
    ClassVisualizationConfig,
    DreamConfig,
    FeatureInversionConfig,
    SaliencyConfig,
    has_captum,
)
from cvlab.runs.results import Column, summarize
from cvlab.runs.run_dir import RunDir

CLASS_VISUALIZATION_COLUMNS = (
    Column("label", "prediction"),
    Column("second_label", "second model"),
    Column("channel", "channel"),
    Column("response", "response"),
    Column("grid", "grid", is_file=True),
    Column("frames", "frames", is_file=True),
    Column("animation", "animation", is_file=True),
)


class ClassVisualizationExperiment(PhotoExperiment[ClassVisualizationConfig]):
    """Class visualization: maximize the logit of a class, or a channel of a layer, starting from noise or a photo.

    References:
        Simonyan et al., 2014, section 2; Yosinski et al., 2015 (jitter and blur); Olah et al., 2017 (Fourier
        coefficients, transformation robustness, channels, diversity).

    Differences from the papers:
        The saved 8-bit image is read back and evaluated, by a second model too if `second_model` names one.

    Metrics:
        `probability`: lowest probability of a target class in its saved image.
        `response`: with `channel`, lowest mean activation of a channel in its saved image, in standard deviations of
        the layer's activations for the bundled photo.
        `diversity`: with `diversity`, 1 minus the mean similarity of the saved images of one target.
        `second_top5`: fraction of the images that have their target in the top 5 of the second model.

    Command:
        cvlab classvis --target gorilla
    """

    name = "class_visualization"
    Config = ClassVisualizationConfig
    columns = CLASS_VISUALIZATION_COLUMNS
    metrics = (
        Metric("num_pictures"),
        Metric("probability", "fraction", "higher", lambda config: config.channel is None),
        Metric("response", "", "higher", lambda config: config.channel is not None),
        Metric("diversity", "fraction", "higher", lambda config: config.diversity > 1),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("loss", better="lower"),
        Metric("second_top5", "fraction", "higher", lambda config: config.second_model is not None),
    )

    def problems(self, config: ClassVisualizationConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also classes that the model does not have."""
        return super().problems(config, base) + config.class_problems("targets", config.targets)

    def run(self, config: ClassVisualizationConfig, run: RunDir) -> dict[str, float]:
        """Optimize the images of all targets together."""
        from cvlab.engine import image_optimizer
        from cvlab.experiments.interpretability.class_visualization import ClassVisualizer, build_second_model
        from cvlab.experiments.interpretability.visualization_targets import build_targets

        ctx, model = config.build()
        second = build_second_model(config, model, ctx.device)
        visualizer = ClassVisualizer(config, model, ctx, build_targets(config, model, ctx.device), run)
        task = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState([visualizer.initial_parameters()]),
            objective=visualizer.objective,
            update=visualizer.update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset(round(k * config.steps / config.frames) for k in range(config.frames + 1)),
            save_frame=visualizer.save_frames,
        )
        losses = image_optimizer.optimize_image(task, run, "classvis")
        results = visualizer.save_and_evaluate(task.state)
        if second is not None:
            visualizer.evaluate_second(second, results)
        run.extra_summary |= summarize(results, self.columns)
        key, name = ("score_target", "probability") if config.channel is None else ("response", "response")
        metrics = {"num_pictures": len(results), name: min(result.values[key] for result in results), **losses}
        if config.diversity > 1:
            metrics["diversity"] = visualizer.measure_diversity(results)
        if second is not None:
            metrics["second_top5"] = sum(result.values["second_rank"] <= 5 for result in results) / len(results)
        return metrics

    def plan(self, config: ClassVisualizationConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do.

        Raises ConfigError for an unknown class, layer or channel, DataError for a missing photo.
        """
        from cvlab.data import photos
        from cvlab.experiments.interpretability.class_visualization import build_second_model, parameter_shape
        from cvlab.experiments.interpretability.visualization_targets import Similarity, build_targets

        ctx, model = config.build()
        targets = build_targets(config, model, ctx.device)
        if config.diversity > 1:
            Similarity(config, model, targets.groups)
        if config.init == "image":
            photos.load(photo_paths.find_images(config.images)[0])
        build_second_model(config, model, ctx.device)
        shape = parameter_shape(config, model)
        return {
            "targets": ", ".join(targets.titles),
            "parameters": math.prod(shape),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }


FEATURE_INVERSION_COLUMNS = (
    Column("layer", "layer"),
    Column("psnr_db", "PSNR", "dB", is_detail=True),
    Column("panel", "panel", is_file=True),
)


class FeatureInversionExperiment(PhotoExperiment[FeatureInversionConfig]):
    """Feature inversion: reconstruct a photo from the features of each of several layers.

    References:
        Mahendran and Vedaldi, 2015, "Understanding deep image representations by inverting them"; EECS 498,
        assignment 5 (style transfer without a style, from uniform noise).

    Differences from the papers:
        All layers are inverted in one run. The loss of a layer is relative to the variance of its features.

    Metrics:
        `psnr_db/LAYER`: PSNR of the saved reconstruction from a layer; `psnr_db_first` and `psnr_db_last` of the
        first and the last layer.
        `largest_rise_db`: largest increase from a layer to the next.

    Command:
        cvlab run configs/feature_inversion.yaml
    """

    name = "feature_inversion"
    Config = FeatureInversionConfig
    columns = FEATURE_INVERSION_COLUMNS
    metrics = (
        Metric("num_pictures"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        *(Metric(name, better="lower") for name in ("loss", "content_loss", "tv_loss")),
        Metric("psnr_db_first", "dB", "higher"),
        Metric("psnr_db_last", "dB", "higher"),
        Metric("largest_rise_db", "dB", "lower"),
        Metric("psnr_db/*", "dB", "higher"),
    )

    def run(self, config: FeatureInversionConfig, run: RunDir) -> dict[str, float]:
        """Optimize the images of all layers together."""
        from cvlab.engine import image_optimizer
        from cvlab.experiments.interpretability.feature_inversion import (
            FeatureInverter,
            save_and_evaluate,
            save_preview,
        )

        ctx, model = config.build()
        inverter = FeatureInverter(config, model, ctx)
        task = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState(inverter.initial_pixels()),
            objective=inverter.objective,
            update=inverter.update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
            save_frame=lambda _step, state: save_preview(run, state),
        )
        losses = image_optimizer.optimize_image(task, run, "inversion")
        results = save_and_evaluate(inverter, task.state, run)
        run.extra_summary |= summarize(results, self.columns)
        psnrs = [result.values["psnr_db"] for result in results]
        rises = [deeper - shallower for shallower, deeper in itertools.pairwise(psnrs)]
        by_layer = {f"psnr_db/{result.values['layer']}": result.values["psnr_db"] for result in results}
        ends = {"psnr_db_first": psnrs[0], "psnr_db_last": psnrs[-1], "largest_rise_db": max(rises, default=0.0)}
        return {"num_pictures": len(results), **by_layer, **ends, **losses}

    def plan(self, config: FeatureInversionConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown layer, DataError for a missing photo."""
        from cvlab.experiments.interpretability.feature_inversion import FeatureInverter

        ctx, model = config.build()
        inverter = FeatureInverter(config, model, ctx)
        return {
            "image": config.image,
            "layers": ", ".join(config.layers),
            "parameters": inverter.photo_pixels.numel() * len(config.layers),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }


SALIENCY_COLUMNS = (
    Column("predicted", "prediction"),
    Column("label", "explained class"),
    Column("inside", "inside"),
    Column("comparison", "comparison", is_file=True),
    Column("panel", "panel", is_file=True),
    Column("map", "map", is_file=True, is_part=True),
    Column("overlay", "overlay", is_file=True, is_part=True),
    Column("values", "values", is_file=True),
)


class SaliencyExperiment(PhotoExperiment[SaliencyConfig]):
    """Saliency maps: which pixels of a photo the prediction depends on.

    References:
        Simonyan et al., 2014, "Deep Inside Convolutional Networks", section 3.1; Smilkov et al., 2017; Sundararajan
        et al., 2017; Selvaraju et al., 2017; Jiang et al., 2021 (LayerCAM); Wang et al., 2020 (Score-CAM); Zeiler and
        Fergus, 2014 (occlusion); Springenberg et al., 2015 (guided backpropagation); Castro et al., 2009 (Shapley
        values); Shrikumar et al., 2017 (DeepLift); Ribeiro et al., 2016 (LIME); Abnar and Zuidema, 2020 (rollout);
        Petsiuk et al., 2018 (insertion and deletion); Adebayo et al., 2018 (randomized weights).

    Metrics:
        `num_photos`: number of photos.
        `inside`: fraction of the map's sum that its strongest 10 % of pixels have (0.1 for a uniform map).
        `insertion/METHOD`, `deletion/METHOD`: with `compare`, mean area under the curve of the class's probability
        while the pixels are inserted into the blurred photo or deleted, by a method's map; METHOD is `random` for a
        random order.
        `randomized/METHOD`: with `compare`, mean rank correlation of a map with the one after the last layers were
        randomized; near 1 for a map that does not depend on what they have learned.

    Command:
        cvlab saliency photo.jpg
    """

    name = "saliency"
    Config = SaliencyConfig
    columns = SALIENCY_COLUMNS
    metrics = (
        Metric("num_photos"),
        Metric("inside", "fraction", "higher"),
        Metric("insertion/*", "fraction", "higher", lambda config: config.compare, "method"),
        Metric("deletion/*", "fraction", "lower", lambda config: config.compare, "method"),
        Metric("randomized/*", "", "lower", lambda config: config.compare and config.randomized > 0, "method"),
    )

    def problems(self, config: SaliencyConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also classes that the model does not have, a missing package."""
        problems = super().problems(config, base) + config.class_problems("target", [config.target])
        if config.method in CAPTUM_METHODS and not has_captum():
            command = install_command("explain")
            message = f"{config.method} is computed by captum, which is not installed: {command}"
            problems.append((("method",), message))
        return problems

    def run(self, config: SaliencyConfig, run: RunDir) -> dict[str, float]:
        """Compute the saliency maps of all photos."""
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.interpretability.saliency import SaliencyMaps

        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        run.folder("images")
        saliency_maps = SaliencyMaps(config, model, ctx, target, run)
        results = photo_batches.run(config, run, saliency_maps, "saliency", self.columns)
        inside = statistics.fmean(result.values["inside"] for result in results)
        metrics = {"num_photos": len(results), "inside": inside}
        for position, row in enumerate(results[0].values.get("methods", ())):
            for key in [key for key in ("insertion", "deletion", "randomized") if key in row]:
                areas = [result.values["methods"][position][key] for result in results]
                metrics[f"{key}/{row['method']}"] = statistics.fmean(areas)
        return metrics

    def plan(self, config: SaliencyConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class, or a method the model does not allow."""
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.interpretability.saliency_methods import check_method

        ctx, model = config.build()
        if config.target is not None:
            model.class_index(config.target)
        check_method(config.method, model)
        return photo_batches.plan(config, ctx, model)


DREAM_COLUMNS = (
    Column("layer", "layer"),
    Column("response_before", "response before"),
    Column("response_after", "after"),
    Column("dream", "dream", is_file=True),
    Column("panel", "panel", is_file=True),
)


class DreamExperiment(PhotoExperiment[DreamConfig]):
    """DeepDream: change photos so that a layer, or one of its channels, responds more strongly.

    References:
        Mordvintsev, Olah and Tyka, 2015, "Inceptionism: Going Deeper into Neural Networks".

    Differences from the article:
        The gradient is the sum of three blurred versions of it, so that a pattern grows at several scales in each
        octave.

    Metrics:
        `response_ratio`: lowest ratio of the layer's response to the saved image and to the photo, without a channel.

    Command:
        cvlab dream photo.jpg --layer blocks.3 --octaves 4
    """

    name = "dream"
    Config = DreamConfig
    columns = DREAM_COLUMNS
    metrics = (
        Metric("num_photos"),
        Metric("response_ratio", "", "higher", lambda config: not config.is_channel),
    )

    def run(self, config: DreamConfig, run: RunDir) -> dict[str, float]:
        """Dream of all photos."""
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.interpretability.deep_dream import Dreamer

        ctx, model = config.build()
        run.folder("images")
        results = photo_batches.run(config, run, Dreamer(config, model, ctx, run), "dream", self.columns)
        metrics: dict[str, float] = {"num_photos": len(results)}
        if not config.is_channel:
            ratios = [r.values["response_after"] / max(r.values["response_before"], 1e-30) for r in results]
            metrics["response_ratio"] = min(ratios)
        return metrics

    def plan(self, config: DreamConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for a layer that the model does not have."""
        from cvlab.experiments.common import photo_batches
        from cvlab.experiments.interpretability.deep_dream import build_extractor

        ctx, model = config.build()
        layer = build_extractor(config.layer, model, ctx)[0].names[0]
        return {"layer": config.layer or layer, "octaves": config.octaves, **photo_batches.plan(config, ctx, model)}
