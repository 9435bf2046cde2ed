"""Turn pydantic's validation errors into one line each: the key, what was expected, what was given."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from cvlab import registry
from cvlab.config.strict_yaml import KeyPath

BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a block of keys",
}


def validation_problems(
    error: ValidationError, config_type: type[BaseModel], raw: Mapping[str, Any]
) -> list[tuple[KeyPath, str]]:
    """Return (path, message) for every invalid value, each path once, in the order of the schema."""
    schema = config_type.model_json_schema()
    by_path: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        path = _real_path(item["loc"], raw)
        if item["type"] == "too_short" and any(other[: len(path)] == path for other in by_path):
            continue  # pydantic does not count invalid items, which have a message each
        if item["type"] == "missing" and isinstance(item["loc"][-1], str):
            path = (*path, item["loc"][-1])
            message = f"missing key {_dotted(path)!r} ({describe(_at(schema, path), schema)})"
        elif item["type"] == "extra_forbidden":
            message = _unknown_key(path, _at(schema, path[:-1]), schema)
        elif item["type"] in ("value_error", "assertion_error"):
            message = f"{_dotted(path)}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
        else:
            value = format_value(_value(raw, path))
            message = f"{_dotted(path)}: expected {describe(_at(schema, path), schema)}, got {value}"
        by_path.setdefault(path, message)
    return list(by_path.items())


def _real_path(loc: tuple[str | int, ...], raw: Any) -> KeyPath:
    """Remove the branches of unions, which pydantic adds to a location besides keys and indices."""
    path: list[str | int] = []
    for part in loc:
        in_list = isinstance(raw, tuple) and isinstance(part, int) and part < len(raw)
        if in_list or (isinstance(raw, Mapping) and part in raw):
            raw = raw[part]
            path.append(part)
    return tuple(path)


def _value(raw: Any, path: KeyPath) -> Any:
    for part in path:
        raw = raw[part]
    return raw


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _unknown_key(path: KeyPath, block: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    known = [key for branch in _branches(block, schema) for key in branch.get("properties", {})]
    close = registry.closest_match(str(path[-1]), known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(known))}"
    return f"unknown key {_dotted(path)!r}; {hint}"


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in node:
        definition: Mapping[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return definition
    return node


def _branches(node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the branches of a union, or the node itself."""
    node = _resolve(node, schema)
    branches = node.get("anyOf") or node.get("oneOf")
    return [_resolve(branch, schema) for branch in branches] if branches else [node]


def _at(schema: Mapping[str, Any], path: KeyPath) -> Mapping[str, Any]:
    """Return the JSON schema of the value at `path`."""
    node = _resolve(schema, schema)
    for part in path:
        keywords = ("items", "prefixItems") if isinstance(part, int) else ("properties", "additionalProperties")
        node = next((branch for branch in _branches(node, schema) if any(key in branch for key in keywords)), node)
        if isinstance(part, int):
            prefix = node.get("prefixItems", ())
            node = prefix[part] if part < len(prefix) else node.get("items", {})
        else:
            additional = node.get("additionalProperties")  # of a block with arbitrary keys
            node = node.get("properties", {}).get(part, additional if isinstance(additional, Mapping) else {})
        node = _resolve(node, schema)
    return node


def describe(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Describe in words what a JSON schema allows."""
    node = _resolve(node, schema)
    if "anyOf" in node or "oneOf" in node:
        return " or ".join(describe(branch, schema) for branch in _branches(node, schema))
    if "enum" in node or "const" in node:
        return " | ".join(map(str, node.get("enum", [node.get("const")])))
    if "pattern" in node:
        return f"text of the form {node['pattern']}"
    if node.get("type") == "array":
        if "prefixItems" in node:
            return "[" + ", ".join(describe(item, schema) for item in node["prefixItems"]) + "]"
        return f"a list, each {describe(node['items'], schema)}" if node.get("items") else "a list"
    bounds = " and ".join(f"{sign} {format_value(node[key])}" for key, sign in BOUNDS.items() if key in node)
    noun = NOUNS.get(str(node.get("type")), "a value")
    return f"{noun} {bounds}".rstrip()


def format_value(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    if isinstance(value, float):
        return f"{value:g}"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
