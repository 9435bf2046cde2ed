"""Base classes of configurations, and components `{name: ..., ...}` whose keys are the parameters of a builder."""

import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator
from typing_extensions import Self

from cvlab.config import expectations, signatures
from cvlab.config.signatures import Signature
from cvlab.errors import ConfigError
from cvlab.registry import unknown_name_error

PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
FractionBelowOne = Annotated[float, Ge(0), Lt(1)]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
RESERVED = ("name", "builder_arguments")  # keys of a block that cannot be parameters of its builder
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class FrozenModel(BaseModel):
    """A frozen block of configuration; unknown keys are rejected and types are not converted."""

    model_config = STRICT


class ComponentConfig(FrozenModel):
    """A component by name; the other keys are the parameters of its builder."""

    name: str

    def builder_arguments(self) -> dict[str, Any]:
        """Return all keys except the name, with defaults: the arguments of the builder."""
        declared = {key: getattr(self, key) for key in type(self).model_fields if key != "name"}
        return declared | (self.model_extra or {})


class OpenComponentConfig(ComponentConfig, extra="allow"):
    """A component whose builder takes arbitrary keys (`**kwargs`)."""


@dataclass(frozen=True)
class Registry:
    """Annotation of a `ComponentConfig` field: where its names come from.

    Attributes:
        kind: What the components are called in error messages.
        names: `module:Name` of each builder.
        injected: Parameters of the builders that the program passes; all others come from the YAML.
        resolve: Returns the builder of a name that is not in `names`, with user files relative to `base`.
    """

    kind: str
    names: Mapping[str, str]
    injected: frozenset[str] = frozenset()
    resolve: Callable[[str, Path], Callable[..., Any]] | None = None

    def schema(self, name: str, base: Path) -> type[ComponentConfig]:
        """Return the schema of the component called `name`; a user's file is relative to `base`.

        Raises:
            ConfigError: if there is none, with the closest name.
        """
        if name in self.names:
            return _registered_type(self.kind, name, self.names[name], self.injected)
        if self.resolve is None:
            raise unknown_name_error(self.kind, name, self.names)
        return component_type(self.kind, name, signatures.of_builder(self.resolve(name, base), self.injected))


@functools.cache  # pydantic takes milliseconds to build a schema, and a sweep validates every trial
def _registered_type(kind: str, name: str, target: str, injected: frozenset[str]) -> type[ComponentConfig]:
    return component_type(kind, name, signatures.of_target(target, injected))


def component_type(kind: str, name: str, signature: Signature) -> type[ComponentConfig]:
    """Return the schema of a component, made from the annotations and defaults of its builder's parameters.

    Raises:
        ConfigError: if a parameter has a name that a block cannot have.
    """
    base: type[ComponentConfig] = ComponentConfig
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for parameter in signature.parameters:
        if parameter.name in RESERVED or parameter.name.startswith(("_", "model_")):
            raise ConfigError(
                f"{kind} {name}: it has a parameter {parameter.name!r}", "the name is reserved; rename it"
            )
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            base = OpenComponentConfig
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names such as `copy`, which hide methods of pydantic that are not used
        return create_model(f"{kind}_{name}", __base__=base, __doc__=signature.summary, **fields)


def expand_names(config_type: type[BaseModel], raw: dict[str, Any]) -> None:
    """Replace `key: NAME` by `key: {name: NAME}`, in place, where a schema has a block with a name."""
    for key, info in config_type.model_fields.items():
        has_name = isinstance(info.annotation, type) and issubclass(info.annotation, (ComponentConfig, DataConfig))
        if has_name and isinstance(raw.get(key), str):
            raw[key] = {"name": raw[key]}


def registries_of(config_type: type[BaseModel]) -> dict[str, Registry]:
    """Return the fields of a schema that are components, with their registries."""
    fields = config_type.model_fields.items()
    return {key: marker for key, info in fields for marker in info.metadata if isinstance(marker, Registry)}


class Duration(FrozenModel):
    """How long to train: exactly one of steps, epochs, seconds."""

    steps: PositiveInt | None = Field(None, description="number of optimizer steps")
    epochs: PositiveInt | None = Field(None, description="number of epochs")
    seconds: PositiveFloat | None = Field(
        None, description="seconds of training; how many steps fit is estimated during training"
    )
    plan_history: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        (), description="recorded by cvlab for a run of `seconds`: until which step how many steps were planned"
    )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps; 0 for a budget of seconds, whose steps are not known in advance."""
        return self.steps or (self.epochs or 0) * steps_per_epoch

    @model_validator(mode="after")
    def _exactly_one(self) -> "Duration":
        units = [key for key in ("steps", "epochs", "seconds") if getattr(self, key) is not None]
        if len(units) != 1:
            raise ValueError(f"give exactly one of steps, epochs, seconds; given: {', '.join(units) or 'none'}")
        until = [0, *(step for step, _ in self.plan_history), self.steps or 0]
        possible = all(step < total for step, total in self.plan_history) and until == sorted(set(until))
        if self.plan_history and not possible:
            raise ValueError("plan_history requires steps; it must increase and stay below the planned number")
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
    """The keys of every experiment's `data` block."""

    name: str = Field(description="a data set of `cvlab data list`, or ./file.py:function that returns it")
    fallback: str | None = Field(None, description="the built-in data set to use if this one cannot be fetched quickly")
    fallback_for: str | None = Field(None, description="set by cvlab: the data set that the fallback replaces")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all data sets that the block asks for."""
        return (self.name,)

    def on_fallback(self) -> Self:
        """Return the block with its fallback instead of what it asks for."""
        replaced = " + ".join(self.names)
        return self.model_copy(update={"name": self.fallback, "fallback": None, "fallback_for": replaced})


class ExperimentConfig(FrozenModel):
    """The keys of every configuration."""

    experiment: str = Field(description="the experiment; `cvlab experiments` lists them")
    name: Annotated[str, AfterValidator(_check_name)] = Field("run", description="becomes part of the run directory")
    expect: tuple[Expectation, ...] = Field(
        (), description="rules that are checked at the end; exit code 3 if one is not met"
    )
    expect_fallback: tuple[Expectation, ...] = Field((), description="the same for a run on the fallback data set")

    def data_config(self) -> DataConfig | None:
        """Return the block that names the data set, or None."""
        return getattr(self, "data", None)

    def with_data(self, data: DataConfig) -> Self:
        """Return the configuration with other data."""
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, from which it can be loaded again."""
        return yaml.safe_dump(_plain(self.model_dump()), sort_keys=False, default_flow_style=None, width=110)

    def digest(self) -> str:
        """Return the SHA-256 of the resolved configuration."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


class NestedConfig(ExperimentConfig):
    """The keys of every experiment that runs another configuration."""

    base: dict[str, Any] = Field(description="an ordinary configuration; `from:` names one to inherit from")

    @property
    def data(self) -> DataConfig | None:
        """The data block of the base, with the keys that every experiment has."""
        block = self.base.get("data")
        if not isinstance(block, Mapping):
            return None
        return DataConfig(**{key: block[key] for key in DataConfig.model_fields if key in block})

    def with_data(self, data: DataConfig) -> Self:
        """Return the configuration with other data."""
        return self.model_copy(update={"base": {**self.base, "data": {**self.base["data"], **data.model_dump()}}})


class RunConfig(ExperimentConfig):
    """The keys of every experiment that computes something itself."""

    seed: Annotated[int, Ge(0), Lt(2**31)] = Field(0, description="of initialization, data order and augmentation")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?|mps)$", description="auto: cuda if available, else cpu"
    )
    threads: Threads | None = Field(None, description="number of CPU threads; null: torch's default")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="auto: bfloat16 if the device is fast at it, else float32"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
