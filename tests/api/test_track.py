"""What trackers were told, read back with their own libraries."""

import contextlib
import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys

import pytest
from PIL import Image

from cvlab.api import track
from cvlab.runs import annotations
from cvlab.runs.run_dir import RunDir

ROWS = [{"step": k, "epoch": k / 2, "seconds": 1.0, "train_loss": 2.0 / k, "val_map50": 0.25 * k} for k in (1, 2, 3)]
WANTED = {
    "train_loss": [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3, abs=1e-6))],
    "val_map50": [(1, 0.25), (2, 0.5), (3, 0.75)],
    "final/train_loss": [(3, 0.5)],
    "final/ap50/dog": [(3, 0.125)],
}


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "20261125-120000-x-0001"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("experiment: detector\nseed: 3\noptimizer: {name: adam, lr: 0.01}\n")
    out = RunDir(path)
    for row in ROWS:
        out.append(row)
    out.write_json("summary.json", {"metrics": {"train_loss": 0.5, "ap50/dog": 0.125}, "expect": []})
    out.set_status("done")
    out.folder("plots")
    Image.new("RGB", (8, 6), "red").save(path / "plots" / "val_confusion.png")
    (path / "plots" / "broken.png").write_text("no picture")
    annotations.update(path, lambda _: annotations.Annotations(("baseline",), "a note"))
    return path


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def told(found):
    return {name: found[name] for name in WANTED}


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # told twice, it is there once
        assert "tensorboard --logdir" in track.log_run(run, "tensorboard", follow=False)
    read = EventAccumulator(str(run / "trackers" / "tensorboard"))
    read.Reload()
    found = {tag: [(e.step, pytest.approx(e.value)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert told(found) == WANTED
    assert set(found) == set(WANTED)
    assert "optimizer.lr: 0.01" in str(read.Tensors("configuration/text_summary")[0].tensor_proto.string_val)
    assert "baseline" in str(read.Tensors("tags/text_summary")[0].tensor_proto.string_val)
    (picture,) = read.Images("plots/val_confusion")
    assert (picture.width, picture.height, picture.step) == (8, 6, 3)


@needs("mlflow")
@needs("sqlalchemy")
@pytest.mark.filterwarnings("ignore")
def test_mlflow(run):
    import mlflow

    for _ in range(2):
        track.log_run(run, "mlflow", follow=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("detector").experiment_id])
    assert found.info.run_name == run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.01"
    assert set(found.data.metrics) == set(WANTED)
    history = {name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)] for name in WANTED}
    assert history == WANTED
    assert (found.data.tags["baseline"], found.data.tags["mlflow.note.content"]) == ("true", "a note")
    assert (run.parent / "mlartifacts" / found.info.run_id / "artifacts" / "plots" / "val_confusion.png").is_file()


def records(content, block=32768, head=7):
    """Yield the records of a .wandb file, a log as LevelDB writes it: pieces of (checksum, length, kind), in blocks."""
    at, whole = head, b""
    while at + head <= len(content):
        if block - at % block < head:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + head])
        whole += content[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(run):
    import wandb
    from wandb.proto import wandb_internal_pb2

    look = track.log_run(run, "wandb", follow=False)
    wandb.teardown()  # its background process may write the last records only when it ends
    (file,) = (run / "trackers").rglob("*.wandb")
    assert look == f"wandb sync {file.parent}"
    found, pictures = {}, []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        pictures += [name for name, value in items.items() if isinstance(value, dict)]
        for name, value in items.items():
            if not name.startswith("_") and name.rpartition("/")[0] != "plots":
                found.setdefault(name, []).append((items.get("_step", record.history.step.num), value))
    assert told(found) == WANTED


def test_a_run_is_followed_until_it_ends(run, monkeypatch):
    heard, pictures = [], []

    class Fake:
        package = "json"
        extra = "fake"

        def __init__(self, path, config):
            heard.append(config["seed"])

        def log(self, metrics, step):
            heard.append((step, metrics))

        def log_image(self, name, image, step):
            pictures.append((name, image.size, step))

        def annotate(self, tags, note):
            pictures.append((tags, note))

        def close(self, status):
            return status

    out = RunDir(run)
    states = iter(["running", "running", "done", "done"])
    monkeypatch.setitem(track.TRACKERS, "fake", Fake)
    monkeypatch.setattr(track, "read_status", lambda path: {"status": next(states)})
    found = track.log_run(run, "fake", True, sleep=lambda _: out.append({"step": len(heard), "x": 1.0}))
    assert found == "done"
    assert heard[0] == 3
    assert [entry[0] for entry in heard[1:]] == [1, 2, 3, 4, 5, 5]
    assert "final/train_loss" in heard[-1][1]
    assert pictures == [("plots/val_confusion", (8, 6), 5), (("baseline",), "a note")]


def test_a_run_that_was_resumed_meanwhile_is_logged_once(run, monkeypatch):
    logged = []
    monkeypatch.setattr(track.TensorBoard, "__init__", lambda self, path, config: None)
    monkeypatch.setattr(track.TensorBoard, "log", lambda self, metrics, step: logged.append((step, dict(metrics))))
    monkeypatch.setattr(track.TensorBoard, "log_image", lambda *_: None)
    monkeypatch.setattr(track.TensorBoard, "annotate", lambda *_: None)
    monkeypatch.setattr(track.TensorBoard, "close", lambda *_: "")
    states = iter(["running", "running", "done", "done"])
    monkeypatch.setattr(track, "read_status", lambda path: {"status": next(states)})
    monkeypatch.setattr(track, "require_installed", lambda kind: None)
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    later = iter([b"".join(lines[:2]), b"".join(lines) + b'{"step": 4, "train_loss": 0.25}\n'])
    track.log_run(run, "tensorboard", True, sleep=lambda _: file.write_bytes(next(later)))
    assert [step for step, metrics in logged if "train_loss" in metrics] == [1, 2, 3, 4]


def test_refusals(cvlab, run, monkeypatch):
    code, _, err = cvlab("track", run, "--to", "tensorbord")
    assert code == 2
    assert "did you mean 'tensorboard'" in err
    monkeypatch.setattr(track.Wandb, "package", "not_there_at_all")
    code, _, err = cvlab("track", run, "--to", "wandb")
    assert code == 2
    assert "pip install -e '.[wandb]'" in err


@needs("mlflow")
@needs("sqlalchemy")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_any_name_of_a_class(run):
    import mlflow

    names = ("person (sitting)", "traffic light", "caf\u00e9", "caf\u00e8", "a=b", "x,y", "100%", "", "../x", "a//b")
    metrics = {"train_loss": 0.5} | {f"ap50/{name}": 0.5 for name in names}
    RunDir(run).write_json("summary.json", {"metrics": metrics, "expect": []})
    track.log_run(run, "mlflow", follow=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("detector").experiment_id])
    assert len([name for name in logged.data.metrics if name.startswith(("final/ap50/", "final_ap50_"))]) == len(names)
    assert "final/ap50/person _sitting_" in logged.data.metrics


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_tracker_that_fails_leaves_no_run_running(run, monkeypatch, error):
    statuses = []

    class Fake:
        package = "json"
        extra = "fake"

        def __init__(self, path, config):
            pass

        def log(self, metrics, step):
            raise error

        def close(self, status):
            statuses.append(status)

    monkeypatch.setitem(track.TRACKERS, "fake", Fake)
    with pytest.raises(error):
        track.log_run(run, "fake", follow=False)
    assert statuses == ["failed"]


@needs("trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio(run):
    command = [sys.executable, "-m", "cvlab", "track", str(run), "--to", "trackio"]  # it reads its folder when imported
    for _ in range(2):  # logged again, it is there once
        look = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "trackio show --project cvlab" in look
    (database,) = (run.parent / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [row["train_loss"] for row in rows if "train_loss" in row] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert any("plots/val_confusion" in row for row in rows)
