"""Run directories whose files are links, FIFOs, devices, folders or huge: no access outside, no hang."""

import io
import json
import os
import signal
import struct
import time
import zlib

import pytest
from PIL import Image

from cvlab.api import run as api_run
from cvlab.errors import CvlabError
from cvlab.reports import compare, embedded, html, index, tables
from cvlab.runs import checkpoint
from cvlab.runs.records import pruning_reason, read_metrics
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files
from cvlab.storage.lock import is_held
from tests.test_hostile_runs import write

SECRET = "secret-of-another-file"
SECONDS = 20
FILES = (
    *("config.yaml", "env.json", "status.json", "summary.json", "metrics.jsonl", "log.txt", "run.lock", "prune.txt"),
    "rung.json",
    *("thumbnail.png", "report.html", "eval.json", "images/a.png", "plots/loss.png"),
    *("checkpoints/step_000000001.pt", "checkpoints/best.pt", "images", "plots", "checkpoints"),
)
KINDS = ("link", "dangling link", "hard link", "FIFO", "/dev/zero", "huge", "not UTF-8", "folder")


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*_):
        raise AssertionError(f"hangs for {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@pytest.fixture
def outside(tmp_path):
    """Return a folder with files outside of the runs, which must not change."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text(f"{SECRET}: 1\n")
    (folder / "folder" / ".x.tmp").write_text(SECRET)
    (folder / "folder" / "step_000000000.pt").write_text(SECRET)
    return folder


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace_by(path, kind, outside):
    """Replace a file of a run directory by a link, a device, a huge file or a folder."""
    is_folder = path.is_dir()
    if is_folder:
        for child in path.iterdir():
            child.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside / ("folder" if is_folder else "file"))
    elif kind == "dangling link":
        path.symlink_to(outside / "new")
    elif kind == "hard link":
        os.link(outside / "file", path)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "/dev/zero":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**42)
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff\xfe\xed\xa0\x80\n" * 10)
    else:
        path.mkdir()


def write_run(path):
    write(path)
    out = RunDir(path)
    out.folder("plots")
    out.write("checkpoints", lambda folder: checkpoint.save(folder, 1, {"step": 1, "model": {}}, is_best=True))
    for name in ("images/a.png", "plots/loss.png"):
        Image.new("RGB", (9, 9)).save(path / name)
    return path


def readers(path, other):
    return (
        lambda: html.run_page(path),
        lambda: html.comparison_page({"x": path, "y": other}),
        lambda: tables.show_comparison(compare.compare({"x": path, "y": other})),
        lambda: tables.show_result(api_run.result(path)),
        lambda: checkpoint.load_of_run(path, "last"),
        lambda: checkpoint.load_of_run(path, "best"),
        lambda: list(read_metrics(path)),
        lambda: pruning_reason(path),
        lambda: is_held(path),
        lambda: embedded.read_thumbnail(path),
    )


def writers(path):
    out = RunDir(path)

    def save(folder):
        for step in (2, 3, 4):
            checkpoint.save(folder, step, {"step": step, "model": {}}, is_best=True)

    def lock():
        with out.locked():
            out.append({"step": 5})
            out.log("a line")

    return (
        lock,
        lambda: out.append({"step": 6}),
        out.sync_metrics,
        lambda: out.truncate_metrics(3),
        lambda: out.log("a line"),
        lambda: out.set_status("done"),
        lambda: out.write("checkpoints", save),
        lambda: out.write_bytes("plots/loss.png", b"x"),
        lambda: out.write_bytes("images/b.png", b"x"),
        lambda: out.write_json("eval.json", {}),
        lambda: html.write_run(path),
        lambda: embedded.write_thumbnail(path),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_readers_and_writers_of_a_run_directory_do_not_hang_or_leave_it(tmp_path, outside, name, kind, capfd):
    root = tmp_path / "runs"
    path, other = write_run(root / "20261125-120000-x-0001"), write_run(root / "20261125-120000-y-0002")
    replace_by(path / name, kind, outside)
    before = contents(outside)
    for number, action in enumerate((*readers(path, other), *writers(path))):
        try:
            text = action()
        except CvlabError as error:
            text = str(error)
            assert "\n" not in text, number
        if kind != "hard link":  # a hard link is a regular file; backup programs create them
            assert SECRET not in str(text), number
    assert kind == "hard link" or SECRET not in capfd.readouterr().out
    assert contents(outside) == before
    assert not (outside / "new").exists()
    rows = index.runs(root)
    html.write_index(root, rows)
    assert other.name in [row["run"] for row in rows]
    assert other.name in (root / html.INDEX).read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_the_end_of_a_run_does_not_depend_on_other_runs(tmp_path, outside, name, kind):
    root = tmp_path / "runs"
    broken, path = write_run(root / "20261125-120000-x-0001"), write_run(root / "20261125-120000-y-0002")
    replace_by(broken / name, kind, outside)
    out = RunDir(path)
    api_run._publish(out)
    assert "warning" not in (path / "log.txt").read_text()
    assert path.name in (root / html.INDEX).read_text()


@pytest.mark.parametrize("kind", ["link", "FIFO", "/dev/zero", "folder", "not UTF-8", "huge"])
def test_the_index_of_runs_replaces_anything_but_a_folder(tmp_path, outside, kind):
    root = tmp_path / "runs"
    path = write_run(root / "20261125-120000-y-0002")
    replace_by(root / html.INDEX, kind, outside)
    before = contents(outside)
    api_run._publish(RunDir(path))
    assert contents(outside) == before
    has_warning = "could not be written" in (path / "log.txt").read_text()
    assert has_warning == (kind == "folder")


def test_trials_of_a_sweep_that_are_links_are_rejected(tmp_path, outside):
    from cvlab.sweeps import adaptive

    run = tmp_path / "sweep"
    (run / "trials").mkdir(parents=True)
    target = outside / "folder"
    (target / adaptive.FILE).write_text("{}")
    (run / "trials" / "000").symlink_to(target)
    with pytest.raises(CvlabError, match="link"):
        adaptive.trial_dirs(run)
    (run / "trials" / "000").unlink()
    (run / "trials").rmdir()
    (run / "trials").symlink_to(outside)
    with pytest.raises(CvlabError, match="link"):
        adaptive.trial_dirs(run)


def header(width, height):
    """Return the header of a PNG that states a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def encoded(size, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", size).save(buffer, kind)
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
PICTURES = {
    "EPS": EPS,
    "header of 50,000 px": header(50_000, 50_000),
    "header of 2^31 px": header(2**31 - 1, 2**31 - 1),
    "GIF of 65,535 px": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(40),
    "GIF cut": b"GIF89a\1",
    "TIFF": encoded((9, 9), "TIFF"),
    "empty": b"",
    "text": b"<svg onload=alert(1)>",
    "PCX": encoded((9, 9), "PCX"),
    "ICO": encoded((16, 16), "ICO"),
}


@pytest.mark.parametrize("suffix", [".png", ".gif"])
@pytest.mark.parametrize("kind", PICTURES)
def test_only_photo_decoders_open_the_images_of_a_run(tmp_path, monkeypatch, kind, suffix):
    path = write_run(tmp_path / "20261125-120000-x-0001")
    summary = json.loads((path / "summary.json").read_text())
    summary["results"] = [{"image": "a", "picture": f"images/a{suffix}"}]
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "images" / f"a{suffix}").write_bytes(PICTURES[kind])
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("starts a program"))
    page = html.run_page(path)
    html.write_run(path)
    sources = page.count("data:image/") - page.count("data:image/svg")
    (path / "images" / f"a{suffix}").unlink()
    page_without_image = html.run_page(path)
    assert sources == page_without_image.count("data:image/") - page_without_image.count("data:image/svg")


@pytest.mark.parametrize("scale", [0.2, pytest.param(1, marks=pytest.mark.slow)])
def test_many_large_images_do_not_stop_a_page(tmp_path, monkeypatch, scale):
    """The number of decoded pixels is bounded per image and per page."""
    for name in ("MAX_PIXELS", "MAX_PAGE_PIXELS"):
        monkeypatch.setattr(embedded, name, int(getattr(embedded, name) * scale**2))
    path = write_run(tmp_path / "20261125-120000-x-0001")
    large, smaller = int(13_000 * scale), int(7_000 * scale)
    for number, size in enumerate([large] * 3 + [smaller] * 6):
        raw = encoded((size, size - number))  # different sizes, so that none is deduplicated
        (path / "images" / f"{number:02d}.png").write_bytes(raw)
    start = time.monotonic()
    signal.alarm(60)
    page = html.run_page(path)
    assert "images" in page
    assert page.count("data:image/webp") <= 2 + embedded.MAX_PAGE_PIXELS // (smaller * (smaller - 100 * scale))
    assert time.monotonic() - start < 40


def test_a_thumbnail_with_a_huge_header_is_not_sent_to_the_browser(tmp_path):
    (tmp_path / "thumbnail.png").write_bytes(header(50_000, 50_000))
    assert embedded.read_thumbnail(tmp_path) is None
    (tmp_path / "thumbnail.png").write_bytes(encoded((240, 96)))
    assert embedded.read_thumbnail(tmp_path) is not None


def test_a_line_of_metrics_that_is_too_long_is_skipped(tmp_path):
    rows = [b'{"step": 1}', b'{"a": "' + b"x" * 3 * 2**20 + b'"}', b"[" * 100_000, b'{"step": 2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    assert list(read_metrics(tmp_path)) == [{"step": 1}, {"step": 2}]


def test_reading_regular_files_is_bounded(tmp_path):
    file = tmp_path / "f"
    assert regular_files.size_of(file) == 0
    file.write_bytes(b"0123456789")
    assert regular_files.read_bytes(file, 10) == b"0123456789"
    assert regular_files.read_tail(file, 3) == b"789"
    assert regular_files.size_of(file) == 10
    with pytest.raises(regular_files.IrregularFileError, match="more than 9"):
        regular_files.read_bytes(file, 9)
