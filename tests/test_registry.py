"""Every string in the package that names one of its modules or objects can be imported."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cvlab"
TARGET = re.compile(r"cvlab(\.\w+)+(:\w+)?|torch:\w+")


def targets():
    """Return the strings of the form `cvlab.module` or `cvlab.module.Name`; tables too."""
    from cvlab.engine.optimizers import OPTIMIZERS
    from cvlab.engine.schedules import SCHEDULES

    texts = {*OPTIMIZERS.names.values(), *SCHEDULES.names.values()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and TARGET.fullmatch(node.value):
                texts.add(node.value)
    return sorted(texts)


@pytest.mark.parametrize("target", targets())
def test_target_can_be_imported(target):
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    assert not name or hasattr(found, name)


def test_the_tables_are_seen():
    assert len(targets()) > 40
