"""Export and import of runs: round trips, and archives that are rejected."""

import json
import pickle
import shutil
import warnings
import zipfile

import pytest

from cvlab.errors import ConfigError, DataError, RunDirError, StoppedError
from cvlab.runs import archive, checkpoint
from cvlab.runs.find import list_runs
from tests import tiny
from tests.engine.test_resume import stop_at

NAME = "20261127-093000-tiny-0123"


def read_files(path):
    """Return the bytes of all files of a folder, except those of locks."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != archive.LOCK_FILE]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Return the run directory of a training run that was stopped after half of its steps."""
    path = tmp_path_factory.mktemp("runs") / NAME
    config = tiny.settings()
    with pytest.raises(StoppedError):
        tiny.train(path, config, stop_at(tiny.STEPS // 2))
    (path / "config.yaml").write_text(config.to_yaml())
    (path / "status.json").write_text('{"status": "interrupted", "step": 16}\n')
    (path / "net.py").write_text("raise SystemExit('this code must not run')\n")
    (path / "trackers").mkdir()
    (path / "trackers" / "events").write_text("not part of the run")
    return path


@pytest.fixture
def archive_file(stopped_run, tmp_path):
    """Return an archive of that run."""
    archive.export_runs([stopped_run], tmp_path / "runs.zip")
    return tmp_path / "runs.zip"


def test_an_imported_run_resumes_bitwise_identically(stopped_run, archive_file, tmp_path):
    (row,) = archive.import_runs(archive_file, tmp_path / "there")
    moved = tmp_path / "there" / NAME
    assert (row["run"], row["has_checkpoints"], row["has_code"]) == (NAME, True, True)
    exported = read_files(stopped_run)
    assert read_files(moved) == {name: data for name, data in exported.items() if not name.startswith("trackers")}
    assert list_runs(tmp_path / "there") == [moved]
    copy = tmp_path / "copy"
    shutil.copytree(stopped_run, copy)
    _, expected = tiny.train(copy)
    _, resumed = tiny.train(moved)
    assert resumed["weights_sha256"] == expected["weights_sha256"]
    assert tiny.rows(moved) == tiny.rows(copy)


def test_export_without_checkpoints(stopped_run, tmp_path, cvlab):
    shutil.copytree(stopped_run, tmp_path / "runs" / NAME)
    (tmp_path / "runs" / f"{NAME[:-1]}4").mkdir()
    shutil.copy(stopped_run / "config.yaml", tmp_path / "runs" / f"{NAME[:-1]}4")
    code, out, _ = cvlab("runs", "export", NAME, "status!=done", tmp_path / "a.zip", "--without-checkpoints")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [NAME, f"{NAME[:-1]}4", "a.zip"]
    code, out, _ = cvlab("runs", "import", tmp_path / "a.zip", "--runs-dir", tmp_path / "there", "--json")
    assert [row["has_checkpoints"] for row in json.loads(out)["runs"]] == [False, False]
    assert not (tmp_path / "there" / NAME / "checkpoints").exists()
    code, _, err = cvlab("runs", "import", tmp_path / "a.zip", "--runs-dir", tmp_path / "there")
    assert code == 5
    assert f"{NAME}: exists already, nothing was imported" in err
    assert f"cvlab runs rm {NAME}" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", NAME), 2, "last the file to write"),
        (("export", "x.zip"), 2, "last the file to write"),
        (("export", "nothing", "x.zip"), 5, "no run 'nothing'"),
        (("import", "missing.zip"), 4, "missing.zip: no such file"),
        (("import", "README"), 4, "README: not an archive of runs"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(cvlab, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("no zip")
    exit_code, _, err = cvlab("runs", *arguments)
    assert exit_code == code
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_exports_that_are_rejected(stopped_run, archive_file, tmp_path, monkeypatch):
    before = archive_file.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        archive.export_runs([stopped_run], archive_file)
    with pytest.raises(ConfigError, match="two runs are called"):
        archive.export_runs([stopped_run, stopped_run], tmp_path / "two.zip")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "obstacle", lambda path: "running")
        with pytest.raises(RunDirError, match="running"):
            archive.export_runs([stopped_run], tmp_path / "running.zip")
    linked = tmp_path / "linked"
    shutil.copytree(stopped_run, linked)
    (linked / "log.txt").unlink()
    (linked / "log.txt").symlink_to("/etc/hostname")
    with pytest.raises(RunDirError, match=r"log\.txt: it is a link"):
        archive.export_runs([linked], tmp_path / "linked.zip")
    assert [path.name for path in tmp_path.glob("*.zip")] == ["runs.zip"]
    assert archive_file.read_bytes() == before


@pytest.mark.parametrize("point", ["mid_export", "mid_import", "before_rename"])
def test_an_interrupted_export_or_import_leaves_nothing(stopped_run, archive_file, tmp_path, monkeypatch, point):
    def stop(name):
        if name == point:
            raise KeyboardInterrupt

    for module in (archive, archive.atomic):
        monkeypatch.setattr(module, "reach", stop)
    there = tmp_path / "there"
    with pytest.raises(KeyboardInterrupt):
        archive.export_runs([stopped_run], tmp_path / "new.zip") if point != "mid_import" else archive.import_runs(
            archive_file, there
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path != there) == ["runs.zip"]
    assert not there.exists() or list(there.iterdir()) == []


def rewrite(archive_file, change):
    """Rewrite an archive after `change(members, manifest)` has modified its files (name to bytes) and its manifest."""
    with zipfile.ZipFile(archive_file) as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    manifest = json.loads(members.pop(archive.MANIFEST))
    change(members, manifest)
    with zipfile.ZipFile(archive_file, "w") as target:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (0o120777 if name.endswith("linked") else 0o100644) << 16
            target.writestr(member, data)
        target.writestr(archive.MANIFEST, json.dumps(manifest))


def add_file(name, data, run=NAME):
    """Return a change that adds a file and lists it correctly in the manifest."""
    import hashlib

    def change(members, manifest):
        members[f"{run}/{name}"] = data
        entries = manifest["runs"].setdefault(run, {})
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    return change


def flip_bit(members, manifest):
    """Flip a bit of a checkpoint."""
    name = next(name for name in members if name.endswith(".pt"))
    members[name] = members[name][:500] + bytes([members[name][500] ^ 1]) + members[name][501:]


class Canary:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("canary", "w"))


def add_unlisted(members, manifest):
    """Add a member that is not in the manifest."""
    members[f"{NAME}/extra.txt"] = b"x"


def change_size(members, manifest):
    """List a wrong size in the manifest."""
    manifest["runs"][NAME]["config.yaml"]["bytes"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_bit, "checksum differs"),
        (add_file("../outside.txt", b"x"), "outside of its run"),
        (add_file("/tmp/outside.txt", b"x"), "outside of its run"),
        (add_file("a/../../outside.txt", b"x"), "outside of its run"),
        (add_file("config.yaml", b"x", run=".."), "is no name of a run"),
        (add_file("config.yaml", b"x", run="a\\b"), "is no name of a run"),
        (add_file("config.yaml", b"x", run="latest"), "is no name of a run"),
        (add_file("status.json", b"{}", run="other"), "other has no config.yaml"),
        (add_file("weights.pkl", pickle.dumps(Canary())), "is not a file of a run"),
        (add_file("net.so", b"x"), "is not a file of a run"),
        (add_file("model.pt", b"x"), "is not a file of a run"),
        (add_file(".hidden", b"x"), "is not a file of a run"),
        (add_file("linked", b"/etc/passwd"), "no plain file"),
        (add_file("checkpoints/step_000000001.pt", pickle.dumps(Canary())), "not a checkpoint of cvlab"),
        (add_unlisted, "is not in manifest.json"),
        (change_size, "another size than manifest.json says"),
        (lambda members, manifest: members.pop(f"{NAME}/config.yaml"), "is missing"),
        (lambda members, manifest: manifest.update(format="cvlab runs 9"), "is not one that cvlab"),
        (lambda members, manifest: manifest.update(runs=[]), "is not one that cvlab"),
    ],
)
def test_a_modified_archive_imports_nothing(archive_file, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    rewrite(archive_file, change)
    with pytest.raises(DataError) as error:
        archive.import_runs(archive_file, tmp_path / "there")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "there") == ["runs.zip"]
    assert not (tmp_path / "there").exists() or list((tmp_path / "there").iterdir()) == []


def test_a_pickle_with_a_valid_checksum_is_not_executed(stopped_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    copy = tmp_path / "copy"
    shutil.copytree(stopped_run, copy)
    checkpoint.write(copy / "checkpoints" / "step_000000020.pt", {"step": 20, "canary": Canary()})
    archive.export_runs([copy], tmp_path / "evil.zip")
    with pytest.raises(DataError, match="not a valid checkpoint"):
        archive.import_runs(tmp_path / "evil.zip", tmp_path / "there")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["compressed", "twice", "overlapping"])
def test_invalid_zip_members_are_rejected(archive_file, tmp_path, kind):
    with zipfile.ZipFile(archive_file, "a") as target:
        member = zipfile.ZipInfo(f"{NAME}/log.txt" if kind == "twice" else f"{NAME}/added")
        if kind == "compressed":
            member.compress_type = zipfile.ZIP_DEFLATED
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # duplicate name
            target.writestr(member, b"0" * 100_000)
        if kind == "overlapping":
            target.infolist()[0].file_size = 10**12
    message = {"compressed": "compressed", "twice": "twice", "overlapping": "larger"}[kind]
    with pytest.raises(DataError, match=message):
        archive.import_runs(archive_file, tmp_path / "there")
