"""Pydantic bases that experiments share, and blocks `{name: ..., ...}` whose keys are a builder's own parameters."""

import functools
import hashlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator
from typing_extensions import Self

from cvlab import registry
from cvlab.config import expectations

PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
FractionBelowOne = Annotated[float, Ge(0), Lt(1)]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class FrozenModel(BaseModel):
    """A block of configuration: unknown keys are refused, types are not converted, nothing changes afterwards."""

    model_config = STRICT


class ComponentConfig(FrozenModel):
    """A block with a name from a table; the other keys are the parameters of the builder of that name."""

    name: str

    def arguments(self) -> dict[str, Any]:
        """Return every key but the name, defaults filled in."""
        known = {key: getattr(self, key) for key in type(self).model_fields if key != "name"}
        return known | (self.model_extra or {})


class OpenComponentConfig(ComponentConfig, extra="allow"):
    """A block whose builder takes further keys that we do not know (`**kwargs`)."""


@dataclass(frozen=True)
class Registry:
    """Marks a `Part` field: where its names come from.

    The builder's parameters called in `supplied` come from the program, all others from the YAML. `resolve(name,
    base)` looks up what the plain table of names does not hold, with user files relative to `base`.
    """

    kind: str
    names: Mapping[str, str]
    supplied: frozenset[str] = frozenset()
    resolve: Callable[[str, Path], Callable[..., Any]] | None = None

    def find(self, name: str, base: Path) -> Callable[..., Any]:
        """Return the builder called `name`; ConfigError with the nearest name otherwise."""
        if self.resolve is not None and name not in self.names:
            return self.resolve(name, base)
        return typing.cast("Callable[..., Any]", registry.get(self.kind, name, self.names))


def component_type(table: Registry, name: str, builder: Callable[..., Any]) -> type[ComponentConfig]:
    """Make the schema of one block from a builder's signature: annotations are types, defaults are defaults."""
    described = builder.func if isinstance(builder, functools.partial) else builder
    annotated = described.__init__ if inspect.isclass(described) else described
    hints = typing.get_type_hints(annotated, include_extras=True)
    base: type[ComponentConfig] = ComponentConfig
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            base = OpenComponentConfig
        elif parameter.name not in table.supplied and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (hints.get(parameter.name, Any), default)
    summary = (inspect.getdoc(described) or "").partition("\n")[0]
    return create_model(f"{table.kind}_{name}", __base__=base, __doc__=summary, **fields)


def registries_of(config_type: type[BaseModel]) -> dict[str, Registry]:
    """Return the fields of a schema that are blocks with a name, with their tables."""
    fields = config_type.model_fields.items()
    return {key: marker for key, info in fields for marker in info.metadata if isinstance(marker, Registry)}


class Duration(FrozenModel):
    """How long to train: exactly one of the three."""

    steps: PositiveInt | None = Field(None, description="number of optimizer steps")
    epochs: PositiveInt | None = Field(None, description="passes over the training images")
    seconds: PositiveFloat | None = Field(
        None, description="wall-clock seconds of training, planned as steps on the way"
    )
    plan_history: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        (), description="recorded by cvlab for a run of `seconds`: until which step how many steps were planned"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "Duration":
        given = [key for key in ("steps", "epochs", "seconds") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, epochs, seconds; given: {', '.join(given) or 'none'}")
        until = [0, *(step for step, _ in self.plan_history), self.steps or 0]
        possible = all(step < total for step, total in self.plan_history) and until == sorted(set(until))
        if self.plan_history and not possible:
            raise ValueError("plan_history goes with steps, rises, and lies below what was planned")
        return self


def _check_rule(text: str) -> str:
    expectations.parse(text)
    return text


Expectation = Annotated[str, AfterValidator(_check_rule)]


def _check_name(name: str) -> str:
    plain = all(character.isalnum() or character in "-_." for character in name)
    if not name or len(name) > 60 or len(name.encode()) > 200 or not plain or name[0] in ".-":
        raise ValueError("a run's name has letters, digits, '-', '_', '.' only, at most 60, and starts with a letter")
    return name


Threads = Annotated[int, Ge(1), Le(256)]


class DataConfig(FrozenModel):
    """Which data: the keys of every experiment's `data` block."""

    name: str = Field(description="a data set of `cvlab data list`, or ./file.py:function that returns it")
    fallback: str | None = Field(None, description="the built-in data set to use if this one cannot be fetched quickly")
    fallback_for: str | None = Field(None, description="set by cvlab: the data set that the fallback replaces")


class ExperimentConfig(FrozenModel):
    """The keys of everything that can be run."""

    experiment: str = Field(description="the kind of job; `cvlab experiments` lists them")
    name: Annotated[str, AfterValidator(_check_name)] = Field("run", description="becomes part of the run directory")
    expect: tuple[Expectation, ...] = Field((), description="what must hold at the end, else exit code 3")
    expect_fallback: tuple[Expectation, ...] = Field((), description="the same for a run on the fallback data set")

    def data_config(self) -> DataConfig | None:
        """Return the block that names the data set, or None."""
        return getattr(self, "data", None)

    def with_data(self, data: DataConfig) -> Self:
        """Return the configuration with other data."""
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """Write the configuration as YAML, fully resolved; reading it gives the same configuration."""
        return yaml.safe_dump(_plain(self.model_dump()), sort_keys=False, default_flow_style=None, width=110)

    def digest(self) -> str:
        """Return the SHA-256 of the resolved configuration."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


class RunConfig(ExperimentConfig):
    """The keys that every experiment has which computes something itself."""

    seed: Annotated[int, Ge(0), Lt(2**31)] = Field(0, description="of initialization, data order and augmentation")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?|mps)$", description="auto: cuda if there, else cpu"
    )
    threads: Threads | None = Field(None, description="CPU threads; null: as many as torch takes by itself")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="auto: bfloat16 where the device computes it fast, else float32"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
