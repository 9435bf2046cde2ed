"""The README agrees with the program. tests/test_docs.py parses its commands and configurations."""

import json
import re

import typer.main

from cvlab.cli import main
from cvlab.config import loading
from tests.markdown import ROOT, blocks_of, pages

PATH = ROOT / "README.md"
README = PATH.read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1


def test_the_first_two_commands_need_nothing_but_python():
    main, test = (block for block in blocks_of(PATH, "sh") if block.note)
    assert (main.note, test.note) == ("main", "test")
    assert main.text.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "configs/cifar_bn.yaml" in main.text
    assert test.text.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert test.text.strip().endswith(".venv/bin/pytest")
    assert (ROOT / "configs" / "cifar_bn.yaml").is_file()
    assert [block.note for block in blocks_of(PATH, "sh")[:2]] == ["main", "test"]


def test_the_example_is_the_shipped_configuration(tmp_path):
    (tmp_path / "cifar_bn.yaml").write_text(blocks_of(PATH, "yaml")[0].text)
    example, shipped = (loading.load(str(path)).config for path in (tmp_path / "cifar_bn.yaml", "cifar_bn"))
    assert example.to_yaml() == shipped.model_copy(update={"expect_fallback": ()}).to_yaml()


def test_every_command_has_an_example():
    text = "\n".join(path.read_text() for path in pages() if "reference" not in path.parts)
    for name in typer.main.get_command(main.app).commands:
        assert f"cvlab {name}" in text, f"no example of cvlab {name}"


def test_results_in_the_readme_are_recorded():
    table = README.partition("<!-- results")[2].partition("<!-- /results -->")[0]
    rows = re.findall(r"^\| [^|]+ \| `(cvlab [^`]+)` \| `(\w+)` ([\d.]+)", table, re.MULTILINE)
    recorded = [row for path in ROOT.glob("docs/results/*.json") for row in json.loads(path.read_text())]
    for command, metric, value in rows:
        values = [row["metrics"][metric]["mean"] for row in recorded if row["command"] == command]
        decimals = len(value.partition(".")[2])
        assert any(round(mean, decimals) == float(value) for mean in values), command
    assert 0 < len(rows) <= 8


def test_the_number_of_shipped_configurations():
    assert f"{len(loading.shipped_names())} configurations" in README


def test_the_project_file_names_the_imported_packages():
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch>=2.10,<2.16", "torchvision", "timm", "typer", "pyyaml", "rich", "pydantic", "numpy"):
        assert f'"{package}' in text


def test_the_output_of_the_quick_start_is_as_shown(cvlab):
    """Compare the lines with those of a short run; numbers, rules of tables and spaces may differ."""
    overrides = [
        "duration={steps: 1}",
        "data.num_train=100",
        "data.val_fraction=0.01",
        "expect=[test_accuracy >= 0.00]",
    ]
    code, out, err = cvlab("train", "quickstart", *overrides)
    assert code == 0, err
    printed = {skeleton(line) for line in out.splitlines()}
    for line in next(block.text for block in blocks_of(PATH, "text")).splitlines():
        assert line == "..." or skeleton(line) in printed, (line, out)


def skeleton(line):
    """Return a line without its numbers, names of runs, rules and spaces."""
    return re.sub(r"[\d.,─\s]+|-[0-9a-f]{4}\b|-\d+", "", line)
