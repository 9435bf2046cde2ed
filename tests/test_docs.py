"""The documentation says what the program does: commands, configurations, examples, generated pages, results."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvlab import errors
from cvlab.config import loading, overrides, strict_yaml
from cvlab.runs.records import STATES
from cvlab.sweeps.experiment import load_sweep
from tests.markdown import ROOT, blocks_of, commands_of, pages

DOCS = ROOT / "docs"
GENERATED = [path for path in pages() if path.read_text().startswith("<!-- Generated")]
WRITTEN = [path for path in pages() if path not in GENERATED]
PHOTO_COMMANDS = {
    "classify": "classify_photos",
    "classvis": "class_visualization",
    **{name: name for name in ("saliency", "attack", "style", "detect", "caption")},
}
OTHER_PROGRAMS = (
    "python3",
    "python",
    "pip",
    ".venv/bin/pip",
    ".venv/bin/pytest",
    ".",
    "make",
    "bash",
    "pre-commit",
    "cd",
)
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
SHELL_BLOCKS = [block for path in WRITTEN for block in blocks_of(path, "sh")]
YAML_BLOCKS = [block for path in WRITTEN for block in blocks_of(path, "yaml")]
PYTHON_BLOCKS = [block for path in WRITTEN for block in blocks_of(path, "python")]


def module_of(name):
    """Import a script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_files(page, folder):
    """Write the blocks of a page that are files into a folder."""
    for block in blocks_of(ROOT / page):
        if block.title:
            (folder / block.title).write_text(block.text)


def config_of(words, folder):
    """Return the configuration and the overrides that a command line of `train`, `run` or `sweep` names."""
    name = words[1]
    path = ROOT / name if name.startswith("configs/") else folder / name if (folder / name).is_file() else name
    return str(path), [word for word in words[2:] if OVERRIDE.match(word)]


def check_configuration(words, folder):
    """Load the configuration that a command would run."""
    if words[0] in ("train", "run", "sweep") and len(words) > 1 and not words[1].startswith("runs/"):
        reference, texts = config_of(words, folder)
        if words[0] == "sweep":
            flags = {"--on": "submit.on", "--address": "submit.address"}
            texts += [f"{flags[word]}={words[k + 1]}" for k, word in enumerate(words) if word in flags]
            assert load_sweep(reference, texts)
        else:
            assert loading.load(reference, texts)
    elif words[0] in PHOTO_COMMANDS:
        assert loading.load(PHOTO_COMMANDS[words[0]], [word for word in words[1:] if OVERRIDE.match(word)])


def check_command(words, folder, cvlab):
    """Parse a command line with the program's parser; load the configuration that it names."""
    if Path(words[0]).name != "cvlab":
        assert words[0] in OTHER_PROGRAMS, words
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    code, out, err = cvlab(*words[1:], "--help")
    assert code == 0, err
    assert "Usage" in out, err
    check_configuration(words[1:], folder)


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_every_command_is_understood(block, cvlab, tmp_path):
    write_files(block.page, tmp_path)
    for words in commands_of(block):
        check_command(words, tmp_path, cvlab)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_text_is_understood(path, cvlab, tmp_path):
    """Parse commands in tables and sentences; those with `...` or alternatives are no whole commands."""
    for text in re.findall(r"`(cvlab [a-z][^`\n]*)`", path.read_text()):
        words = shlex.split(text.replace("\\|", "|"))
        if not {"...", "|"} & set(words) and "|" not in text:
            code, _, err = cvlab(*words[1:], "--help")
            assert code == 0, (text, err)


def test_the_example_of_a_sweep_has_the_trials_it_should(tmp_path):
    (tmp_path / "s.yaml").write_text(blocks_of(DOCS / "guides" / "sweeps.md", "yaml")[0].text)
    trials = loading.load(str(tmp_path / "s.yaml")).config.trials()
    assert len(trials) == 12
    assert sum("clip_norm" in trial.raw for trial in trials) == 6


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=str)
def test_every_configuration_is_valid(block, tmp_path):
    """Load whole configurations; merge the others over the configuration that the comment before them names."""
    write_files(block.page, tmp_path)
    text = block.text
    if block.note and block.note.startswith("over: "):
        name, *texts = block.note.removeprefix("over: ").split()
        base = yaml.safe_load(loading.load(name, texts).config.to_yaml())
        changes = strict_yaml.parse(block.text, str(block)).value
        base = {key: value for key, value in base.items() if key not in ("profile", "profiles", "duration")} | {
            "duration": base["duration"]
        }
        text = yaml.safe_dump(json.loads(json.dumps(overrides.inherit(changes, base))))
    (tmp_path / "config.yaml").write_text(text)
    assert loading.load(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_every_python_example_compiles(block):
    compile(block.text, str(block), "exec")


def test_no_text_names_the_package_of_another_project():
    files = [*pages(), *ROOT.glob("cvlab/**/*.py"), *ROOT.glob("configs/*.yaml")]
    assert not [str(path) for path in files if re.search(r"pip install[^\n]*cvlab\[", path.read_text())]


class TestExamples:
    """The examples of the guides on the user's own code and data run as they are written."""

    def test_own_model_and_its_export(self, cvlab, tmp_path):
        for page in ("own-model", "own-data", "export"):
            write_files(f"docs/guides/{page}.md", tmp_path)
        short = ["data={name: ./my_data.py:load}", "duration={steps: 1}", "batch_size=32"]
        code, out, err = cvlab("train", "my_model.yaml", *short, "--json")
        assert code == 0, err
        assert (Path(json.loads(out)["run"]) / "my_model.py").is_file()
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        assert cvlab("export", "latest", "--to", "onnx", "--out", "classifier.onnx")[0] == 0
        command = [sys.executable, "run_onnx.py", "classifier.onnx"]
        assert "(2, 2)" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def test_own_data(self, cvlab, tmp_path):
        write_files("docs/guides/own-data.md", tmp_path)
        code, _, err = cvlab("train", "my_data.yaml")
        assert code == 0, err

    def test_own_layer(self, cvlab, tmp_path):
        write_files("docs/guides/own-layer.md", tmp_path)
        assert cvlab("gradcheck", "./my_layer.py:Square")[0] == 0

    @pytest.mark.slow
    def test_own_photos_with_boxes(self, cvlab, tmp_path):
        write_files("docs/guides/own-photos.md", tmp_path)
        subprocess.run([sys.executable, "make_boxes.py"], cwd=tmp_path, check=True)
        short = [
            "size=96",
            "views=1",
            "batch_size=4",
            "duration={steps: 2}",
            "finetune_epochs=0",
            "evaluate_test=false",
        ]
        code, out, err = cvlab(
            "train", "yolo_fruit", "data={name: boxes, path: my_photos}", *short, "expect=[]", "--json"
        )
        assert code == 0, err
        assert "ap50/blue" in json.loads(out)["metrics"]

    @pytest.mark.slow
    def test_own_photos_with_captions(self, cvlab, tmp_path):
        from PIL import Image

        write_files("docs/guides/own-photos.md", tmp_path)
        for name in ("dog.jpg", "boat.jpg"):
            Image.new("RGB", (64, 64), "gray").save(tmp_path / name)
        short = ["size=64", "min_word_count=1", "batch_size=1", "duration={steps: 1}", "evaluate_test=false", "beam=1"]
        data = "data={name: captions, path: my_photos.csv}"
        code, _, err = cvlab("train", "caption_flickr8k_lstm", data, *short, "expect=[]")
        assert code == 0, err

    def test_reading_metrics(self, cvlab, tmp_path):
        block = next(block for block in blocks_of(DOCS / "guides" / "reports.md") if block.title == "read_metrics.py")
        namespace = {}
        exec(block.text, namespace)
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
        assert namespace["curve"](tmp_path, "loss") == [(1, 2.5)]


class TestGenerated:
    """Generated pages are those of the program."""

    def test_pages_are_up_to_date(self):
        generate = module_of("generate")
        assert not generate.outdated(generate.generate()), "run `python docs/generate.py`"

    def test_every_command_and_option_is_in_the_reference(self, cvlab):
        text = (DOCS / "reference" / "cli.md").read_text()
        for name in re.findall(r"^  ([a-z]+) +\S", cvlab("--help")[1], re.MULTILINE):
            assert f"## cvlab {name}\n" in text
        assert "`--max-restarts` MAX_RESTARTS | `0` |" in text

    def test_every_key_of_a_resolved_configuration_is_in_the_reference(self):
        text = (DOCS / "reference" / "configuration.md").read_text()
        for name in loading.shipped_names():
            for key in type(loading.load(name).config).model_fields:
                assert f"| `{key}` |" in text, key

    def test_every_shipped_configuration_is_in_the_reference(self):
        text = (DOCS / "reference" / "configurations.md").read_text()
        assert set(re.findall(r"^\| `([a-z0-9_]+)` \|", text, re.MULTILINE)) == set(loading.shipped_names())

    def test_exit_codes_are_those_of_the_errors(self):
        text = (DOCS / "reference" / "exit-codes.md").read_text()
        codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
        own = {
            cls.code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.CvlabError)
        }
        assert codes == own | {0, 130, 143}


def test_states_of_a_run_are_in_the_reference():
    assert " | ".join(STATES) in (DOCS / "reference" / "run-directory.md").read_text()


def test_environment_variables_of_the_code_are_in_the_reference():
    code = "\n".join(path.read_text() for path in ROOT.glob("cvlab/**/*.py"))
    text = (DOCS / "reference" / "environment.md").read_text()
    for name in set(re.findall(r"\bCVLAB_[A-Z_]+[A-Z]\b", code)):
        assert f"`{name}`" in text, name


def test_every_page_is_in_the_navigation():
    entries = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(entries) == sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("**/*.md"))


class TestCollectResults:
    """`docs/collect_results.py` makes rows of run directories."""

    @pytest.fixture
    def collect(self):
        return module_of("collect_results")

    @pytest.fixture
    def runs(self, tmp_path):
        """Return the folder of two runs that differ in their seed."""
        for seed in (0, 1):
            run = tmp_path / "runs" / f"quickstart-{seed}"
            run.mkdir(parents=True)
            command = f"cvlab train quickstart --seed {seed} -q --runs-dir=/home/me/runs /home/me/x.jpg"
            env = {"command": command, "git_commit": "abc", "time": f"2026-11-2{seed}T10:00:00+00:00"}
            env |= {"cpu_count": 2, "cpu_capability": "AVX2", "threads": 2, "torch": "2.13.0", "host": "secret"}
            metrics = {"val_accuracy": 0.5 + 0.25 * seed, "parameters": 10}
            summary = {"experiment": "classify", "data": "scenes10", "seconds": 3.0, "expect": [], "metrics": metrics}
            records = {"env": env, "summary": summary, "status": {"status": "done"}, "config": {"seed": seed}}
            for name, record in records.items():
                suffix = "yaml" if name == "config" else "json"
                (run / f"{name}.{suffix}").write_text(json.dumps(record))
        return tmp_path / "runs"

    def test_seeds_become_one_row_with_mean_and_deviation(self, collect, runs, tmp_path):
        for _ in range(2):  # the second time the row replaces itself
            assert collect.run([*map(str, runs.iterdir()), "--into", str(tmp_path)]) == 0
        (row,) = json.loads((tmp_path / "classify.json").read_text())
        assert row["command"] == "cvlab train quickstart x.jpg"
        assert row["seeds"] == [0, 1]
        assert row["metrics"]["val_accuracy"] == {"mean": 0.625, "sd": pytest.approx(0.25 / 2**0.5, abs=1e-5)}
        assert row["date"] == "2026-11-21"
        assert "secret" not in json.dumps(row)

    def test_runs_of_different_commits_are_not_mixed(self, collect, runs, tmp_path):
        run = runs / "quickstart-0"
        env = json.loads((run / "env.json").read_text())
        (run / "env.json").write_text(json.dumps(env | {"git_commit": "other"}))
        with pytest.raises(SystemExit, match="differ in commit"):
            collect.run([*map(str, runs.iterdir()), "--into", str(tmp_path)])

    def test_a_run_that_has_not_ended_has_no_row(self, collect, runs, tmp_path, capsys):
        run = runs / "quickstart-0"
        (run / "status.json").write_text('{"status": "interrupted"}')
        collect.run([str(run), "--into", str(tmp_path)])
        assert "not a run that has ended" in capsys.readouterr().out
        assert not (tmp_path / "classify.json").exists()


def test_rows_of_results_have_what_they_need():
    for path in (DOCS / "results").glob("*.json"):
        for row in json.loads(path.read_text()):
            assert len(row["commit"]) == 40, path
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]), path
            assert row["command"].startswith("cvlab "), path
            assert row["machine"], path
            assert row["metrics"], path
