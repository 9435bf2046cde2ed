"""Runs in a zip file: what comes back, and what no archive can do."""

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


def content(path):
    """Return the bytes of all files of a folder, but of locks."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != archive.LOCK_FILE]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the run directory of a training that was stopped after half of its steps."""
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
def file(stopped, tmp_path):
    """Return an archive of that run."""
    archive.export_runs([stopped], tmp_path / "runs.zip")
    return tmp_path / "runs.zip"


def test_a_run_that_was_moved_resumes_with_the_same_bits(stopped, file, tmp_path):
    (row,) = archive.import_runs(file, tmp_path / "there")
    moved = tmp_path / "there" / NAME
    assert (row["run"], row["has_checkpoints"], row["has_code"]) == (NAME, True, True)
    here = content(stopped)
    assert content(moved) == {name: data for name, data in here.items() if not name.startswith("trackers")}
    assert list_runs(tmp_path / "there") == [moved]
    here_copy = tmp_path / "copy"
    shutil.copytree(stopped, here_copy)
    _, expected = tiny.train(here_copy)
    _, resumed = tiny.train(moved)
    assert resumed["weights_sha256"] == expected["weights_sha256"]
    assert tiny.rows(moved) == tiny.rows(here_copy)


def test_without_checkpoints(stopped, tmp_path, cvlab):
    shutil.copytree(stopped, tmp_path / "runs" / NAME)
    (tmp_path / "runs" / f"{NAME[:-1]}4").mkdir()
    shutil.copy(stopped / "config.yaml", tmp_path / "runs" / f"{NAME[:-1]}4")
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
def test_wrong_use_is_one_line(cvlab, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("no zip")
    status, _, err = cvlab("runs", *arguments)
    assert status == code
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_what_is_not_exported(stopped, file, tmp_path, monkeypatch):
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        archive.export_runs([stopped], file)
    with pytest.raises(ConfigError, match="two runs are called"):
        archive.export_runs([stopped, stopped], tmp_path / "two.zip")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "obstacle", lambda path: "running")
        with pytest.raises(RunDirError, match="running"):
            archive.export_runs([stopped], tmp_path / "running.zip")
    linked = tmp_path / "linked"
    shutil.copytree(stopped, linked)
    (linked / "log.txt").unlink()
    (linked / "log.txt").symlink_to("/etc/hostname")
    with pytest.raises(RunDirError, match=r"log\.txt: it is a link"):
        archive.export_runs([linked], tmp_path / "linked.zip")
    assert [path.name for path in tmp_path.glob("*.zip")] == ["runs.zip"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("point", ["mid_export", "mid_import", "before_rename"])
def test_what_stops_half_way_leaves_nothing(stopped, file, tmp_path, monkeypatch, point):
    def stop(name):
        if name == point:
            raise KeyboardInterrupt

    for module in (archive, archive.atomic):
        monkeypatch.setattr(module, "reach", stop)
    there = tmp_path / "there"
    with pytest.raises(KeyboardInterrupt):
        archive.export_runs([stopped], tmp_path / "new.zip") if point != "mid_import" else archive.import_runs(
            file, there
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path != there) == ["runs.zip"]
    assert not there.exists() or list(there.iterdir()) == []


def rewrite(file, change):
    """Rewrite an archive: `change(members, manifest)` gets the bytes by name and the manifest."""
    with zipfile.ZipFile(file) as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    manifest = json.loads(members.pop(archive.MANIFEST))
    change(members, manifest)
    with zipfile.ZipFile(file, "w") as target:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (0o120777 if name.endswith("linked") else 0o100644) << 16
            target.writestr(member, data)
        target.writestr(archive.MANIFEST, json.dumps(manifest))


def add(name, data, run=NAME):
    """Return a change that adds a file, correctly listed."""
    import hashlib

    def change(members, manifest):
        members[f"{run}/{name}"] = data
        entries = manifest["runs"].setdefault(run, {})
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    return change


def flip(members, manifest):
    """Change a bit of a checkpoint."""
    name = next(name for name in members if name.endswith(".pt"))
    members[name] = members[name][:500] + bytes([members[name][500] ^ 1]) + members[name][501:]


class Canary:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("canary", "w"))


def unlisted(members, manifest):
    """Add a member that the manifest does not have."""
    members[f"{NAME}/extra.txt"] = b"x"


def larger(members, manifest):
    """List another size than the member's."""
    manifest["runs"][NAME]["config.yaml"]["bytes"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "checksum differs"),
        (add("../outside.txt", b"x"), "outside of its run"),
        (add("/tmp/outside.txt", b"x"), "outside of its run"),
        (add("a/../../outside.txt", b"x"), "outside of its run"),
        (add("config.yaml", b"x", run=".."), "is no name of a run"),
        (add("config.yaml", b"x", run="a\\b"), "is no name of a run"),
        (add("config.yaml", b"x", run="latest"), "is no name of a run"),
        (add("status.json", b"{}", run="other"), "other has no config.yaml"),
        (add("weights.pkl", pickle.dumps(Canary())), "is not a file of a run"),
        (add("net.so", b"x"), "is not a file of a run"),
        (add("model.pt", b"x"), "is not a file of a run"),
        (add(".hidden", b"x"), "is not a file of a run"),
        (add("linked", b"/etc/passwd"), "no plain file"),
        (add("checkpoints/step_000000001.pt", pickle.dumps(Canary())), "not a checkpoint of cvlab"),
        (unlisted, "is not in manifest.json"),
        (larger, "another size than manifest.json says"),
        (lambda members, manifest: members.pop(f"{NAME}/config.yaml"), "is missing"),
        (lambda members, manifest: manifest.update(format="cvlab runs 9"), "is not one that cvlab"),
        (lambda members, manifest: manifest.update(runs=[]), "is not one that cvlab"),
    ],
)
def test_an_archive_that_was_changed_imports_nothing(file, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    rewrite(file, change)
    with pytest.raises(DataError) as error:
        archive.import_runs(file, tmp_path / "there")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "there") == ["runs.zip"]
    assert not (tmp_path / "there").exists() or list((tmp_path / "there").iterdir()) == []


def test_a_pickle_with_a_right_checksum_is_not_run(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    checkpoint.write(copy / "checkpoints" / "step_000000020.pt", {"step": 20, "canary": Canary()})
    archive.export_runs([copy], tmp_path / "evil.zip")
    with pytest.raises(DataError, match="not a valid checkpoint"):
        archive.import_runs(tmp_path / "evil.zip", tmp_path / "there")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["compressed", "twice", "overlapping"])
def test_members_that_are_not_plain(file, tmp_path, kind):
    with zipfile.ZipFile(file, "a") as target:
        member = zipfile.ZipInfo(f"{NAME}/log.txt" if kind == "twice" else f"{NAME}/added")
        if kind == "compressed":
            member.compress_type = zipfile.ZIP_DEFLATED
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the name is there twice
            target.writestr(member, b"0" * 100_000)
        if kind == "overlapping":
            target.infolist()[0].file_size = 10**12
    message = {"compressed": "compressed", "twice": "twice", "overlapping": "larger"}[kind]
    with pytest.raises(DataError, match=message):
        archive.import_runs(file, tmp_path / "there")
