"""Rules for the whole package: sizes, forbidden calls, the layer of every package, complete experiments."""

import ast
import re
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cvlab"
FILES = sorted(PACKAGE.rglob("*.py"))
RUNS_ITS_OWN_SOURCE = "config/signatures.py"  # the signatures of registered builders
FORBIDDEN = (
    r"pickle\.load\(",
    r"yaml\.load\(",
    r"(?<![\w.])eval\(",
    r"(?<![\w.])exec\(",
    r"shell=True",
    r"extractall\(",
    r"allow_pickle=True",
    r"torch\.load\((?!.*weights_only=True)",
)
NOT_PORTABLE = (  # what Windows or macOS lacks
    r"^\s*import (fcntl|msvcrt|resource|ctypes|pwd|grp|termios)\b",
    r"\bos\.(O_(?!RDONLY|WRONLY|RDWR|CREAT|APPEND|EXCL|TRUNC)|(fork|getuid|fchmod|pwrite|pread|waitid|killpg)\b)",
    r"\bos\.(sched_\w+|mkfifo|sysconf|nice|getpgid|setsid)\b",
    r"\bsignal\.(SIG(?!INT|TERM|_)|pthread_|alarm|setitimer)",
    r"\b(os\.name|sys\.platform) ==",
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
class TestEachFile:
    def test_size(self, path):
        text = path.read_text()
        assert text.count("\n") <= 500
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name

    def test_only_compat_imports_torchvision_and_timm(self, path):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] in ("torchvision", "timm") for name in names)

    def test_only_portability_calls_what_systems_do_not_have_in_common(self, path):
        for line in () if path == PACKAGE / "portability.py" else path.read_text().splitlines():
            for pattern in NOT_PORTABLE:
                assert not re.search(pattern, line), line

    def test_nothing_that_could_run_what_it_reads(self, path):
        patterns = [
            p for p in FORBIDDEN if not (path == PACKAGE / RUNS_ITS_OWN_SOURCE and ("eval" in p or "exec" in p))
        ]
        for line in path.read_text().splitlines():
            for pattern in patterns:
                assert not re.search(pattern, line), line


def packages(folder):
    return sorted(path.parent.name for path in folder.glob("*/__init__.py"))


def test_every_package_and_root_module_has_its_layer():
    """import-linter (`make imports`) ignores what its contract does not name."""
    contract = (PACKAGE.parent / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    named = set(re.findall(r"cvlab\.([\w.]+)", contract))
    roots = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    modules = [path.stem for path in (PACKAGE / "experiments").glob("*.py") if path.stem != "__init__"]
    tasks = {f"experiments.{name}" for name in (*packages(PACKAGE / "experiments"), *modules)}
    assert named == roots | tasks | set(packages(PACKAGE)) - {"experiments"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_says_what_it_is_and_what_it_may_import(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.match(r"(cvlab|[A-Z])[^\n]*[.:]", text)
    if path.parent.parent == PACKAGE or path.parent.name == "common":
        assert "May import " in text


def test_every_experiment_is_complete():
    from cvlab import registry
    from cvlab.experiments.base import Experiment, PhotoExperiment

    for name in registry.experiment_names():
        experiment = registry.get_experiment(name)
        assert isinstance(experiment, Experiment)
        assert experiment.name == name
        assert experiment.metrics
        assert experiment.Config.model_config["extra"] == "forbid"
        assert experiment.Config.model_config["frozen"]
        if isinstance(experiment, PhotoExperiment):
            names = [column.name for column in experiment.columns]
            assert names
            assert len(set(names)) == len(names)
        for method in ("plan", "run"):
            assert getattr(type(experiment), method) is not getattr(Experiment, method)
        for word in ("References:", "Metrics:", "Command:"):
            assert word in type(experiment).__doc__


def test_functions_are_small():
    sizes = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(sizes) <= 10
