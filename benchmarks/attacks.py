"""Compare accuracies under the attacks of cvlab, torchattacks and adv-lib on the same images of a run.

Command: python benchmarks/attacks.py RUN --eps 4 (pip install torchattacks adv-lib; a column is empty without them)
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cvlab
from cvlab import _compat, registry
from cvlab.config import loading
from cvlab.experiments.adversarial.config import METHODS
from cvlab.experiments.base import MeasuresRobustness
from cvlab.runs import checkpoint
from cvlab.runs.find import config_path

if TYPE_CHECKING:
    from cvlab.experiments.common.labeled_classifier import LabeledClassifier

LIBRARIES = ("torchattacks", "adv_lib.attacks")
Attack = Callable[[Tensor, Tensor], Tensor]  # images (N, C, H, W) in [0, 1] and labels (N,) to examples


class Logits(nn.Module):
    """A module for other libraries that calls a function from images in [0, 1] to logits."""

    def __init__(self, logits_fn: Callable[[Tensor], Tensor], device: torch.device) -> None:
        super().__init__()
        self.logits_fn = logits_fn
        self.device_of_images = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        return self.logits_fn(images)


def load(run: Path) -> "LabeledClassifier":
    """Return the classifier of a run on the CPU, with the test images."""
    config = loading.load(str(config_path(run)), []).config
    experiment = registry.get_experiment(config.experiment)
    assert isinstance(experiment, MeasuresRobustness)
    return experiment.labeled_classifier(config, run, checkpoint.load_of_run(run, "last"), "test", "cpu", lambda: None)


def library_attacks(name: str, model: nn.Module, eps: float, steps: int, queries: int) -> dict[str, Attack]:
    """Return the attacks of a library by their names in cvlab, `eps` in [0, 1]; empty if it is not installed."""
    _compat.torchvision()  # the libraries import it
    try:
        library: Any = importlib.import_module(name)
    except ImportError:
        return {}
    alpha = 2.5 * eps / steps
    if name == "torchattacks":
        return {
            "fgsm": library.FGSM(model, eps),
            "pgd": library.PGD(model, eps, alpha, steps),
            "apgd_ce": library.APGD(model, eps=eps, steps=steps, loss="ce"),
            "apgd_dlr": library.APGD(model, eps=eps, steps=steps, loss="dlr"),
            "square": library.Square(model, eps=eps, n_queries=queries),
        }

    def apgd(loss: str) -> Attack:
        return lambda x, y: library.apgd(model, x, y, eps, float("inf"), n_iter=steps, loss_function=loss)

    return {
        "pgd": lambda x, y: library.pgd_linf(model, x, y, eps, steps=steps, absolute_step_size=alpha),
        "apgd_ce": apgd("ce"),
        "apgd_dlr": apgd("dlr"),
    }


def compare(run: Path, eps: float, num_images: int, steps: int, queries: int) -> list[dict[str, Any]]:
    """Return `{"run", "attack", "cvlab", "torchattacks", "adv_lib.attacks"}` for each attack: accuracies or None."""
    settings = {"num_images": num_images, "steps": steps, "queries": queries}
    with tempfile.TemporaryDirectory() as folder:
        run_of_cvlab = cvlab.robustness(
            run, methods=METHODS, eps=[eps], overrides=settings, device="cpu", runs_dir=folder
        )
        metrics = run_of_cvlab.summary["metrics"]
    classifier = load(run)
    images = classifier.images(slice(num_images)).permute(0, 3, 1, 2).float() / 255
    labels = classifier.labels[:num_images]
    model = Logits(classifier.logits_fn, classifier.device).eval()
    is_correct = model(images).argmax(1) == labels
    rows: list[dict[str, Any]] = [
        {"run": run.name, "attack": name, "cvlab": metrics[f"{name}_accuracy/{eps:g}"]} for name in METHODS
    ]
    for library in LIBRARIES:
        torch.manual_seed(0)
        attacks = library_attacks(library, model, eps / 255, steps, queries)
        for row in rows:
            attack = attacks.get(row["attack"])
            if attack is None:
                row[library] = None
                continue
            examples = attack(images.clone(), labels).detach()
            assert (examples - images).abs().max() <= eps / 255 + 1e-5
            row[library] = float((is_correct & (model(examples).argmax(1) == labels)).float().mean())
    return [{"run": run.name, "attack": "none", "cvlab": metrics["accuracy"]} | dict.fromkeys(LIBRARIES), *rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the accuracies of training runs under each attack."""
    parser = argparse.ArgumentParser(description="Compare attacks with those of other libraries.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of classifiers")
    parser.add_argument("--eps", type=float, default=4.0, help="largest change of a pixel, in 1/255")
    parser.add_argument("--images", type=int, default=200, help="number of test images, the first ones")
    parser.add_argument("--steps", type=int, default=20, help="steps of PGD and APGD")
    parser.add_argument("--queries", type=int, default=1000, help="queries of Square")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = (options.eps, options.images, options.steps, options.queries)
    rows = [row for run in options.runs for row in compare(run.resolve(), *sizes)]
    if options.json:
        print(json.dumps({"ok": True, "eps": options.eps, "images": options.images, "attacks": rows}))
        return
    for row in rows:
        values = ("" if row[name] is None else f"{row[name]:.3f}" for name in ("cvlab", *LIBRARIES))
        print(f"| {row['run']} | {row['attack']} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
