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
NOT_PORTABLE = (  # not available on Windows or macOS
    r"^\s*import (fcntl|msvcrt|resource|ctypes|pwd|grp|termios)\b",
    r"\bos\.(O_(?!RDONLY|WRONLY|RDWR|CREAT|APPEND|EXCL|TRUNC)|(fork|getuid|fchmod|pwrite|pread|waitid|killpg)\b)",
    r"\bos\.(sched_\w+|mkfifo|sysconf|nice|getpgid|setsid)\b",
    r"\bsignal\.(SIG(?!INT|TERM|_)|pthread_|alarm|setitimer)",
    r"\b(os\.name|sys\.platform) ==",
)


def problems_of(path, text, nodes):
    """Yield the violations of a file: sizes, imports that belong to `_compat`, calls that execute input."""
    if text.count("\n") > 500:
        yield "more than 500 lines"
    for node in nodes:
        names = []
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
            yield f"{node.name}: more than 60 lines"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in ("torchvision", "timm") for name in names):
            yield f"line {node.lineno}: imports {', '.join(names)}"
    patterns = [p for p in FORBIDDEN if not (path == PACKAGE / RUNS_ITS_OWN_SOURCE and ("eval" in p or "exec" in p))]
    patterns += NOT_PORTABLE if path != PACKAGE / "portability.py" else ()
    for line in text.splitlines():
        for pattern in patterns:
            if re.search(pattern, line):
                yield line


def test_no_file_breaks_a_rule():
    problems, sizes = [], []
    for path in FILES:
        text = path.read_text()
        nodes = list(ast.walk(ast.parse(text)))
        problems += [f"{path.relative_to(PACKAGE)}: {problem}" for problem in problems_of(path, text, nodes)]
        sizes += [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)]
    assert not problems, "\n".join(problems)
    assert statistics.median(sizes) <= 10


def test_violations_are_named():
    long = "def f():\n" + "    x = 1\n" * 60
    for text, expected in (
        (long, "f: more than 60 lines"),
        ("import timm.layers", "imports timm"),
        ("eval(x)", "eval"),
        ("import fcntl", "fcntl"),
    ):
        (actual,) = problems_of(PACKAGE / "x.py", text, ast.walk(ast.parse(text)))
        assert expected in actual


def packages(folder):
    return sorted(path.parent.name for path in folder.glob("*/__init__.py"))


def test_every_package_and_root_module_is_in_a_layer():
    """import-linter (`make imports`) ignores packages that its contract does not name."""
    contract = (PACKAGE.parent / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    named = set(re.findall(r"cvlab\.([\w.]+)", contract))
    roots = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    modules = [path.stem for path in (PACKAGE / "experiments").glob("*.py") if path.stem != "__init__"]
    tasks = {f"experiments.{name}" for name in (*packages(PACKAGE / "experiments"), *modules)}
    assert named == roots | tasks | set(packages(PACKAGE)) - {"experiments"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_documents_its_purpose_and_its_imports(path):
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
