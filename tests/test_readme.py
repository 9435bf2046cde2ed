"""What the README says is what the program does."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cvlab import errors
from cvlab.config import loading
from cvlab.runs.records import STATES
from cvlab.sweeps.experiment import load_sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [part.strip() for line in lines for part in re.split(r";|&&", line) if "cvlab " in part]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command, cvlab):
    words = shlex.split(command)
    arguments = words[1:] if Path(words[0]).name == "cvlab" else None
    if arguments is None:
        pytest.skip("an installation")
    code, out, err = cvlab(*arguments, "--help")
    assert code == 0, err
    assert "Usage" in out, err
    if arguments[0] == "sweep":
        flags = [
            f"submit.{word[2:]}={arguments[k + 1]}" for k, word in enumerate(arguments) if word in ("--on", "--address")
        ]
        assert load_sweep(arguments[1], [*flags, *(word for word in arguments[2:] if "=" in word)])
    if arguments[0] in ("train", "run"):
        overrides = [word for word in arguments[2:] if "=" in word]
        assert loading.load(str(ROOT / arguments[1]) if "/" in arguments[1] else arguments[1], overrides)


def test_every_command_is_told_and_says_what_it_does(cvlab):
    out = cvlab("--help")[1]
    listed = re.findall(r"^  ([a-z]+) +(\S.*)$", out.partition("Commands:")[2], re.MULTILINE)
    assert len(listed) >= 25
    for name, does in listed:
        assert f"cvlab {name}" in README, f"README lacks cvlab {name}"
        assert does.endswith("."), (name, does)
        assert not does.endswith(".."), (name, does)


def test_the_example_is_the_shipped_configuration(tmp_path):
    (tmp_path / "cifar_bn.yaml").write_text(blocks("yaml")[0])
    mine, shipped = (loading.load(str(p)).config for p in (tmp_path / "cifar_bn.yaml", "cifar_bn"))
    assert mine == shipped.model_copy(update={"expect_fallback": ()}) or mine.to_yaml() == (
        shipped.model_copy(update={"expect_fallback": ()}).to_yaml()
    )


def test_the_example_of_a_sweep_has_the_trials_it_should(tmp_path):
    (tmp_path / "s.yaml").write_text(next(block for block in blocks("yaml") if "experiment: sweep" in block))
    trials = loading.load(str(tmp_path / "s.yaml")).config.trials()
    assert len(trials) == 12
    assert sum("clip_norm" in trial.raw for trial in trials) == 6


def test_the_example_of_a_search_has_the_trials_it_says(tmp_path):
    example = next(block for block in blocks("yaml") if block.startswith("search:"))
    (tmp_path / "search.yaml").write_text("experiment: sweep\nbase: {from: cifar_bn}\n" + example)
    assert loading.load(str(tmp_path / "search.yaml")).config.search.trials == 50


def test_the_example_of_profiles_is_valid(tmp_path):
    block = next(block for block in blocks("yaml") if "profiles:" in block)
    whole = loading.load("cifar_60s", ["profile=small"]).config.to_yaml()
    kept = [line for line in yaml.safe_load(whole).items() if line[0] not in ("duration", "profile", "profiles")]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(dict(kept)) + block)
    assert loading.load(str(tmp_path / "p.yaml")).variants["profile=large"].config.augment.cutout_px == 12


def test_the_exit_codes_are_those_of_the_errors():
    told = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE) for code in row.split(",")}
    own = {cls.code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.CvlabError)}
    assert told == own | {0, 130, 143}


def test_the_states_are_those_of_a_run():
    assert " | ".join(STATES) in README


def test_every_shipped_configuration_has_its_results():
    results = README.partition("## Results")[2].partition("\n## ")[0]
    for name in loading.shipped_names():
        assert re.search(rf"^\| {name}( \(n=\d\))? \|", results, re.MULTILINE), name


def test_the_first_two_commands_need_nothing_but_python():
    main, test = (block.strip() for block in blocks("sh")[:2])
    assert main.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "configs/cifar_bn.yaml" in main
    assert test.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert test.endswith(".venv/bin/pytest")
    assert (ROOT / "configs" / "cifar_bn.yaml").is_file()


def test_the_project_file_names_what_the_code_imports():
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch>=2.10,<2.14", "torchvision", "timm", "typer", "pyyaml", "rich", "pydantic", "numpy"):
        assert f'"{package}' in text
