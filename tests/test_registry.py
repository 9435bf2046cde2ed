"""Every string in the package that names one of its modules or objects can be imported."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cvlab import registry
from cvlab.config import signatures
from cvlab.config.schema import registries_of

PACKAGE = Path(__file__).parent.parent / "cvlab"
TARGET = re.compile(r"cvlab(\.\w+)+(:\w+)?|torch:\w+")


def targets():
    """Return the strings of the form `cvlab.module` or `cvlab.module:Name`, those of tables included."""
    from cvlab.engine.optimizers import OPTIMIZERS
    from cvlab.engine.schedules import SCHEDULES
    from cvlab.experiments.classification.losses import LOSSES

    texts = {*OPTIMIZERS.names.values(), *SCHEDULES.names.values(), *LOSSES.names.values()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and TARGET.fullmatch(node.value):
                texts.add(node.value)
    return sorted(texts)


@pytest.mark.parametrize("target", targets())
def test_target_can_be_imported(target):
    module, _, name = target.partition(":")
    imported = importlib.import_module(module)
    assert not name or hasattr(imported, name)


def test_targets_of_tables_are_tested():
    assert len(targets()) > 40


TABLES = {
    table.kind: table
    for name in registry.experiment_names()
    for table in registries_of(registry.get_experiment(name).Config).values()
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table.names])
def test_signature_read_from_the_source_equals_that_of_the_builder(kind, name):
    table = TABLES[kind]
    module, _, attribute = table.names[name].partition(":")
    from_source = signatures._read(module, attribute, table.injected)
    assert from_source == signatures.of_builder(registry.import_name(table.names[name]), table.injected)
    assert from_source.summary


def test_builders_that_cannot_be_read_from_the_source_are_imported(tmp_path, monkeypatch):
    (tmp_path / "builders_under_test.py").write_text(
        "def _limit():\n    return 3\n\n"
        "LIMIT = _limit()\n\n"
        "def build(channels, depth: int = LIMIT, *, width: float = 2.0):\n    'Build it.'\n\n"
        "class Base:\n    def __init__(self, channels, size: int):\n        'Hold it.'\n\n"
        "class Net(Base):\n    'A model.'\n\n"
        "alias = build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, defaults in (("build", {"depth": 3, "width": 2.0}), ("Net", {}), ("alias", {"depth": 3, "width": 2.0})):
        monkeypatch.delitem(sys.modules, "builders_under_test", raising=False)
        assert signatures._read("builders_under_test", name, {"channels"}) is None
        signature = signatures.of_target(f"builders_under_test:{name}", {"channels"})
        actual = {p.name: p.default for p in signature.parameters if p.default is not p.empty}
        assert actual == defaults
        assert {p.name: p.annotation for p in signature.parameters} == (
            {"size": int} if name == "Net" else {"depth": int, "width": float}
        )


def test_configurations_are_loaded_without_torch():
    code = (
        "import sys\n"
        "from cvlab.config import loading\n"
        "for name in loading.shipped_names():\n"
        "    loading.load(name)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
