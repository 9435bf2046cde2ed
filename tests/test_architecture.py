"""The house rules that a machine can check: sizes, who imports whom, and calls that nobody may make."""

import ast
import re
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cvlab"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # each may import those before it, and its own row
    {"errors", "failpoints"},
    {
        "lookup",
        "yamlfile",
        "durable",
        "expect",
        "console",
        "lock",
        "compat",
        "layers",
        "ops",
        "axes",
        "budget",
        "memory",
        "summaries",
        "parallel",
    },
    {
        "schema",
        "rundir",
        "checkpoint",
        "explain",
        "signals",
        "submit",
        "userfiles",
        "follower",
        "environment",
        "search",
    },
    {"models", "data"},
    {"engine"},
    {"optim", "jobs", "gathered", "training", "report", "photojobs", "painting", "attacking", "drawing", "stylizing"}
    | {
        "style_targets",
        "feature_cache",
        "detecting",
        "finding",
        "explaining",
        "photo_features",
        "captioning",
        "photosets",
        "trained",
        "driver",
        "trials",
    },
    {"experiments"},
    {"validation", "arms", "profiles"},
    {
        "config",
        "runner",
        "evaluation",
        "listing",
        "doctor",
        "fault_check",
        "bench",
        "photo_bench",
        "box_bench",
        "checking",
        "sweeping",
        "rates",
        "profiling",
        "serving",
        "trackers",
        "exporting",
        "launch",
        "process_bench",
    },
    {
        "cli_options",
        "cli_bench",
        "cli_detect",
        "cli_inspect",
        "cli_photos",
        "cli_report",
        "cli_sweep",
        "cli",
        "__main__",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
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


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cvlab":
            parts = node.module.split(".")
            yield from ([alias.name for alias in node.names] if len(parts) == 1 else [parts[1]])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cvlab."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
class TestEachFile:
    def test_size(self, path):
        text = path.read_text()
        assert text.count("\n") <= 300
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name

    def test_imports_go_one_way(self, path):
        own = part_of(path)
        if own == "__init__":
            return
        for other in imports_of(ast.parse(path.read_text())):
            if other in ("__version__", own):
                continue
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}"
            assert own != "report" or other != "experiments"

    def test_only_compat_imports_torchvision_and_timm(self, path):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] in ("torchvision", "timm") for name in names)

    def test_nothing_that_could_run_what_it_reads(self, path):
        for line in path.read_text().splitlines():
            for pattern in FORBIDDEN:
                assert not re.search(pattern, line), line


def test_experiments_never_import_each_other():
    for path in (PACKAGE / "experiments").glob("*.py"):
        if path.name != "__init__.py":
            assert "experiments" not in set(imports_of(ast.parse(path.read_text())))


def test_experiments_have_their_three_things():
    from cvlab import experiments

    for name in experiments.names():
        module = experiments.find(name)
        for word in ("Paper:", "Expect:", "Command:"):
            assert word in module.__doc__
        assert module.Config.model_config["extra"] == "forbid" and module.Config.model_config["frozen"]
        assert callable(module.run)


def test_functions_are_small():
    sizes = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(sizes) <= 10


def test_every_module_is_placed():
    placed = {part_of(path) for path in FILES} - {"__init__"}
    assert placed <= set(LEVEL), placed - set(LEVEL)
