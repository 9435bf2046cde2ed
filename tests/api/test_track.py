"""What trackers have logged, read with the libraries of the trackers."""

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
EXPECTED = {
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


def select(metrics):
    return {name: metrics[name] for name in EXPECTED}


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # logging twice gives one run
        assert "tensorboard --logdir" in track.log_run(run, "tensorboard", follow=False)
    events = EventAccumulator(str(run / "trackers" / "tensorboard"))
    events.Reload()
    scalars = {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert select(scalars) == EXPECTED
    assert set(scalars) == set(EXPECTED)
    assert "optimizer.lr: 0.01" in str(events.Tensors("configuration/text_summary")[0].tensor_proto.string_val)
    assert "baseline" in str(events.Tensors("tags/text_summary")[0].tensor_proto.string_val)
    (picture,) = events.Images("plots/val_confusion")
    assert (picture.width, picture.height, picture.step) == (8, 6, 3)


@needs("mlflow")
@needs("sqlalchemy")
@pytest.mark.filterwarnings("ignore")
def test_mlflow(run):
    import mlflow

    for _ in range(2):
        track.log_run(run, "mlflow", follow=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("detector").experiment_id])
    assert logged.info.run_name == run.name
    assert logged.info.status == "FINISHED"
    assert logged.data.params["optimizer.lr"] == "0.01"
    assert set(logged.data.metrics) == set(EXPECTED)
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(logged.info.run_id, name)] for name in EXPECTED
    }
    assert history == EXPECTED
    assert (logged.data.tags["baseline"], logged.data.tags["mlflow.note.content"]) == ("true", "a note")
    assert (run.parent / "mlartifacts" / logged.info.run_id / "artifacts" / "plots" / "val_confusion.png").is_file()


def records(content, block=32768, head=7):
    """Yield the records of a .wandb file, a log as LevelDB writes it: pieces of (checksum, length, kind), in blocks."""
    position, record = head, b""
    while position + head <= len(content):
        if block - position % block < head:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + head])
        record += content[position + head : position + head + length]
        position += head + length
        if kind in (1, 4):  # a full record, or the last piece of one
            yield record
            record = b""


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(run):
    import wandb
    from wandb.proto import wandb_internal_pb2

    hint = track.log_run(run, "wandb", follow=False)
    wandb.teardown()  # its background process may write the last records only when it ends
    (file,) = (run / "trackers").rglob("*.wandb")
    assert hint == f"wandb sync {file.parent}"
    metrics, pictures = {}, []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        pictures += [name for name, value in items.items() if isinstance(value, dict)]
        for name, value in items.items():
            if not name.startswith("_") and name.rpartition("/")[0] != "plots":
                metrics.setdefault(name, []).append((items.get("_step", record.history.step.num), value))
    assert select(metrics) == EXPECTED


def test_a_run_is_followed_until_it_ends(run, monkeypatch):
    logged, pictures = [], []

    class Fake:
        package = "json"
        extra = "fake"

        def __init__(self, path, config):
            logged.append(config["seed"])

        def log(self, metrics, step):
            logged.append((step, metrics))

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
    hint = track.log_run(run, "fake", True, sleep=lambda _: out.append({"step": len(logged), "x": 1.0}))
    assert hint == "done"
    assert logged[0] == 3
    assert [entry[0] for entry in logged[1:]] == [1, 2, 3, 4, 5, 5]
    assert "final/train_loss" in logged[-1][1]
    assert pictures == [("plots/val_confusion", (8, 6), 5), (("baseline",), "a note")]


def test_each_step_is_logged_once_if_the_run_is_resumed_meanwhile(run, monkeypatch):
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


def test_unknown_and_missing_trackers_are_rejected(cvlab, run, monkeypatch):
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
def test_mlflow_accepts_any_class_name(run):
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
def test_a_failing_tracker_closes_its_run_as_failed(run, monkeypatch, error):
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
    for _ in range(2):  # logging twice gives one run
        hint = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "trackio show --project cvlab" in hint
    (database,) = (run.parent / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [row["train_loss"] for row in rows if "train_loss" in row] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert any("plots/val_confusion" in row for row in rows)
