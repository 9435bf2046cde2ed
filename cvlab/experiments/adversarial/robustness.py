"""The accuracy of trained classifiers under attack and under corruptions. The functions import torch."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlab import console, registry
from cvlab.config import loading
from cvlab.config.loading import Loaded
from cvlab.config.metrics import Metric
from cvlab.config.strict_yaml import Document
from cvlab.config.validation import Problems
from cvlab.errors import ConfigError
from cvlab.experiments.adversarial.config import CORRUPTIONS, METHODS, RobustnessConfig
from cvlab.experiments.base import Experiment, MeasuresRobustness
from cvlab.runs import records
from cvlab.runs.find import config_path
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from cvlab.experiments.common.labeled_classifier import LabeledClassifier

PLOT = "plots/robustness.png"
TRANSFER = "transfer.csv"
CORRECT = "correct/"  # before the names of accuracies in metrics.jsonl: numbers of images so far
EPS = "eps in 1/255"


class RobustnessExperiment(Experiment[RobustnessConfig]):
    """Measure the accuracy of trained classifiers under attack and under corruptions, over the strength.

    References:
        Goodfellow et al., 2015 (fgsm); Madry et al., 2018 (pgd); Croce and Hein, 2020 (apgd_ce, apgd_dlr);
        Andriushchenko et al., 2020 (square); Hendrycks and Dietterich, 2019 (corruptions).

    Differences from the papers:
        An example that fools the classifier within a small bound also counts for all larger ones, so the accuracy
        never rises with the bound. `pgd` starts from the example of `fgsm`. Examples are not rounded to 8 bits.

    Metrics:
        `accuracy` without an attack; `METHOD_accuracy/EPS` under an attack; `robust_accuracy/EPS`, the share of the
        images that are classified correctly under all of them; `CORRUPTION_accuracy/SEVERITY`, and their mean,
        `corrupted_accuracy`. Those of several runs are preceded by the name of the run, and `B:transfer_accuracy/A` is
        the accuracy of B on the examples against A with the largest bound.

    Command:
        cvlab attack RUN --on test
    """

    name = "robustness"
    Config = RobustnessConfig
    saves_checkpoints = False
    metrics = (
        Metric("accuracy", "fraction", "higher"),
        *(Metric(f"{name}_accuracy/*", "fraction", "higher", label=EPS) for name in ("robust", *METHODS)),
        *(Metric(f"{name}_accuracy/*", "fraction", "higher", label="severity") for name in CORRUPTIONS),
        Metric("corrupted_accuracy", "fraction", "higher"),
        Metric("transfer_accuracy/*", "fraction", "higher", label="examples against"),
        Metric("images"),
    )

    def reported_metrics(self, config: RobustnessConfig) -> tuple[Metric, ...]:
        """Return the metrics by their names; those of several runs are preceded by the name of the run."""
        if len(config.models) == 1:
            return self.metrics
        labels = run_labels(config)
        prefixed = (replace(metric, name=f"{label}{metric.name}") for label in labels for metric in self.metrics)
        return (*prefixed, *self.metrics)

    def problems(self, config: RobustnessConfig, base: Path) -> Problems:
        """Return what is wrong with the runs and with the expectations."""
        problems: Problems = []
        for name in config.models:
            trained = loading.load(str(config_path(Path(name))), []).config
            if not isinstance(registry.get_experiment(trained.experiment), MeasuresRobustness):
                message = f"models: {Path(name).name} is a run of {trained.experiment}; its robustness is not measured"
                problems.append((("models",), message))
            elif config.on == "val" and not getattr(trained, "has_validation", True):
                message = f"on: {Path(name).name} has no val split (data.val_fraction: 0); use train or test"
                problems.append((("on",), message))
        return problems + super().problems(config, base)

    def plan(self, config: RobustnessConfig, base: Path) -> dict[str, Any]:
        """Return what would be measured."""
        runs = [Path(name).name for name in config.models]
        return {"runs": runs, "on": config.on, "images": config.num_images, "metrics": len(metric_names(config))}

    def run(self, config: RobustnessConfig, run: RunDir) -> dict[str, float]:
        """Measure batch by batch; a batch that is in metrics.jsonl is not measured again."""
        counts: Counter[str] = Counter()
        num_images, names = 0, count_names(config)
        for row in records.read_metrics(run.path):
            num_images = int(row["step"])
            counts = Counter({name: int(row.get(f"{CORRECT}{name}", 0)) for name in names})
        with StopRequest() as stop:
            classifiers = {
                label: _load(config, Path(name), lambda: stop.raise_if_set(num_images, run.path.name, "image"))
                for label, name in zip(run_labels(config), config.models, strict=True)
            }
            first = next(iter(classifiers.values()))
            _require_same_data(config, list(classifiers.values()))
            total = min(config.num_images, len(first.labels))
            with console.Progress(config.name, total, num_images) as bar:
                while num_images < total:
                    end = min(num_images + config.batch_size, total)

                    def check_interrupt(note: str, done: int = num_images) -> None:
                        stop.raise_if_set(done, run.path.name, "image")
                        if bar.due():
                            bar.update(done, note)

                    batch = slice(num_images, end)
                    counts += _measure_batch(config, classifiers, batch, check_interrupt)
                    num_images = end
                    run.append({"step": end, **{f"{CORRECT}{name}": counts[name] for name in names}})
                    bar.update(end, "")
        accuracies = _accuracies(config, counts, num_images)
        _write_results(config, run, first, accuracies)
        return {**accuracies, "images": num_images}


def run_labels(config: RobustnessConfig) -> list[str]:
    """Return what precedes the metrics of each run: nothing if there is only one."""
    from cvlab.reports import compare

    if len(config.models) == 1:
        return [""]
    return [f"{label}:" for label in compare.labels([Path(name) for name in config.models])]


def metric_names(config: RobustnessConfig) -> tuple[str, ...]:
    """Return the names of all accuracies that a configuration measures."""
    means = [f"{label}corrupted_accuracy" for label in run_labels(config) if config.corruptions]
    return (*count_names(config), *means)


def count_names(config: RobustnessConfig) -> tuple[str, ...]:
    """Return the names of the accuracies that are shares of the images."""
    from cvlab.ops.corruptions import SEVERITIES

    labels = run_labels(config)
    names: list[str] = []
    for label in labels:
        names.append(f"{label}accuracy")
        names += [f"{label}{method}_accuracy/{eps:g}" for method in config.methods for eps in config.bounds]
        names += [f"{label}robust_accuracy/{eps:g}" for eps in config.bounds if config.methods]
        names += [f"{label}{name}_accuracy/{severity}" for name in config.corruptions for severity in SEVERITIES]
    if len(labels) > 1 and config.methods and config.bounds:
        names += [f"{b}transfer_accuracy/{a[:-1]}" for a in labels for b in labels]
    return tuple(names)


def _accuracies(config: RobustnessConfig, counts: Mapping[str, int], num_images: int) -> dict[str, float]:
    """Return all accuracies, from the numbers of images that are classified correctly."""
    accuracies = {name: counts[name] / num_images for name in count_names(config)}
    for label in run_labels(config) if config.corruptions else ():
        prefixes = tuple(f"{label}{name}_accuracy/" for name in config.corruptions)
        under = [value for name, value in accuracies.items() if name.startswith(prefixes)]
        accuracies[f"{label}corrupted_accuracy"] = sum(under) / len(under)
    return accuracies


def load_robustness(runs: Sequence[str], overrides: Sequence[str], **values: Any) -> Loaded:
    """Return the configuration that measures the robustness of training runs.

    Args:
        runs: Run directories, names, or parts of names.
        overrides: `key=value` texts.
        values: Further keys; None for the default.

    Raises:
        ConfigError: With all problems.
    """
    from cvlab.config.overrides import to_texts

    raw = {"experiment": RobustnessExperiment.name, "models": tuple(runs)}
    texts = to_texts({key: value for key, value in values.items() if value is not None})
    document = Document(raw, {}, "command line")
    return loading.load_document(document, Path(f"{RobustnessExperiment.name}.yaml"), [*texts, *overrides])


def _load(config: RobustnessConfig, path: Path, check_interrupt: Callable[[], None]) -> "LabeledClassifier":
    """Return the classifier of a run with the split of its data."""
    from cvlab.engine.device import select_device
    from cvlab.runs import checkpoint

    ctx = select_device(config.device, config.precision, config.threads)
    trained = loading.load(str(config_path(path)), []).config
    experiment = registry.get_experiment(trained.experiment)
    assert isinstance(experiment, MeasuresRobustness)
    state = checkpoint.load_of_run(path, config.weights)
    return experiment.labeled_classifier(trained, path, state, config.on, str(ctx.device), check_interrupt)


def _require_same_data(config: RobustnessConfig, classifiers: "Sequence[LabeledClassifier]") -> None:
    """Raise ConfigError if examples against one classifier cannot be tried on the others, or an attack has no use."""
    first = classifiers[0]
    if "apgd_dlr" in config.methods and len(first.classes) < 3:
        raise ConfigError("apgd_dlr needs at least three classes", "use apgd_ce")
    for path, other in zip(config.models[1:], classifiers[1:], strict=True):
        same = first.labels.equal(other.labels) and first.images(slice(0, 1)).equal(other.images(slice(0, 1)))
        if other.classes != first.classes or not same:
            raise ConfigError(
                f"{Path(path).name} has other {config.on} images than {Path(config.models[0]).name}",
                "name runs that were trained on the same data",
            )


def _measure_batch(
    config: RobustnessConfig,
    classifiers: "Mapping[str, LabeledClassifier]",
    batch: slice,
    check_interrupt: Callable[[str], None],
) -> Counter[str]:
    """Return how many images of a batch are classified correctly, by the name of the metric."""
    from cvlab.experiments.common.labeled_classifier import to_pixels
    from cvlab.ops import linf_attacks

    counts: Counter[str] = Counter()
    for label, classifier in classifiers.items():
        images, labels = classifier.images(batch), classifier.labels[batch]
        pixels = to_pixels(images)
        is_correct = ~linf_attacks.misclassified(classifier.logits_fn, pixels, labels)
        counts[f"{label}accuracy"] = int(is_correct.sum())
        for eps, method, correct_under, robust in _attack(
            config, classifier, pixels, is_correct, batch, check_interrupt
        ):
            counts[f"{label}{method}_accuracy/{eps:g}"] = correct_under
            counts[f"{label}robust_accuracy/{eps:g}"] = robust
        if len(classifiers) > 1 and config.methods and config.bounds:
            check_interrupt("examples for the other runs")
            examples = _transferable_examples(config, classifier, pixels, labels)
            for other_label, other in classifiers.items():
                num_correct = int((~linf_attacks.misclassified(other.logits_fn, examples, labels)).sum())
                counts[f"{other_label}transfer_accuracy/{label[:-1]}"] = num_correct
        for name, severity, num_correct in _corrupt(config, classifier, images, labels, batch, check_interrupt):
            counts[f"{label}{name}_accuracy/{severity}"] = num_correct
    return counts


def _attack(
    config: RobustnessConfig,
    classifier: "LabeledClassifier",
    originals: "Tensor",
    is_correct: "Tensor",
    batch: slice,
    check_interrupt: Callable[[str], None],
) -> Iterator[tuple[float, str, int, int]]:
    """Attack the images of a batch with each bound and method.

    Args:
        config: The configuration.
        classifier: The classifier.
        originals: (N, C, H, W) in [0, 1], the images.
        is_correct: bool (N,), which of them are classified correctly.
        batch: Their range in the split.
        check_interrupt: Called before each attack; may raise to stop.

    Yields:
        Bound, method, how many images are classified correctly under this method, and under all methods so far.
    """
    import torch

    from cvlab.ops import linf_attacks

    labels = classifier.labels[batch]
    correct_under = {method: is_correct.clone() for method in config.methods}
    is_robust = is_correct.clone()
    numbers = torch.arange(batch.start, batch.stop, device=originals.device)
    for eps in config.bounds:
        for method in config.methods:
            check_interrupt(f"{method}, eps {eps:g}")
            rows = correct_under[method].nonzero()[:, 0]
            if len(rows):
                attacked = _attack_fn(config, method, eps, numbers[rows])(
                    classifier.logits_fn, originals[rows], labels[rows], eps / 255
                )
                is_fooled = linf_attacks.misclassified(classifier.logits_fn, attacked, labels[rows])
                correct_under[method][rows] = ~is_fooled
                is_robust[rows] &= ~is_fooled
            yield eps, method, int(correct_under[method].sum()), int(is_robust.sum())


def _transferable_examples(
    config: RobustnessConfig, classifier: "LabeledClassifier", originals: "Tensor", labels: "Tensor"
) -> "Tensor":
    """Return examples with the largest bound, by PGD that takes all steps, so that they fool other classifiers too."""
    import torch

    from cvlab.ops import linf_attacks

    eps = config.bounds[-1] / 255
    return linf_attacks.pgd(
        classifier.logits_fn,
        originals,
        labels,
        eps,
        steps=config.steps,
        alpha=2.5 * eps / config.steps,
        uniform=lambda _, shape: torch.zeros(shape),  # it starts from the FGSM example only
        stops_early=False,
    )


def _attack_fn(
    config: RobustnessConfig, method: str, eps: float, numbers: "Tensor"
) -> "Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], Tensor]":
    """Return the attack of a method on images with these numbers in the split, which determine its random numbers."""
    from cvlab.data import rng
    from cvlab.ops import linf_attacks

    def uniform(draw: int, shape: tuple[int, ...]) -> "Tensor":
        return rng.uniform_items(config.seed, draw, numbers, shape[1:], f"{method}-{eps:g}")

    if method == "fgsm":
        return linf_attacks.fgsm
    if method == "square":
        return functools.partial(linf_attacks.square, queries=config.queries, uniform=uniform)
    shared: dict[str, Any] = {"steps": config.steps, "restarts": config.restarts, "uniform": uniform}
    if method == "pgd":
        alpha = (config.alpha if config.alpha is not None else 2.5 * eps / config.steps) / 255
        return functools.partial(linf_attacks.pgd, alpha=alpha, **shared)
    loss_fn = linf_attacks.dlr_loss if method == "apgd_dlr" else linf_attacks.cross_entropy
    return functools.partial(linf_attacks.apgd, loss_fn=loss_fn, **shared)


def _corrupt(
    config: RobustnessConfig,
    classifier: "LabeledClassifier",
    images: "Tensor",
    labels: "Tensor",
    batch: slice,
    check_interrupt: Callable[[str], None],
) -> Iterator[tuple[str, int, int]]:
    """Yield corruption, severity, and how many images (N, H, W, C) of a batch are then classified correctly."""
    import torch

    from cvlab.data import rng
    from cvlab.experiments.common.labeled_classifier import to_pixels
    from cvlab.ops import corruptions, linf_attacks

    for name in config.corruptions:
        for severity in corruptions.SEVERITIES:
            check_interrupt(f"{name} {severity}")

            def normal(shape: tuple[int, ...], severity: int = severity) -> "Tensor":
                numbers = range(batch.start, batch.stop)  # each image has its own numbers, whatever the batch is
                rows = [rng.normal(config.seed, number, shape[1:], f"noise-{severity}") for number in numbers]
                return torch.stack(rows)

            corrupted = corruptions.apply(name, images, severity, normal)
            pixels = to_pixels(corrupted)
            is_incorrect = linf_attacks.misclassified(classifier.logits_fn, pixels, labels)
            yield name, severity, int((~is_incorrect).sum())


def _write_results(
    config: RobustnessConfig, run: RunDir, classifier: "LabeledClassifier", accuracies: Mapping[str, float]
) -> None:
    """Write the curves, and with several runs the matrix of transfers; say the result in a line."""
    from cvlab.reports import plots

    labels = run_labels(config)
    curves = {}
    for label in labels if config.bounds else ():
        for name in [*config.methods, *(["robust"] if len(config.methods) > 1 else [])]:
            points = [(eps, accuracies[f"{label}{name}_accuracy/{eps:g}"]) for eps in config.bounds]
            xs, ys = zip((0.0, accuracies[f"{label}accuracy"]), *points, strict=True)
            curves[f"{label}{'all of them' if name == 'robust' else name}"] = (list(xs), list(ys))
    if curves:
        run.folder("plots")
        title = f"{classifier.data} {config.on}"
        picture = plots.draw(curves, "accuracy", title, is_fraction=True, x_label="largest change of a pixel, in 1/255")
        run.write_bytes(PLOT, picture)
    if len(labels) > 1 and curves:
        names = [label[:-1] for label in labels]
        rows = [["examples against", *names]]
        rows += [[a, *(f"{accuracies[f'{b}:transfer_accuracy/{a}']:.4f}" for b in names)] for a in names]
        run.write_text(TRANSFER, "".join(f"{','.join(row)}\n" for row in rows))
    run.extra_summary["headline"] = _headline(config, accuracies)


def _headline(config: RobustnessConfig, accuracies: Mapping[str, float]) -> str:
    """Return the accuracies of the first run in a line."""
    label = run_labels(config)[0]
    parts = [f"accuracy {accuracies[f'{label}accuracy']:.3f}"]
    if config.methods and config.bounds:
        parts += [f"{accuracies[f'{label}robust_accuracy/{eps:g}']:.3f} at {eps:g}/255" for eps in config.bounds]
    if config.corruptions:
        parts.append(f"{accuracies[f'{label}corrupted_accuracy']:.3f} under corruptions")
    return ", ".join(parts)
