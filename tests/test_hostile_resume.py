"""Interrupted runs on photos with links, FIFOs or devices among their files: `resume` does not follow them."""

import io
import itertools
import os
import shutil
import signal
import threading
import time

import pytest
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.engine import image_optimizer
from cvlab.errors import DataError, RunDirError
from cvlab.experiments.common import photo_batches, saved_images
from cvlab.runs.find import find_run, runs_root
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files

SECONDS = 60
KINDS = ("link", "dangling link", "FIFO", "/dev/zero")
COMMANDS = {
    "style": ("run", "style", "size=48", "steps=6", "preview_every=2"),
    "class_visualization": ("classvis", "--target", "tick", "steps=6", "frames=3"),
    "attack": ("attack", "wide.png", "tall.png", "--target", "ostrich", "batch_size=1", "steps=3"),
}
NAMES = {
    "style": ("images/frames/000000.png", "images/style.png"),
    "class_visualization": ("images/frames/78-tick-000002.png", "images/78-tick.png"),
    "attack": ("images/wide-attacked.png", "images/tall-attacked.png"),
}
FOLDERS = ("images", "images/frames", "checkpoints", "plots")


def _png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


@pytest.fixture
def two_photos(tmp_path):
    """Write two small crops of the bundled photo."""
    whole = photos.load(photo_paths.find_images(["sample"])[0])
    whole.crop((100, 40, 200, 130)).save(tmp_path / "wide.png")
    whole.crop((150, 0, 240, 131)).save(tmp_path / "tall.png")


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*_):
        raise AssertionError(f"hangs for {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images_of(run):
    """Return the regular image files of a run."""
    images = [path for path in (run / "images").rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(run)): path.read_bytes() for path in images}


def replace_by(path, kind, outside):
    """Replace a file or folder; a link in place of a folder leads to a copy of the folder."""
    path.parent.mkdir(exist_ok=True)
    is_folder = path.is_dir()
    if is_folder:
        shutil.copytree(path, outside / "folder", dirs_exist_ok=True)
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        targets = {"link": outside / ("folder" if is_folder else "photo.png"), "/dev/zero": "/dev/zero"}
        path.symlink_to(targets.get(kind, outside / "new"))


def interrupt(monkeypatch, command):
    """Let a command receive SIGTERM after its fourth step, or after its first photo."""
    module, name = (photo_batches, "_process_batch") if command == "attack" else (image_optimizer, "optimization_steps")
    original = getattr(module, name)

    def stopping_steps(*arguments):
        for k, losses in enumerate(original(*arguments)):
            if k == 3:
                signal.raise_signal(signal.SIGTERM)
            yield losses

    def stopping_batch(*arguments):
        results = original(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return results

    monkeypatch.setattr(module, name, stopping_batch if command == "attack" else stopping_steps)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("two_photos")
def test_resume_neither_follows_links_nor_hangs(cvlab, tmp_path, monkeypatch, command):
    arguments = (*COMMANDS[command], "threads=1", "expect=[]", "seed=1", "-q")
    assert cvlab(*arguments)[0] == 0
    expected = images_of(find_run("latest", runs_root()))
    with monkeypatch.context() as patch:
        interrupt(patch, command)
        assert cvlab(*arguments)[0] == 143
    run = find_run("latest", runs_root())
    run.rename(tmp_path / "interrupted")
    codes = set()
    cases = (*itertools.product(NAMES[command], KINDS), *itertools.product(FOLDERS, ("link", "FIFO")))
    for number, (name, kind) in enumerate(cases):
        outside = tmp_path / f"outside-{number}"
        (outside / "folder").mkdir(parents=True)
        Image.new("RGB", (48, 48), "magenta").save(outside / "photo.png")
        shutil.copytree(tmp_path / "interrupted", run)
        replace_by(run / name, kind, outside)
        before = contents(outside)
        signal.alarm(SECONDS)
        code, _, err = cvlab("resume", run.name)
        signal.alarm(0)
        case = f"{name} {kind}: {err}"
        assert code in (0, 5, 7), case
        assert "Traceback" not in err, case
        assert contents(outside) == before, case
        assert not (outside / "new").exists(), case
        if code == 0:  # the images equal those of an uninterrupted run
            different = [name for name, content in images_of(run).items() if content != expected.get(name)]
            assert not different, f"{case}: {different}"
        codes.add(code)
        shutil.rmtree(run)
    assert {0, 5} <= codes


def test_files_with_other_names_are_not_frames(tmp_path):
    run = RunDir(tmp_path)
    for step in (20, 3):
        saved_images.save_frame(run, "tick-", step, PNG)
    for name in ("tick-x.png", "tick-1.png", "tick-000001.gif", "ticks-000001.png", "other-000002.png"):
        (tmp_path / saved_images.FRAMES / name).write_bytes(b"")
    assert [step for step, _ in saved_images.load_frames(run, "tick-")] == [3, 20]
    (tmp_path / saved_images.FRAMES / "tick-000004.png").write_bytes(PNG[:30])
    with pytest.raises(DataError, match="tick-000004"):
        saved_images.load_frames(run, "tick-")


@pytest.mark.parametrize(
    "name", ["../photo.png", "images/../../photo.png", "/etc/passwd", "", "images", "images/none.png"]
)
def test_paths_outside_of_a_run_are_not_read(tmp_path, name):
    (tmp_path / "photo.png").write_bytes(PNG)
    run = RunDir(tmp_path / "run")
    (tmp_path / "run/images").mkdir(parents=True)
    with pytest.raises(RunDirError):
        saved_images.load(run, name)


@pytest.mark.parametrize("swapped", ["images", "images/frames", "images/frames/a.png"])
def test_a_path_that_becomes_a_link_while_it_is_read_is_not_followed(tmp_path, swapped):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder, content in ((run, b"inside"), (outside, b"secret")):
        (folder / "images/frames").mkdir(parents=True)
        (folder / "images/frames/a.png").write_bytes(content)
    stopped = threading.Event()

    def swap():
        path, original = run / swapped, run / "original"
        while not stopped.is_set():
            path.rename(original)
            path.symlink_to(outside / swapped)
            path.unlink()
            original.rename(path)

    thread = threading.Thread(target=swap)
    thread.start()
    contents_read, num_errors = set(), 0
    try:
        start = time.monotonic()
        while (seconds := time.monotonic() - start) < 1 or (seconds < SECONDS and not (contents_read and num_errors)):
            try:
                contents_read.add(regular_files.read_below(run, "images/frames/a.png", 100))
            except OSError:
                num_errors += 1
    finally:
        stopped.set()
        thread.join()
    assert contents_read == {b"inside"}
    assert num_errors > 0
