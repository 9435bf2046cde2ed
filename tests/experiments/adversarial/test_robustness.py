"""Robustness of training runs: accuracies that agree with `eval`, an interrupted evaluation, errors."""

import json

import pytest

import cvlab as api
from benchmarks import attacks
from cvlab.errors import StoppedError
from cvlab.experiments.adversarial import robustness

TINY = {
    "duration": {"steps": 30},
    "data.num_train": 500,
    "eval_every": 1000,
    "expect": [],
    "evaluate_test": False,
    "model.filters": [6],
    "model.pools": [0],
}
SMALL = ("num_images=60", "batch_size=25", "steps=3", "queries=5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """Return the run directories of two small classifiers, by name."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        runs = {}
        for seed, name in enumerate(("first", "second")):
            runs[name] = str(api.train("quickstart", TINY | {"name": name}, seed=seed, runs_dir=folder).path)
    return runs


def test_accuracies_decrease_with_the_bound(trained, cvlab):
    run = trained["first"]
    arguments = ("attack", run, "--on", "val", *SMALL, "expect=['robust_accuracy/8 >= 0']")
    code, out, err = cvlab(*arguments, "--eps", "0,2,8", "--method", "fgsm,pgd,square", "--corrupt", "all", "--json")
    assert code == 0, err
    result = json.loads(out)
    metrics = result["metrics"]
    assert metrics["images"] == 60
    for name in ("fgsm", "pgd", "square", "robust"):
        assert metrics["accuracy"] >= metrics[f"{name}_accuracy/2"] >= metrics[f"{name}_accuracy/8"]
    for eps in (2, 8):
        assert metrics[f"pgd_accuracy/{eps}"] <= metrics[f"fgsm_accuracy/{eps}"]
        assert metrics[f"robust_accuracy/{eps}"] <= min(metrics[f"{m}_accuracy/{eps}"] for m in ("pgd", "square"))
    assert metrics["robust_accuracy/8"] < metrics["accuracy"]
    corrupted = [metrics[f"{name}_accuracy/{k}"] for name in ("noise", "blur", "contrast", "jpeg") for k in range(1, 6)]
    assert metrics["corrupted_accuracy"] == pytest.approx(sum(corrupted) / 20)
    assert {"plots/robustness.png", "report.html", "config.yaml"} <= set(result["files"])
    assert f"at 8/255, {metrics['corrupted_accuracy']:.3f} under corruptions" in result["headline"]
    repeated = json.loads(cvlab("run", f"{result['run']}/config.yaml", "batch_size=60", "--json")[1])
    assert repeated["metrics"] == metrics  # independent of the batch size


def test_the_accuracy_equals_that_of_eval(trained, cvlab):
    arguments = ("attack", trained["first"], "--on", "test", "num_images=10_000", "--method", "fgsm", "--eps", "1")
    code, out, _ = cvlab(*arguments)
    assert code == 0
    assert "eps in 1/255" in out
    evaluated = json.loads(cvlab("eval", trained["first"], "--json")[1])["metrics"]
    assert f"accuracy {evaluated['test_accuracy']:.3f}, " in out


def test_an_interrupted_evaluation_continues(trained, cvlab, monkeypatch):
    arguments = ("attack", trained["first"], "--on", "val", *SMALL, "--corrupt", "noise", "--json")
    expected = json.loads(cvlab(*arguments)[1])["metrics"]
    measure_batch = robustness._measure_batch
    batches = []

    def stop_in_second_batch(config, classifiers, batch, check_interrupt):
        batches.append(batch)
        if len(batches) == 2:
            raise StoppedError("stopped for a test", "", 130)
        return measure_batch(config, classifiers, batch, check_interrupt)

    with monkeypatch.context() as patch:
        patch.setattr(robustness, "_measure_batch", stop_in_second_batch)
        assert cvlab(*arguments)[0] == 130
        code, out, err = cvlab("resume", "latest", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"] == expected
    assert batches == [slice(0, 25), slice(25, 50), slice(25, 50), slice(50, 60)]


def test_several_runs_have_a_transfer_matrix(trained, cvlab, tmp_path):
    code, out, err = cvlab("attack", *trained.values(), "--on", "test", *SMALL, "--eps", "16", "--json")
    assert code == 0, err
    result = json.loads(out)
    labels = sorted({name.split(":")[0] for name in result["metrics"] if ":" in name})
    assert [label.rpartition("-")[0] for label in labels] == ["first", "second"]
    for a in labels:
        white_box_accuracy = result["metrics"][f"{a}:transfer_accuracy/{a}"]
        assert white_box_accuracy <= result["metrics"][f"{a}:accuracy"]
        assert all(white_box_accuracy <= result["metrics"][f"{b}:transfer_accuracy/{a}"] for b in labels)
    header, *rows = (tmp_path / result["run"] / "transfer.csv").read_text().splitlines()
    assert header.split(",") == ["examples against", *labels]
    assert [row.split(",")[0] for row in rows] == labels


def test_errors_are_one_line(trained, cvlab):
    run = trained["first"]
    detector = "configs/../nothing"
    for arguments, text in [
        ((), "no run is named"),
        (("efficientnet_lite0",), "is a pretrained network; the robustness of training runs is measured"),
        ((detector,), "nothing"),
        ((run, run), "a run is named twice"),
        ((run, "--method", "fgms"), "methods"),
        ((run, "--eps", "300"), "eps"),
        ((run, "--eps", "two"), "--eps two: not numbers separated by commas"),
        ((run, "--corrupt", "fog"), "corruptions"),
        ((run, "--target", "ostrich"), "--target has no effect with --on"),
        ((run, "precision=bfloat16"), "precision"),
        ((run, "methods=[]"), "neither methods nor corruptions are given"),
    ]:
        code, _, err = cvlab("attack", *arguments, "--on", "test", *SMALL)
        assert code == 2, arguments
        assert text in err, err
        assert err.count("\n") <= 2, err
    assert cvlab("attack", run, "--on", "dev")[0] == 2
    assert "--corrupt needs --on" in cvlab("attack", "sample", "--corrupt", "all")[2]
    assert "one number for photos" in cvlab("attack", "sample", "--eps", "1,2", "--method", "pgd")[2]


def test_a_run_without_the_split_is_a_one_line_error_before_anything_is_written(cvlab, tmp_path):
    tiny = ("data={name: scenes10, num_train: 40, val_fraction: 0}", "batch_size=20", "duration={steps: 2}")
    code, _, err = cvlab("train", "quickstart", *tiny, "evaluate_test=false", "expect=[]", "threads=1", "-q")
    assert code == 0, err
    runs = set((tmp_path / "runs").iterdir())
    code, _, err = cvlab("attack", "latest", "--on", "val", *SMALL)
    assert code == 2
    assert "has no val split (data.val_fraction: 0); use train or test" in err
    assert set((tmp_path / "runs").iterdir()) == runs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of the libraries
def test_accuracies_match_other_libraries(trained, capsys):
    attacks.main([trained["first"], "--eps", "2", "--images", "60", "--steps", "5", "--queries", "10", "--json"])
    rows = {row["attack"]: row for row in json.loads(capsys.readouterr().out)["attacks"]}
    assert list(rows) == ["none", "fgsm", "pgd", "apgd_ce", "apgd_dlr", "square"]
    assert rows["pgd"]["cvlab"] <= rows["fgsm"]["cvlab"] < rows["none"]["cvlab"]
    for name, row in rows.items():
        for library in attacks.LIBRARIES:
            if row[library] is not None:
                assert row[library] == pytest.approx(row["cvlab"], abs=0.1 if name == "square" else 0.05), name
