"""pyproject.toml, .ci, the Dockerfile and the workflow agree."""

import importlib.util
import re
from importlib.machinery import SourceFileLoader

import yaml

import cvlab
from cvlab import errors
from tests.markdown import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()


def script(name):
    loader = SourceFileLoader(name, str(ROOT / ".ci" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def versions(text):
    return [tuple(map(int, version.split("."))) for version in re.findall(r"\d+(?:\.\d+)+", text)]


def test_the_matrix_has_the_oldest_and_newest_supported_versions():
    environments = script("matrix").ENVIRONMENTS
    (oldest, limit), (oldest_vision, vision_limit) = (
        versions(re.search(rf'"{name}(>=[^"]*)"', PROJECT)[1]) for name in ("torch", "torchvision")
    )
    torches = sorted(versions(" ".join(environment.torch for environment in environments)))
    assert (torches[0], torches[-1]) == (oldest, (limit[0], limit[1] - 1))
    for environment in environments:
        assert oldest_vision <= versions(environment.torchvision)[0] < vision_limit
    pythons = versions(re.search(r'requires-python = "(.*)"', PROJECT)[1])
    assert versions(" ".join(environment.python for environment in environments))[0] == pythons[0]


def test_the_locked_versions_are_supported():
    oldest, limit = versions(re.search(r'"torch(>=[^"]*)"', PROJECT)[1])
    for name in ("test", "dev"):
        locked = versions(re.search(r"^torch==(\S+)", (ROOT / ".ci" / f"{name}.lock").read_text(), re.MULTILINE)[1])[0]
        assert oldest <= locked[:2] < limit
        assert locked[:2] == versions(re.search('TORCH = "(.*)"', (ROOT / ".ci" / "lock").read_text())[1])[0]


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(cvlab.__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)


def test_the_package_script_runs_the_quick_start():
    commands = script("package").quick_start()
    assert commands[0] == "cvlab train quickstart"
    assert "cvlab classify sample" in commands


def test_the_dockerfile_copies_all_files_of_the_build():
    lines = (ROOT / "docs/docker/Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    needed = {"pyproject.toml", "cvlab", "configs"} | set(
        re.findall(r'(?:readme = |license-files = \[)"(.+)"', PROJECT)
    )
    assert copied == needed
    ignored = (ROOT / "docs/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert lines[-1] == 'ENTRYPOINT ["cvlab"]'


def test_the_workflow_runs_macos_and_windows():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    systems = jobs["portability"]["strategy"]["matrix"]["os"]
    assert {name.partition("-")[0] for name in systems} == {"macos", "windows"}
    for step in jobs["portability"]["steps"]:
        for folder in re.findall(r"tests/\w+", step.get("run", "")):
            assert (ROOT / folder).is_dir()


def test_extras_are_installed_from_the_checkout_or_by_name(tmp_path, monkeypatch):
    assert errors.install_command("onnx") == "pip install -e '.[onnx]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "cvlab" / "errors.py"))
    name = re.search(r'^name = "([\w-]+)"', PROJECT, re.MULTILINE)[1]
    assert errors.install_command("onnx") == f"pip install '{name}[onnx]'"
