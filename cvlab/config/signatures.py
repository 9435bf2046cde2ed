"""Signatures of builders, whose parameters are the keys of a block `{name: ..., ...}` in a configuration.

Importing a builder imports torch, which takes longer than everything else that validates a configuration. So unless its
module has been imported already, the signature is read from the source: a function with the same parameters and an
empty body is compiled, and only the imports and constants that its annotations and defaults mention are executed.
"""

import ast
import builtins
import copy
import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cvlab import registry
from cvlab.errors import ConfigError

FunctionNode = ast.FunctionDef


@dataclass(frozen=True)
class Signature:
    """The parameters of a builder.

    Attributes:
        parameters: With evaluated annotations (`Any` if there is none).
        summary: The first line of the docstring.
    """

    parameters: tuple[inspect.Parameter, ...]
    summary: str


def of_builder(builder: Callable[..., Any], ignored: Collection[str] = ()) -> Signature:
    """Return the signature of a function or class without the parameters in `ignored`.

    Parameters whose default cannot be written in YAML, such as a class, are left out: they keep it. Any value is
    accepted where an annotation cannot be evaluated, or has no meaning in YAML.

    Raises:
        ConfigError: if the builder has no signature.
    """
    described = builder.func if isinstance(builder, functools.partial) else builder
    annotated = inspect.unwrap(described.__init__ if inspect.isclass(described) else described)
    try:
        parameters = list(inspect.signature(builder).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{getattr(described, '__name__', described)}: {error}", "name a function or a class"
        ) from error
    namespace = getattr(annotated, "__globals__", {})
    return Signature(
        tuple(
            p.replace(annotation=_annotation(p, namespace))
            for p in parameters
            if p.name not in ignored and (p.default is inspect.Parameter.empty or _is_plain(p.default))
        ),
        (inspect.getdoc(described) or "").partition("\n")[0],
    )


def _is_plain(value: Any) -> bool:
    """Return whether a value can be written in YAML."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _annotation(parameter: inspect.Parameter, namespace: dict[str, Any]) -> Any:
    """Return the evaluated annotation of a parameter; `Any` if there is none that a value can be checked with."""
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    stub = type("Annotations", (), {"__annotations__": {"value": parameter.annotation}})
    try:
        annotation = typing.get_type_hints(stub, namespace, include_extras=True)["value"]
        TypeAdapter(annotation)
    except Exception:  # of the user's annotation: a name for type checkers only, a class that pydantic does not know
        return Any
    return annotation | None if parameter.default is None else annotation


def of_target(target: str, ignored: Collection[str] = ()) -> Signature:
    """Return the signature of `module:Name` without the parameters in `ignored`, if possible without importing it."""
    module, _, name = target.partition(":")
    if module not in sys.modules:
        signature = _read(module, name, ignored)
        if signature is not None:
            return signature
    return of_builder(registry.import_name(target), ignored)


def _read(module: str, name: str, ignored: Collection[str]) -> Signature | None:
    """Read a signature from the source; None if that takes more than its imports and constants."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    statements = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    node = next((s for s in statements if isinstance(s, (FunctionNode, ast.ClassDef)) and s.name == name), None)
    if node is None:
        return None
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if isinstance(node, ast.ClassDef):
        node = next((s for s in node.body if isinstance(s, FunctionNode) and s.name == "__init__"), None)
        ignored = {*ignored, "self"}
    if node is None or node.decorator_list:
        return None
    _clear_ignored(node.args, ignored)
    node.name, node.body, node.returns = "stub", [ast.Pass()], None
    namespace: dict[str, Any] = {"__name__": module}
    try:
        _define_names(node, statements, namespace)
    except LookupError:
        return None
    _execute(node, namespace)
    return Signature(of_builder(namespace["stub"], ignored).parameters, summary)


def _clear_ignored(arguments: ast.arguments, ignored: Collection[str]) -> None:
    """Remove the annotations and defaults of the parameters in `ignored`, which may need torch."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for k, argument in enumerate(positional):
        if argument.arg in ignored:
            argument.annotation = None
            if k >= first_default:
                arguments.defaults[k - first_default] = ast.Constant(None)
    for k, argument in enumerate(arguments.kwonlyargs):
        if argument.arg in ignored:
            argument.annotation = None
            arguments.kw_defaults[k] = arguments.kw_defaults[k] and ast.Constant(None)


def _define_names(node: ast.AST, statements: list[ast.stmt], namespace: dict[str, Any]) -> None:
    """Execute the imports and assignments that define what `node` mentions. LookupError if something else does."""
    for name in {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}:
        if name in namespace or hasattr(builtins, name):
            continue
        definition = next((s for s in statements if name in _defined(s)), None)
        if definition is None:
            raise LookupError(name)
        if isinstance(definition, (ast.Assign, ast.AnnAssign)) and definition.value is not None:
            _define_names(definition.value, statements, namespace)
            namespace[name] = _evaluate(definition.value, namespace)
        else:
            assert isinstance(definition, (ast.Import, ast.ImportFrom))
            alias = next(alias for alias in definition.names if _bound(alias) == name)
            single = copy.copy(definition)
            single.names = [alias]
            _execute(single, namespace)


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that an import or an assignment of one name defines."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {_bound(alias) for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _evaluate(expression: ast.expr, namespace: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "<signature>", "eval"), namespace)


def _execute(statement: ast.stmt, namespace: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module([statement], []))
    exec(compile(module, "<signature>", "exec"), namespace)
