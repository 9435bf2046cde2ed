"""Validate a raw configuration against the schema of its experiment; problems have paths, not yet lines."""

import functools
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from cvlab import registry
from cvlab.config import expectations, messages
from cvlab.config.metrics import Metric
from cvlab.config.schema import ComponentConfig, ExperimentConfig, FrozenModel, expand_names, registries_of
from cvlab.config.strict_yaml import KeyPath
from cvlab.errors import ConfigError, CvlabError

Problems = list[tuple[KeyPath, str]]


def check(raw: dict[str, Any], base: Path) -> tuple[ExperimentConfig | None, Problems]:
    """Validate one configuration.

    Args:
        raw: The configuration as it was read; blocks that are given by name alone are replaced in place.
        base: The folder that the paths of user files are relative to.

    Returns:
        The configuration, None if there are problems, and the problems.
    """
    config_type, problems = _config_type(raw, base)
    config = None
    try:
        if config_type is not None:
            config = typing.cast("ExperimentConfig", config_type.model_validate(raw))
    except ValidationError as error:
        reported = {path[:1] for path, _ in problems}
        invalid = messages.validation_problems(error, config_type or FrozenModel, raw)
        problems += [(path, message) for path, message in invalid if path[:1] not in reported]
    if config is not None and not problems:
        problems = registry.get_experiment(config.experiment).problems(config, base)
    return (None if problems else config), problems


def unknown_metrics(config: ExperimentConfig, known: Sequence[Metric]) -> Problems:
    """Return the expectations of a run on metrics that it does not report."""
    problems: Problems = []
    for path, rule in rules_of(config):
        for term in rule.terms:
            if term.function:
                problems.append((path, f"{term.text!r} is a function over a sweep; a run has metrics only"))
            elif term.metric and not is_known(term.metric, known):
                problems.append((path, unknown_metric(term.text, term.metric, known)))
    return problems


def is_known(name: str, metrics: Iterable[Metric]) -> bool:
    """Return whether one of `metrics` has this name."""
    return any(metric.matches(name) for metric in metrics)


def rules_of(config: ExperimentConfig) -> list[tuple[KeyPath, expectations.Rule]]:
    """Return all expectations with their paths."""
    keys = ("expect", "expect_fallback")
    return [((key, k), expectations.parse(text)) for key in keys for k, text in enumerate(getattr(config, key))]


def unknown_metric(text: str, metric: str, known: Iterable[Metric]) -> str:
    """Return the message for a metric that is not known: the closest name, or all names."""
    names = sorted({other.name for other in known})
    close = registry.closest_match(metric, names)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(names)}"
    return f"{text!r}: no metric {metric!r}; {hint}"


def _config_type(raw: dict[str, Any], base: Path) -> tuple[type[FrozenModel] | None, Problems]:
    """Return the experiment's schema with the schema of each named component, and the names that are unknown."""
    name = raw.get("experiment")
    if not isinstance(name, str):
        known = ", ".join(registry.experiment_names())
        return None, [(("experiment",), f"missing key 'experiment'; known: {known}")]
    try:
        config_type: type[FrozenModel] = registry.get_experiment(name).Config
    except ConfigError as error:
        return None, [(("experiment",), str(error))]
    expand_names(config_type, raw)
    chosen_types: dict[str, type[ComponentConfig]] = {}
    problems: Problems = []
    for key, components in registries_of(config_type).items():
        info = config_type.model_fields[key]
        block = raw.get(key)
        chosen = block.get("name") if isinstance(block, Mapping) else getattr(info.default, "name", None)
        if not isinstance(chosen, str):
            if isinstance(block, Mapping):
                problems.append(((key, "name"), f"{key}.name: give one of {', '.join(sorted(components.names))}"))
            continue
        try:
            chosen_types[key] = components.schema(chosen, base)
        except CvlabError as error:
            problems.append(((key, "name"), str(error)))
    return _with_components(config_type, tuple(chosen_types.items())), problems


@functools.lru_cache(maxsize=256)  # building a schema takes pydantic longer than all the rest of a validation
def _with_components(
    config_type: type[FrozenModel], chosen_types: tuple[tuple[str, type[ComponentConfig]], ...]
) -> type[FrozenModel]:
    """Return the schema of an experiment with the schemas of its components."""
    fields: dict[str, Any] = {
        key: (component, ... if config_type.model_fields[key].is_required() else _default(component))
        for key, component in chosen_types
    }
    return create_model(config_type.__name__, __base__=config_type, __doc__=config_type.__doc__, **fields)


def _default(component: type[ComponentConfig]) -> Any:
    """Return a component with default arguments; `...` (required) if one of its keys has no default."""
    is_required = any(field.is_required() for field in component.model_fields.values())
    return ... if is_required else component(name=component.model_fields["name"].default)
