"""Configuration of adversarial attacks on photos."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from cvlab.config import schema
from cvlab.experiments.common.photo_config import ClassName, PhotoConfig

JPEG_QUALITIES = (95, 85, 75)
DEFAULT_EPS = 8.0  # in 1/255


class AttackConfig(PhotoConfig):
    """Configuration of an attack: the photos, the target class, the method."""

    target: ClassName | None = Field(None, description="target class; null: any class but the predicted one")
    method: Literal["l2", "fgsm", "pgd"] = Field(
        "l2",
        description="gradient steps of a fixed L2 norm, or one step (fgsm) or many (pgd) within an L-infinity bound",
    )
    size: Literal["original", "model"] = Field(
        "original", description="attack the photo at its own resolution, or reduced to the size of the model's input"
    )
    steps: Annotated[schema.PositiveInt, Le(10_000)] = Field(100, description="l2, pgd: maximum number of steps")
    extra_steps: schema.NonNegativeInt = Field(3, description="further steps after the first success, for robustness")
    lr: schema.PositiveFloat = Field(0.5, description="l2: L2 norm of a step, of the model's input in [0, 1]")
    eps: Annotated[float, Ge(0.5), Le(255)] | None = Field(
        None,
        description="fgsm, pgd: maximum change of a pixel, in 1/255; less than 0.5 would be lost in an 8-bit file; "
        f"null: {DEFAULT_EPS:g}",
    )
    alpha: Annotated[float, Gt(0), Le(255)] = Field(1.0, description="pgd: step size, in 1/255")
    random_start: bool = Field(True, description="pgd: start from a random point within eps")
    then: Literal["saliency"] | None = Field(
        None, description="saliency: also compute saliency maps before and after the attack"
    )

    @model_validator(mode="after")
    def _eps_has_a_use(self) -> "AttackConfig":
        if self.eps is not None and self.method == "l2":
            raise ValueError("eps has no effect with method l2; use method fgsm or pgd")
        return self

    @property
    def bound(self) -> float:
        """The largest change of a pixel, in [0, 1]."""
        return (self.eps if self.eps is not None else DEFAULT_EPS) / 255
