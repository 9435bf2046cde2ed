"""The query language of runs, its index, annotations, and removal."""

import json
import os
import time

import pytest

from cvlab.config import loading, strict_yaml
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import annotations, index, query, removal
from cvlab.runs.run_dir import RunDir
from cvlab.storage.lock import RunLock

NAME = "2026112{}-120000-{}-000{}"


def make_run(root, number, name="bn", status="done", metrics=None, config="", age=3600.0):
    path = root / NAME.format(number % 10, name, number % 10)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"experiment: classify\nname: {name}\n{config}")
    (path / "status.json").write_text(json.dumps({"status": status, "experiment": "classify", "data": "cifar10"}))
    info = {key: {"unit": "", "better": "higher"} for key in metrics or {}}
    (path / "summary.json").write_text(json.dumps({"name": name, "metrics": metrics or {}, "metric_info": info}))
    for file in path.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    return path


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    make_run(root, 1, "bn", metrics={"val_accuracy": 0.8}, config="optimizer: {name: adam, lr: 0.001}\nseed: 1\n")
    make_run(root, 2, "no_bn", metrics={"val_accuracy": 0.6}, config="optimizer: {name: sgd, lr: 1e-1}\nema: null\n")
    make_run(root, 3, "vgg", "failed", config="model: {name: vgg, filters: [16, 32], batchnorm: true}\n")
    annotations.update(root / NAME.format(1, "bn", 1), lambda _: annotations.Annotations(("base", "x"), "a note", True))
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "123"),
        ("status=done", "12"),
        ("status=done|failed val_accuracy>0.7", "1"),
        ("val_accuracy >= 0.6", "12"),
        ("val_accuracy<=0.6", "2"),
        ("val_accuracy!=0.6", "13"),  # includes the run without the metric
        ("val_accuracy!=0.6 val_accuracy!=null", "1"),
        ("val_accuracy=null", "3"),
        ("optimizer.lr=1e-3", "1"),
        ("optimizer.lr>0.01", "2"),
        ("optimizer=adam", "1"),
        ("seed=1", "1"),
        ("model.filters=[16,32]", "3"),
        ("model.filters='[16, 32]'", "3"),
        ("model.batchnorm=true", "3"),
        ("model.filters~16", "3"),
        ("ema=null", "123"),
        ("name=bn", "1"),
        ("name~BN", "12"),
        ("name!~bn", "3"),
        ("kind=classify experiment=classify", "123"),
        ("tags=base", "1"),
        ("tags!=base", "23"),
        ("tags~BA", "1"),
        ("tags=null", "23"),
        ("starred=true", "1"),
        ("starred=false", "23"),
        ("note~'a NOTE'", "1"),
        ("started>=2026-11-22", "23"),
        ("started=2026-11-22", "2"),
        ("started>2026-11-22", "3"),
        ("started<2026-11-21T12:00", ""),
        ("age<1s", ""),
        ("config.seed=1", "1"),
        ("val_accuracy>0.9", ""),
    ],
)
def test_a_query_selects(root, text, expected):
    if "age" in text:
        for path in sorted(root.glob("2*")):  # started in the past, whatever the date is
            path.rename(root / path.name.replace("2026", "2020"))
    assert "".join(record.run[7] for record in query.search(root, text)[0]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_acuracy>0.7", "column 1: .*'val_acuracy'.*did you mean 'val_accuracy'"),
        ("status=done model.namee=x", "column 13: .*'model.namee'.*did you mean 'model.name'"),
        ("status=dnoe", "column 8: no status 'dnoe'; did you mean 'done'"),
        ("status", "column 7: expected an operator after 'status'"),
        ("status=", "column 8: expected a value"),
        ("=x", "column 1: expected a key"),
        ("note='x", "column 6: expected a value"),
        ("a=b=c", "column 3: expected a value, got 'b=c'"),
        ("val_accuracy>high", "column 14: > compares numbers, and 'high' is none"),
        ("name>3", "column 6: name is text"),
        ("age<3", "column 5: age is compared by"),
        ("age=3d", "column 5: age is compared by"),
        ("started>yesterday", "column 9: started is compared with a date"),
        ("starred=yes", "column 9: starred is true or false"),
        ("x=1 " * 60, "more than 50 conditions"),
        ("x" * 3000, "longer than"),
    ],
)
def test_an_invalid_query_gives_a_one_line_error_with_the_column(root, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        query.search(root, text)
    assert "\n" not in str(error.value)


def test_the_fast_yaml_parser_gives_the_same_result():
    for name in loading.shipped_names():
        path = loading.shipped_folder() / f"{name}.yaml"
        fast, slow = strict_yaml.read(path, strict_yaml.FAST_LOADER), strict_yaml.read(path)
        assert repr(fast.value) == repr(slow.value), name


def test_select_takes_names_and_queries(root, tmp_path):
    assert [path.name[7] for path in query.select(["no_bn", "val_accuracy>0.5"], root)] == ["2", "1"]
    with pytest.raises(RunDirError, match=r"no run in .* fulfills"):
        query.select(["status=running"], root)
    with pytest.raises(ConfigError, match="2 runs fulfill"):
        query.select(["status=done"], root, limit=1)
    assert query.search(tmp_path / "none", "anything>3")[0] == []


class TestIndex:
    @pytest.fixture
    def root(self, tmp_path):
        for number in range(index.MIN_ROWS_TO_WRITE + 5):
            path = make_run(tmp_path, 1, f"r{number:03d}", metrics={"val_accuracy": number / 100})
            assert path.is_dir()
        return tmp_path

    def test_the_index_is_written_and_read(self, root, monkeypatch):
        first = index.load(root, with_config=True)
        assert (root / index.FILE).is_file()
        monkeypatch.setattr(index, "_read", lambda *_: 1 / 0)
        assert index.load(root, with_config=True) == first
        assert [record.metrics for record in index.load(root)] == [record.metrics for record in first]

    def test_changes_are_detected(self, root):
        index.load(root, with_config=True)
        path = sorted(root.glob("2*"))[3]
        (path / "summary.json").write_text(json.dumps({"metrics": {"val_accuracy": 0.99}}))
        annotations.update(path, lambda _: annotations.Annotations(starred=True))
        removal.remove(sorted(root.glob("2*"))[0])
        records = index.load(root)
        assert len(records) == index.MIN_ROWS_TO_WRITE + 4
        assert records[2].metrics == {"val_accuracy": 0.99}
        assert records[2].starred

    def test_a_recently_written_file_is_not_cached(self, root):
        """A second change may leave modification time, size and inode unchanged."""
        path = sorted(root.glob("2*"))[0] / "summary.json"
        path.write_text('{"metrics": {"val_accuracy": 0.1}}')
        before = path.stat()
        index.load(root)
        with path.open("r+") as file:
            file.write('{"metrics": {"val_accuracy": 0.2}}')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert index.load(root)[0].metrics == {"val_accuracy": 0.2}

    @pytest.mark.parametrize("damage", ["empty", "cut", "bit", "other", "folder", "link", "row"])
    def test_a_damaged_index_is_ignored(self, root, damage):
        expected, file = index.load(root), root / index.FILE
        content = file.read_bytes()
        if damage == "row":
            rows = index._read_cache(root)
            for row in rows.values():
                row[1][1:3] = [7, None]
            index._write_cache(root, rows)
        else:
            file.unlink()
        if damage in ("folder", "link"):
            file.mkdir() if damage == "folder" else file.symlink_to("/dev/zero")
        elif damage != "row":
            damaged = {"empty": b"", "cut": content[:-9], "bit": content.replace(b"0.1", b"0.9"), "other": b"{}\n{}"}
            file.write_bytes(damaged[damage])
        assert index.load(root) == expected

    def test_a_read_only_folder_can_be_listed(self, root, monkeypatch):
        def fail(*_):
            raise PermissionError("read-only")

        monkeypatch.setattr(type(root), "write_bytes", fail)
        assert len(index.load(root)) == index.MIN_ROWS_TO_WRITE + 5
        assert not list(root.glob(f"{index.FILE}*"))

    def test_the_running_status_is_not_cached(self, root):
        path = sorted(root.glob("2*"))[0]
        (path / "status.json").write_text('{"status": "running"}')
        os.utime(path / "status.json", (1, 1))
        index.load(root)
        assert index.load(root)[0].status == "interrupted"  # no process holds its lock


class TestAnnotations:
    def test_tags_are_added_and_removed(self, root):
        path = root / NAME.format(1, "bn", 1)
        annotations.update(path, lambda now: annotations.with_tags(now, ("y",), ("base", "nothing")))
        assert annotations.read(path) == annotations.Annotations(("x", "y"), "a note", True)

    @pytest.mark.parametrize("tag", ["", "a b", "a,b", "a=b", "x" * 61, "a\nb"])
    def test_invalid_tags_are_rejected(self, tag):
        with pytest.raises(ConfigError, match="a tag is one word"):
            annotations.check_tag(tag)

    def test_a_damaged_file_is_rejected(self, root):
        path = root / NAME.format(1, "bn", 1)
        (path / annotations.FILE).write_text('{"tags": 3}')
        with pytest.raises(RunDirError, match="not the annotations"):
            annotations.update(path, lambda now: now)
        assert index.load(root)[0].status == "damaged"


class TestRemoval:
    def test_a_run_is_removed_completely(self, root):
        path = root / NAME.format(1, "bn", 1)
        (path / "big").write_bytes(b"x" * 1000)
        os.link(path / "big", path / "same")
        assert 1000 < removal.remove(path) < 2000
        assert not [entry for entry in root.iterdir() if "-bn-" in entry.name]

    def test_a_running_run_is_not_removed(self, root, monkeypatch):
        path = root / NAME.format(1, "bn", 1)
        monkeypatch.setattr(removal, "is_held", lambda folder: folder == path)
        with pytest.raises(RunDirError, match="running; nothing was removed"):
            removal.remove(path)
        assert (path / "config.yaml").is_file()

    def test_a_trial_is_not_removed(self, root):
        trial = make_run(root / NAME.format(2, "no_bn", 2) / "trials", 1)
        with pytest.raises(RunDirError, match="a trial of the sweep"):
            removal.remove(trial)
        assert "trial of the sweep" in removal.prune(trial, dry_run=False)["skipped"]

    def test_a_sweep_with_a_running_trial_is_not_removed(self, root, monkeypatch):
        sweep = root / NAME.format(2, "no_bn", 2)
        trial = make_run(sweep / "trials", 1)
        monkeypatch.setattr(removal, "is_held", lambda folder: folder == trial)
        with pytest.raises(RunDirError, match=r"its trial .* is running"):
            removal.remove(sweep)

    def test_an_interrupted_removal_leaves_no_partial_run(self, root, monkeypatch):
        def kill(_):
            raise KeyboardInterrupt

        path = root / NAME.format(1, "bn", 1)
        monkeypatch.setattr(removal, "reach", kill)
        with pytest.raises(KeyboardInterrupt):
            removal.remove(path)
        assert [record.run[7] for record in index.load(root)] == ["2", "3"]
        assert len(list(root.glob(f"{removal.TRASH}*"))) == 1
        assert removal.empty_trash(root) > 0
        assert not list(root.glob(f"{removal.TRASH}*"))

    def test_prune_keeps_the_best_and_the_last(self, root):
        torch = pytest.importorskip("torch")
        from cvlab.runs import checkpoint

        path = root / NAME.format(1, "bn", 1)
        with RunDir(path).locked():
            for step in (1, 2, 3):
                state = {"model": {"w": torch.zeros(10)}, "step": step}
                checkpoint.save(path / "checkpoints", step, state, is_best=step == 2)
        plan = removal.prune(path, dry_run=True)
        assert plan["removed"] == ["step_000000002.pt"]
        assert plan["bytes"] == 0  # it is a hard link of the best checkpoint
        assert len(list((path / "checkpoints").iterdir())) == 3
        assert removal.prune(path, dry_run=False) == plan
        assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["best.pt", "step_000000003.pt"]
        assert removal.prune(path, dry_run=False)["removed"] == []

    def test_prune_keeps_all_if_the_last_is_damaged(self, root):
        torch = pytest.importorskip("torch")
        from cvlab.runs import checkpoint

        path = root / NAME.format(1, "bn", 1)
        for step in (1, 2):
            checkpoint.save(path / "checkpoints", step, {"model": {"w": torch.zeros(10)}, "step": step})
        checkpoint.path_of(path / "checkpoints", 2).write_bytes(b"x")
        assert "damaged" in removal.prune(path, dry_run=False)["skipped"]
        assert checkpoint.steps(path / "checkpoints") == [1, 2]

    def test_prune_skips_a_run_that_may_be_resumed(self, root):
        assert "resumed" in removal.prune(root / NAME.format(3, "vgg", 3), dry_run=False)["skipped"]

    def test_the_lock_is_free_afterwards(self, root):
        path = root / NAME.format(1, "bn", 1)
        removal.remove(path)
        lock = RunLock(root)
        lock.acquire()
        lock.release()
