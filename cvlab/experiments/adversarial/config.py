"""Configuration of adversarial attacks on photos."""

import re
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import Field, field_validator, model_validator

from cvlab.config import schema
from cvlab.config.schema import RunConfig
from cvlab.experiments.common import run_classifier
from cvlab.experiments.common.photo_config import ClassName, PhotoConfig
from cvlab.runs.find import runs_root

Corruption = Literal["noise", "blur", "contrast", "jpeg"]
Method = Literal["fgsm", "pgd", "apgd_ce", "apgd_dlr", "square"]
METHODS: tuple[Method, ...] = get_args(Method)
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
JPEG_NAMES = ("jpeg95", "jpeg85", "jpeg75")  # changes after which success is always measured
CHANGE = r"jpeg([1-9][0-9]?|100)|resize|crop"  # a name in `survive`
MM_PER_INCH = 25.4
MAX_PATCH_PX = 5000
DEFAULT_EPS = 8.0  # in 1/255


class AttackConfig(PhotoConfig):
    """Configuration of an attack: the photos, the target class, the method."""

    target: ClassName | None = Field(None, description="target class; null: any class but the predicted one")
    method: Literal["l2", "fgsm", "pgd", "deepfool", "cw"] = Field(
        "l2",
        description="gradient steps of a fixed L2 norm, one step (fgsm) or many (pgd) within an L-infinity bound, or a "
        "search for the smallest L2 norm (deepfool, cw)",
    )
    size: Literal["original", "model"] = Field(
        "original", description="attack the photo at its own resolution, or reduced to the size of the model's input"
    )
    steps: Annotated[schema.PositiveInt, Le(10_000)] = Field(
        100, description="maximum number of steps; cw: for each constant"
    )
    extra_steps: schema.NonNegativeInt = Field(3, description="further steps after the first success, for robustness")
    lr: schema.PositiveFloat = Field(0.5, description="l2: L2 norm of a step, of the model's input in [0, 1]")
    eps: Annotated[float, Ge(0.5), Le(255)] | None = Field(
        None,
        description="fgsm, pgd: maximum change of a pixel, in 1/255; less than 0.5 would be lost in an 8-bit file; "
        f"null: {DEFAULT_EPS:g}",
    )
    alpha: Annotated[float, Gt(0), Le(255)] = Field(1.0, description="pgd: step size, in 1/255")
    overshoot: Annotated[float, Ge(0), Le(1)] = Field(
        0.02, description="deepfool: how far beyond the boundary a step leads, in parts of its length"
    )
    candidates: schema.PositiveInt = Field(
        10, description="deepfool without a target: number of classes whose boundaries are compared"
    )
    search_steps: Annotated[schema.PositiveInt, Le(20)] = Field(
        5, description="cw: number of constants that weigh success against the L2 norm, found by bisection"
    )
    confidence: schema.NonNegativeFloat = Field(0.0, description="cw: by how much, in logits, the class is to lead")
    random_start: bool = Field(True, description="pgd: start from a random point within eps")
    survive: tuple[str, ...] = Field(
        (),
        description="changes that the attack is optimized through and evaluated after: jpegQ with a quality Q, such as "
        "jpeg75, resize, crop",
    )
    then: Literal["saliency"] | None = Field(
        None, description="saliency: also compute saliency maps before and after the attack"
    )

    @field_validator("survive")
    @classmethod
    def _known_changes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(CHANGE, name):
                raise ValueError(f"unknown change {name!r}; use resize, crop, or jpeg with a quality, such as jpeg75")
        if len(set(names)) < len(names):
            raise ValueError("a change is named twice")
        return names

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> "AttackConfig":
        if self.eps is not None and self.method not in ("fgsm", "pgd"):
            raise ValueError(f"eps has no effect with method {self.method}; use method fgsm or pgd")
        if self.survive and self.method in ("deepfool", "cw"):
            raise ValueError(f"survive has no effect with method {self.method}; use method l2, fgsm or pgd")
        return self

    @property
    def bound(self) -> float:
        """The largest change of a pixel, in [0, 1]."""
        return (self.eps if self.eps is not None else DEFAULT_EPS) / 255


class PhotoSetConfig(PhotoConfig):
    """The keys of attacks that find one perturbation or patch for many photos."""

    target: ClassName | None = Field(None, description="target class; null: any class but the predicted ones")
    held_out: Annotated[float, Gt(0), Lt(1)] = Field(
        0.25, description="share of the photos that is only evaluated, chosen at random"
    )
    steps: Annotated[schema.PositiveInt, Le(1_000_000)] = Field(500, description="optimization steps")
    batch_size: schema.PositiveInt = Field(8, description="photos of a step")


class UniversalConfig(PhotoSetConfig):
    """Configuration of a universal perturbation."""

    eps: Annotated[float, Ge(0.5), Le(127)] = Field(10.0, description="largest change of a pixel, in 1/255")
    alpha: Annotated[float, Gt(0), Le(255)] = Field(1.0, description="first step size, in 1/255; it falls to 0")


class PatchConfig(PhotoSetConfig):
    """Configuration of a printable patch."""

    target: ClassName = Field("toaster", description="class that the patch is to be taken for")
    lr: schema.PositiveFloat = Field(0.2, description="first learning rate of Adam, which falls to 0")
    min_scale: Annotated[float, Gt(0), Le(1)] = Field(
        0.3, description="smallest side of the patch, in parts of the photo"
    )
    max_scale: Annotated[float, Gt(0), Le(1)] = Field(
        0.5, description="largest side of the patch, in parts of the photo"
    )
    rotate_degrees: Annotated[schema.NonNegativeFloat, Le(180)] = Field(30.0, description="rotate by up to N degrees")
    placements: Annotated[schema.PositiveInt, Le(1000)] = Field(
        4, description="random placements in each photo that success is measured on"
    )
    size_mm: Annotated[float, Ge(5), Le(1000)] = Field(80.0, description="diameter of the printed patch")
    dpi: Annotated[schema.PositiveInt, Ge(30), Le(1200)] = Field(300, description="printed pixels per inch")

    @model_validator(mode="after")
    def _fits(self) -> "PatchConfig":
        if self.min_scale > self.max_scale:
            raise ValueError("min_scale is larger than max_scale")
        if self.width_px > MAX_PATCH_PX:
            raise ValueError(f"{self.size_mm:g} mm at {self.dpi} dpi are more than {MAX_PATCH_PX} pixels; lower dpi")
        return self

    @property
    def width_px(self) -> int:
        """Side of the saved patch in pixels."""
        return round(self.size_mm / MM_PER_INCH * self.dpi)


class RobustnessConfig(RunConfig):
    """Configuration of a measurement of robustness: trained classifiers, attacks on them, corruptions."""

    models: Annotated[tuple[str, ...], Len(1, 8)] = Field(
        description="training runs of classifiers; of several, examples against each are also tried on the others"
    )
    on: Literal["train", "val", "test"] = Field("test", description="split of the data that the runs were trained on")
    weights: Literal["last", "best"] = Field("last", description="checkpoint of the runs")
    num_images: schema.PositiveInt = Field(1000, description="number of images, the first ones of the split")
    methods: tuple[Method, ...] = Field(
        ("fgsm", "pgd"), description="attacks, all untargeted and within an L-infinity bound; square needs no gradients"
    )
    eps: Annotated[tuple[Annotated[float, Ge(0), Le(255)], ...], Len(1, 20)] = Field(
        (0.0, 1.0, 2.0, 4.0, 8.0), description="largest changes of a pixel, in 1/255"
    )
    steps: Annotated[schema.PositiveInt, Le(10_000)] = Field(20, description="pgd, apgd: steps from each start")
    restarts: Annotated[schema.PositiveInt, Le(100)] = Field(
        1, description="pgd, apgd: starts; the first one of pgd is the example of fgsm, the others are random"
    )
    alpha: Annotated[float, Gt(0), Le(255)] | None = Field(
        None, description="pgd: step size, in 1/255; null: 2.5 eps / steps"
    )
    queries: Annotated[int, Ge(2), Le(100_000)] = Field(1000, description="square: evaluations of each image")
    corruptions: tuple[Corruption, ...] = Field(
        (), description="corruptions at severities 1 to 5 to measure the accuracy under"
    )
    batch_size: schema.PositiveInt = Field(250, description="images that are attacked at a time")
    precision: Literal["float32"] = Field("float32", description="of the attacks and of the classifiers")

    @field_validator("models")
    @classmethod
    def _known(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        paths = tuple(run_classifier.resolve_model(name, runs_root()) for name in models)
        for name, path in zip(models, paths, strict=True):
            if not run_classifier.is_run_of_classifier(path):
                raise ValueError(f"{name} is a pretrained network; the robustness of training runs is measured")
        if len(set(paths)) < len(paths):
            raise ValueError("a run is named twice")
        return paths

    @model_validator(mode="after")
    def _measures_something(self) -> "RobustnessConfig":
        if not self.methods and not self.corruptions:
            raise ValueError("neither methods nor corruptions are given")
        return self

    @property
    def bounds(self) -> list[float]:
        """The L-infinity bounds above 0, in 1/255, ascending."""
        return sorted({eps for eps in self.eps if eps > 0})
