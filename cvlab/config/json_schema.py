"""A JSON schema of all configurations, for editors."""

from pathlib import Path
from typing import Any

from cvlab import registry
from cvlab.config.schema import Registry, registries_of


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema of every configuration, for editors: one branch per experiment, one with a base."""
    branches: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for name in registry.experiment_names():
        config_type = registry.get_experiment(name).Config
        schema = config_type.model_json_schema()
        schema["properties"]["experiment"] = {"const": name}
        for key, table in registries_of(config_type).items():
            options = [_block_schema(table, known) for known in table.names]
            schema["properties"][key] = {"anyOf": [*options, {"properties": {"name": {"pattern": "[:]"}}}]}
        definitions |= schema.pop("$defs", {})
        branches.append(schema)
    inherits = {"type": "string", "description": "a shipped configuration or a file, over which the keys are merged"}
    branches.append({"type": "object", "properties": {"base": inherits}, "required": ["base"]})
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "cvlab configuration"}
    return {**head, "$defs": definitions, "anyOf": branches}


def _block_schema(table: Registry, name: str) -> dict[str, Any]:
    schema = table.schema(name, Path()).model_json_schema()
    schema["required"] = sorted({*schema.get("required", []), "name"})
    return schema
