"""The Python API: the same runs and errors as the commands, no output, and no change of the caller's state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cvlab
from cvlab.errors import CheckpointError, ConfigError, DataError, ExpectationError, RunDirError, StoppedError

TINY = {
    "data.num_train": 60,
    "batch_size": 20,
    "duration": {"steps": 6},
    "expect": [],
    "evaluate_test": False,
    "threads": 1,
}
TINY_TEXTS = [
    "data.num_train=60",
    "batch_size=20",
    "duration={steps: 6}",
    "expect=[]",
    "evaluate_test=false",
    "threads=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """Return a run of a classifier that all tests of this module read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        patch.setenv("CVLAB_OFFLINE", "1")
        return cvlab.train("quickstart", TINY, seed=1, runs_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def photo(tmp_path):
    """Return a photo whose file name needs quoting in a shell and in YAML."""
    path = tmp_path / "a 'b' {c}: 日本 😀.png"
    cvlab.classify("sample").results[0].open().resize((64, 48)).save(path)
    return path


def test_training_gives_the_same_run_as_the_command(trained, cvlab):
    code, out, err = cvlab("train", "quickstart", *TINY_TEXTS, "--seed", 1, "--json")
    assert code == 0, err
    result = json.loads(out)
    summary = json.loads((Path(result["run"]) / "summary.json").read_text())
    assert trained.summary["weights_sha256"] == summary["weights_sha256"]
    assert trained.status == "done"
    assert trained.experiment == "classify"
    assert trained.config["optimizer"]["lr"] == pytest.approx(2e-3)
    assert [row["step"] for row in trained.rows if "val_accuracy" in row][-1] == 6
    assert sorted(path.name for path in trained.path.iterdir() if path.suffix != ".html") == sorted(
        path.name for path in Path(result["run"]).iterdir() if path.suffix != ".html"
    )


def test_training_is_silent_by_default_and_restores_the_state_of_the_caller(tmp_path, capfd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    cvlab.train("quickstart", {**TINY, "threads": 1})
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")
    cvlab.train("quickstart", TINY, progress=True)
    assert "run directory" in capfd.readouterr().err


def test_a_fallback_is_never_silent(capfd):
    run = cvlab.train("cifar_bn", {**TINY, "expect_fallback": []})
    assert "warning: cifar10 is not on the disk" in capfd.readouterr().err
    assert run.summary["data"] == "scenes10 (fallback for cifar10)"
    with pytest.raises(DataError, match="cvlab data fetch cifar10"):
        cvlab.train("cifar_bn", TINY, fallback=False)


def test_a_configuration_can_be_a_dictionary_a_file_or_a_run(trained, tmp_path):
    config = {key: value for key, value in trained.config.items() if key != "name"}
    run = cvlab.train({**config, "optimizer": {"name": "adam", "lr": np.float64(2e-3)}})
    assert run.summary["weights_sha256"] == trained.summary["weights_sha256"]
    assert run.config["name"] == "classify"
    repeated = cvlab.train(trained)
    assert repeated.summary["weights_sha256"] == trained.summary["weights_sha256"]
    with pytest.raises(ConfigError, match="unknown key 'modl'") as error:
        cvlab.train({**config, "modl": 1})
    assert error.value.further_errors == ()


def test_a_failed_expectation_is_a_status_and_an_error_on_request():
    run = cvlab.train("quickstart", {**TINY, "expect": ["val_accuracy >= 1"]})
    assert run.status == "expectations_failed"
    with pytest.raises(ExpectationError, match="val_accuracy >= 1"):
        run.raise_for_status()


def test_invalid_input_raises_a_one_line_error_before_anything_is_written(tmp_path):
    cases = {
        "did you mean 'cifar_bn'": lambda: cvlab.train("cifar_bx"),
        "expected a number": lambda: cvlab.train("quickstart", {"optimizer.lr": "x"}),
        "Linear cannot be written": lambda: cvlab.train("quickstart", {"model": torch.nn.Linear}),
        "not of the form key=value": lambda: cvlab.train("quickstart", ["lr"]),
        "int is no configuration": lambda: cvlab.train(3),
        "no photo is named": lambda: cvlab.classify([]),
        "Tensor is no path": lambda: cvlab.detect(torch.zeros(3, 9, 9)),
        "no class 'ostrch'": lambda: cvlab.attack("sample", target="ostrch"),
        "no style is named": lambda: cvlab.style("sample", []),
    }
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"missing\.jpg: no such file"):
        cvlab.caption("missing.jpg")
    with pytest.raises(RunDirError, match="no run 'nothing'"):
        cvlab.load_run("nothing")
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_is_resumed(monkeypatch, trained):
    from cvlab.engine import trainer

    between_steps = trainer.Trainer._between_steps

    def stop_after_two(session, step, save_due):
        between_steps(session, step, save_due)
        if step >= 2:
            raise StoppedError("stopped for a test", "", 130)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_between_steps", stop_after_two)
        with pytest.raises(StoppedError) as error:
            cvlab.train("quickstart", TINY, seed=1)
    run = cvlab.load_run()
    assert str(run.path) == str(Path(error.value.run).resolve())
    assert run.status == "interrupted"
    with pytest.raises(cvlab.errors.CvlabError, match="stopped for a test"):
        run.raise_for_status()
    assert run.resume() == run
    assert run.summary["weights_sha256"] == trained.summary["weights_sha256"]


def test_runs_are_listed_without_torch(trained):
    code = """import sys, cvlab
runs = cvlab.runs(runs_dir=sys.argv[1])
assert runs[-1].status == "done" and runs[-1].summary["metrics"]["steps"] == 6 and len(runs[:0]) == 0
assert runs.table is not None and cvlab.load_run(runs_dir=sys.argv[1]) == runs[-1]
assert {"torch", "numpy", "PIL"} & set(sys.modules) == set(), sys.modules.keys()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Tables use pandas if it is installed, and pandas imports numpy.
    hidden = "import sys; sys.modules['pandas'] = None\n"
    code = (
        hidden.replace(
            "sys.modules['pandas'] = None",
            "import importlib.util as u; f = u.find_spec; "
            "u.find_spec = lambda name, *more: None if name == 'pandas' else f(name, *more)",
        )
        + code
    )
    subprocess.run([sys.executable, "-c", code, str(trained.path.parent)], env=environment, check=True)


def test_runs_are_filtered_sorted_and_limited(tmp_path):
    for number, accuracy in enumerate((0.6, 0.9, 0.8, None)):
        path = tmp_path / f"2026112{number}-120000-net-000{number}"
        path.mkdir()
        (path / "config.yaml").write_text(f"experiment: classify\noptimizer: {{name: adam, lr: {10.0**-number}}}\n")
        (path / "status.json").write_text(json.dumps({"status": "done" if accuracy else "failed"}))
        info = {"val_accuracy": {"unit": "", "better": "higher"}}
        summary = {"metrics": {"val_accuracy": accuracy}, "metric_info": info}
        (path / "summary.json").write_text(json.dumps(summary if accuracy else {}))

    def order(*query, **options):
        runs = cvlab.runs(*query, runs_dir=tmp_path, **options)
        assert all(run.path.parent == tmp_path for run in runs)
        return "".join(run.name[-1] for run in runs)

    assert order() == "0123"
    assert order("status=done val_accuracy>0.7") == "12"
    assert order("status=done", sort="val_accuracy", limit=2) == "12"
    assert order(sort="val_accuracy") == "1203"
    assert order(sort="optimizer.lr", reverse=True) == "0123"
    assert order(limit=2) == "23"
    assert order(reverse=True) == "3210"
    best = cvlab.runs(sort="val_accuracy", runs_dir=tmp_path)
    html = best._repr_html_()
    assert html.index("net-0001") < html.index("net-0002") < html.index("net-0000")
    table = cvlab.runs("status=done", sort="optimizer.lr", runs_dir=tmp_path).table
    rows = table if isinstance(table, list) else table.to_dict("records")
    assert [row["optimizer.lr"] for row in rows] == [0.01, 0.1, 1.0]
    html = cvlab.runs(runs_dir=tmp_path)._repr_html_()
    assert html.index("net-0003") < html.index("net-0000")  # unsorted, the newest run is at the top


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "status=fertig"}, "no status 'fertig'"),
        ({"query": "val_acuracy>0.7"}, "no run in .* has the key 'val_acuracy'.*did you mean 'val_accuracy'"),
        ({"query": Path("runs")}, "is not text"),
        ({"query": "", "sort": "val_acuracy"}, "has the key 'val_acuracy'"),
        ({"query": "", "sort": 3}, "sort: 3 is not text"),
        ({"query": "", "limit": 0}, "limit: expected a whole number >= 1, got 0"),
        ({"query": "", "limit": 2.5}, "limit: expected a whole number"),
    ],
)
def test_an_invalid_query_is_a_one_line_error(trained, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        cvlab.runs(runs_dir=trained.path.parent, **options)
    assert "\n" not in str(error.value)


def test_importing_cvlab_is_cheap_and_its_names_can_be_completed():
    code = """import sys
before = set(sys.modules)
import cvlab
assert not [name for name in set(sys.modules) - before if name.startswith("cvlab.")], sys.modules
assert {"torch", "numpy", "pydantic", "yaml"} & set(sys.modules) == set()
assert set(cvlab.__all__) <= set(dir(cvlab))
for name in cvlab.__all__:
    getattr(cvlab, name)
assert callable(cvlab.runs) and cvlab.runs.__name__ == "cvlab.runs"
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_model_accepts_images_of_any_size(trained):
    model = trained.model()
    assert len(model.classes) == 10
    assert not model.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(images), model.module(images), atol=1e-5)
    large = torch.rand(2, 3, 50, 70, requires_grad=True)
    model(large).sum().backward()
    assert large.grad.abs().sum() > 0
    eight_bits = (torch.rand(2, 3, 50, 70) * 255).to(torch.uint8)
    assert torch.allclose(model(eight_bits), model(eight_bits / 255))
    with pytest.raises(ConfigError, match=r"\(3, 9, 9\)"):
        model(torch.rand(3, 9, 9))
    with pytest.raises(ConfigError, match="first"):
        trained.model("first")


def test_predictions_equal_those_of_the_command(trained, photo):
    run = cvlab.classify(photo, model=trained)
    (row,) = trained.predict(photo)
    assert row["top"] == run.results[0]["top"]
    image = Image.open(photo)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for data in (image, array, array / 255, tensor, tensor / 255, tensor[None]):
        assert trained.predict(data)[0]["top"] == row["top"], type(data)
    assert [prediction["label"] for prediction in trained.predict([photo, image, array])] == [row["label"]] * 3
    assert trained.predict([]) == []
    logits = trained.model()(tensor[None])
    assert logits.softmax(1).max().item() == pytest.approx(row["score"], abs=0.02)


@pytest.mark.parametrize(
    "invalid",
    [
        pytest.param(torch.full((3, 9, 9), 254.5), id="above 1"),
        pytest.param(torch.full((3, 9, 9), float("nan")), id="nan"),
        pytest.param(torch.zeros(3, 9, 9, dtype=torch.int64), id="int64"),
        pytest.param(torch.zeros(4, 9, 9), id="four channels"),
        pytest.param(np.zeros((9, 9, 4), np.uint8), id="array of four channels"),
        pytest.param(np.zeros((0, 9, 3), np.uint8), id="empty"),
        pytest.param(3, id="number"),
        pytest.param(b"photo.jpg", id="bytes"),
    ],
)
def test_inputs_that_are_not_images_are_rejected(trained, invalid):
    with pytest.raises(ConfigError, match="give paths, PIL images"):
        trained.predict(invalid)


def test_grayscale_images_are_accepted(trained):
    gray = np.full((20, 30), 128, np.uint8)
    (row,) = trained.predict(gray)
    assert trained.predict(Image.fromarray(gray))[0] == row
    assert trained.predict(torch.from_numpy(gray))[0] == row


def test_evaluate_and_export(trained, tmp_path):
    assert trained.evaluate("val")["val_accuracy"] == pytest.approx(trained.summary["metrics"]["val_accuracy"])
    assert trained.export("safetensors", tmp_path / "m.safetensors") == tmp_path / "m.safetensors"
    assert "<svg" in trained.report(tmp_path / "r.html").read_text()


def test_photos_that_cannot_be_read_are_results_with_errors(photo, tmp_path, capfd):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    run = cvlab.classify([tmp_path / "broken.jpg", photo])
    assert "warning:" in capfd.readouterr().err
    assert "broken.jpg" in run.results[0].error
    assert run.results[1].error is None
    assert run.results[1].image == photo
    with pytest.raises(DataError, match="1 of 2 photos could not be read"):
        run.raise_for_status()


def test_every_function_on_photos_returns_pictures(photo):
    attack = cvlab.attack(photo, target="ostrich", overrides={"steps": 30}, seed=0)
    attack.raise_for_status()
    result = attack.results[0]
    assert result["target"] == "ostrich"
    assert set(result.files) == {"attacked", "panel"}
    assert result.open("attacked").size == (64, 48)
    saliency = cvlab.saliency(photo, method="gradient")
    assert saliency.results[0].open().width > 64
    detect = cvlab.detect(photo, conf=0.1, save=["txt"])
    assert detect.results[0].files["txt"].is_file()
    caption = cvlab.caption(photo, beam=1)
    assert caption.results[0]["sentence"]
    vis = cvlab.classvis(["gorilla"], steps=2, overrides={"frames": 1})
    assert vis.results[0].open().width >= 100
    dream = cvlab.dream(photo, layer="blocks.1", octaves=1, steps=1)
    assert dream.results[0].open("dream").size == (64, 48)
    look = cvlab.look("efficientnet_lite0", photo, layers=["bn1"])
    assert look.summary["tables"][0]["columns"][0] == "layer"
    style = cvlab.style(photo, "whirls", size=64, overrides={"steps": 2})
    assert style.results[0].open().size == (64, 48)
    for run in (attack, saliency, detect, caption, vis, dream, look, style):
        assert run == cvlab.load_run(run.name)
        assert 'src="data:image/webp;base64,' in run._repr_html_()
        assert 'src="data:image/webp;base64,' in run.results[0]._repr_html_()
    with pytest.raises(ConfigError, match="has no model for images"):
        attack.model()
    with pytest.raises(ConfigError, match="unknown file 'panl'; did you mean 'panel'"):
        result.open("panl")


def test_an_attack_without_success_is_an_error_on_request(photo):
    run = cvlab.attack(photo, target="ostrich", overrides={"steps": 1, "lr": 1e-6})
    assert run.status == "done"
    with pytest.raises(ExpectationError, match="the attack did not change the prediction"):
        run.raise_for_status()


def test_a_sweep_runs_in_a_script_without_a_guard(tmp_path):
    base = {f"base.{key}": value for key, value in TINY.items() if key != "expect"}
    script = tmp_path / "script.py"
    script.write_text(
        f"""import cvlab
run = cvlab.sweep("quickstart", {base | {"grid.optimizer.lr": [1e-3, 1e-2]}!r})
print(run.status, len(run.summary["trials"]))
"""
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout == "done 2\n"


def test_untrusted_code_is_not_run(trained, tmp_path):
    (tmp_path / "net.py").write_text(
        "from cvlab.experiments.classification.models.convnet import deep_convnet\n\n\n"
        "def net():\n    return deep_convnet(filters=(4,), pools=(0,))\n"
    )
    run = cvlab.train("quickstart", {**TINY, "model": {"name": "./net.py:net"}})
    assert run.predict("sample")
    file = next(run.path.rglob("net.py"))
    file.write_text(file.read_text() + "\nraise SystemExit\n")
    untrusted = cvlab.load_run(run.path)
    for call in (lambda: untrusted.predict("sample"), untrusted.model, untrusted.evaluate, lambda: cvlab.train(run)):
        with pytest.raises(RunDirError, match="--trust"):
            call()
    file.write_text(file.read_text().replace("raise SystemExit", ""))
    assert cvlab.load_run(run.path, trust=True).model()


def test_a_table_is_a_data_frame_if_pandas_is_installed(trained, monkeypatch):
    from cvlab.api import handles

    class Pandas:
        DataFrame = staticmethod(lambda rows: ("frame", rows))

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    monkeypatch.setattr(handles.importlib.util, "find_spec", lambda name: name)
    assert trained.metrics == ("frame", trained.rows)
    monkeypatch.setattr(handles.importlib.util, "find_spec", lambda name: None)
    assert trained.metrics == trained.rows


def test_a_run_without_checkpoint_has_no_model(trained, tmp_path):
    for name in ("config.yaml", "status.json", "classifier.json"):
        (tmp_path / name).write_bytes((trained.path / name).read_bytes())
    with pytest.raises(CheckpointError):
        cvlab.load_run(tmp_path).model()


def test_a_notebook_shows_a_progress_bar(monkeypatch, capsys):
    from types import SimpleNamespace

    from cvlab import console

    outputs = []

    def display(html, display_id):
        outputs.append(html)
        return SimpleNamespace(update=outputs.append)

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display, HTML=str))
    with console.Progress("<train>", 10) as progress:
        progress.update(4, "loss 2")
    assert 'value="0"' in outputs[0]
    assert 'value="4" max="10"></progress> &lt;train&gt; 4/10  loss 2' in outputs[1]
    assert "10/10" in outputs[-1]
    console.info("a line")
    console.info("warning: a problem")
    assert capsys.readouterr() == ("a line\n", "warning: a problem\n")
    with console.shown(False), console.Progress("hidden", 10):
        pass
    assert not any("hidden" in html for html in outputs)
