"""From what a file says to its experiment's frozen configuration, and what is wrong with it; no places, no files."""

import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from cvlab import registry
from cvlab.config import expectations, messages
from cvlab.config.metrics import Metric
from cvlab.config.schema import ComponentConfig, ExperimentConfig, FrozenModel, component_type, registries_of
from cvlab.config.strict_yaml import Path_
from cvlab.errors import ConfigError, CvlabError

Problems = list[tuple[Path_, str]]


def check(raw: Mapping[str, Any], base: Path) -> tuple[ExperimentConfig | None, Problems]:
    """Validate one configuration, its user files relative to `base`; None where there are problems."""
    config_type, wrong = _config_type(raw, base)
    config = None
    try:
        if config_type is not None:
            config = typing.cast("ExperimentConfig", config_type.model_validate(raw))
    except ValidationError as error:
        named = {path[:1] for path, _ in wrong}
        found = messages.problems(error, config_type or FrozenModel, raw)
        wrong += [(path, message) for path, message in found if path[:1] not in named]
    if config is not None and not wrong:
        wrong = registry.get_experiment(config.experiment).problems(config, base)
    return (None if wrong else config), wrong


def unknown_metrics(config: ExperimentConfig, known: Sequence[Metric]) -> Problems:
    """Return the expectations of a run on metrics that are not among those that are known."""
    wrong: Problems = []
    for path, rule in rules_of(config):
        for term in rule.terms:
            if term.function:
                wrong.append((path, f"{term.text!r} speaks of a sweep's arms; a run has metrics only"))
            elif term.metric and not is_known(term.metric, known):
                wrong.append((path, unknown_metric(term.text, term.metric, known)))
    return wrong


def is_known(name: str, metrics: Iterable[Metric]) -> bool:
    """Return whether one of `metrics` has this name."""
    return any(metric.matches(name) for metric in metrics)


def rules_of(config: ExperimentConfig) -> list[tuple[Path_, expectations.Rule]]:
    """Return all expectations with their places."""
    keys = ("expect", "expect_fallback")
    return [((key, k), expectations.parse(text)) for key in keys for k, text in enumerate(getattr(config, key))]


def unknown_metric(text: str, metric: str, known: Iterable[Metric]) -> str:
    """Return the message for a metric that is not known: the closest name, or all names."""
    names = sorted({other.name for other in known})
    close = registry.closest_match(metric, names)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(names)}"
    return f"{text!r}: no metric {metric!r}; {hint}"


def _config_type(raw: Mapping[str, Any], base: Path) -> tuple[type[FrozenModel] | None, Problems]:
    """Find the experiment's schema and put the schema of each named block into it; report unknown names."""
    name = raw.get("experiment")
    if not isinstance(name, str):
        known = ", ".join(registry.experiment_names())
        return None, [(("experiment",), f"missing key 'experiment'; known: {known}")]
    try:
        config_type: type[FrozenModel] = registry.get_experiment(name).Config
    except ConfigError as error:
        return None, [(("experiment",), str(error))]
    fields: dict[str, Any] = {}
    wrong: Problems = []
    for key, table in registries_of(config_type).items():
        info = config_type.model_fields[key]
        block = raw.get(key)
        chosen = block.get("name") if isinstance(block, Mapping) else getattr(info.default, "name", None)
        if not isinstance(chosen, str):
            if isinstance(block, Mapping):
                wrong.append(((key, "name"), f"{key}.name: give one of {', '.join(sorted(table.names))}"))
            continue
        try:
            made = component_type(table, chosen, table.find(chosen, base))
        except CvlabError as error:
            wrong.append(((key, "name"), str(error)))
            continue
        fields[key] = (made, ... if info.is_required() else _default(made))
    return create_model(config_type.__name__, __base__=config_type, __doc__=config_type.__doc__, **fields), wrong


def _default(made: type[ComponentConfig]) -> Any:
    """Build a block from its defaults, or say that it must be given where a key of it has none."""
    required = any(field.is_required() for field in made.model_fields.values())
    return ... if required else made(name=made.model_fields["name"].default)
