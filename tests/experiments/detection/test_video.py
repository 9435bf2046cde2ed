"""`cvlab detect --source`: small clips of scenes and of squares, with the bundled or an artificial detector."""

import csv
import io
import itertools
import json
import os
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photos, videos
from cvlab.data.scenes import generator
from cvlab.experiments.common.weights import BUNDLED_WEIGHTS
from cvlab.experiments.detection import inference
from cvlab.ops.average_precision import Detections

av = pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[video]'")
SCENES = ("--weights", BUNDLED_WEIGHTS / "scenes.safetensors")
SIZE = (160, 90)


def write_clip(name, frames, rate=Fraction(10)):
    writer = videos.VideoWriter(Path(name), frames[0].size, rate, Fraction(1, 10240))
    for k, frame in enumerate(frames):
        writer.write(frame, float(k / rate))
    writer.close()
    return name


def squares(num_frames=20, hidden=()):
    """Return frames in which a red square moves right (except in `hidden` frames), and a green one below it left."""
    frames = []
    for k in range(num_frames):
        image = Image.new("RGB", SIZE)
        if k not in hidden:
            image.paste((255, 0, 0), (10 + 4 * k, 10, 30 + 4 * k, 30))
        image.paste((0, 255, 0), (120 - 4 * k, 50, 140 - 4 * k, 70))
        frames.append(image)
    return frames


def predict_squares(images, score_threshold, nms_iou):
    """Return the boxes of the red (cat) and the green (dog) square."""
    results = []
    for image in images:
        pixels = photos.to_tensor(image)
        rows = []
        for label in (0, 1):
            y, x = (pixels[label] > 0.5).nonzero().unbind(1)
            if len(y) > 50:
                rows.append((*(float(edge) for edge in (x.min(), y.min(), x.max() + 1, y.max() + 1)), 0.9, label))
        table = torch.tensor(rows).view(-1, 6)
        results.append(Detections(table[:, :4], table[:, 4], table[:, 5].long()))
    return results


@pytest.fixture
def square_detector(monkeypatch):
    detector = inference.LoadedDetector("an artificial detector", ("cat", "dog"), 0, 64, predict_squares)
    monkeypatch.setattr(inference, "load_detector", lambda *_, **__: detector)


def read_tracks(run):
    return list(csv.DictReader(io.StringIO((Path(run) / "tracks.csv").read_text())))


def detect(cvlab, source, *args):
    code, out, err = cvlab("detect", "--source", source, *args, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.usefixtures("square_detector")
class TestSquares:
    def test_the_video_the_csv_file_and_the_summary(self, cvlab):
        result = detect(cvlab, write_clip("clip.mp4", squares()))
        assert result["metrics"].pop("frames_per_second") > 0
        assert result["metrics"] == {"num_frames": 20, "num_tracks": 2}
        assert result["class_counts"] == {"cat": 1, "dog": 1}
        assert result["headline"] == "2 tracks in 20 frames: cat 1, dog 1"
        (row,) = result["results"]
        frames = list(videos.read(str(Path(result["run"], row["video"]))))
        assert len(frames) == 20
        assert frames[-1].time_s == pytest.approx(1.9)
        assert frames[0].image.size == SIZE
        with av.open(str(Path(result["run"], row["video"]))) as container:
            assert container.streams.video[0].average_rate == 10
        rows = read_tracks(result["run"])
        assert len(rows) == 40
        first = {key: rows[0][key] for key in ("frame", "time_s", "track_id", "class", "score")}
        assert first == {"frame": "0", "time_s": "0.0", "track_id": "1", "class": "cat", "score": "0.9"}
        assert [float(rows[0][key]) for key in ("x1", "y1", "x2", "y2")] == pytest.approx([10, 10, 30, 30], abs=1)
        assert {(row["track_id"], row["class"]) for row in rows} == {("1", "cat"), ("2", "dog")}
        assert [float(row["time_s"]) for row in rows[::2]] == pytest.approx([k / 10 for k in range(20)])
        assert photos.load(Path(result["run"], row["picture"])).size == SIZE
        page = Path(result["run"], "report.html").read_text()
        assert "2 tracks in 20 frames" in page
        assert "video.mp4" in page

    def test_the_last_line_has_the_counts(self, cvlab):
        code, out, _ = cvlab("detect", "--source", write_clip("clip.mp4", squares(6)))
        assert code == 0
        assert out.splitlines()[-1] == "2 tracks in 6 frames: cat 1, dog 1"

    def test_an_object_that_reappears_keeps_its_id(self, cvlab):
        result = detect(cvlab, write_clip("clip.mp4", squares(hidden=range(8, 13))))
        assert result["class_counts"] == {"cat": 1, "dog": 1}
        assert len([row for row in read_tracks(result["run"]) if row["class"] == "cat"]) == 15

    def test_without_tracking_detections_are_counted(self, cvlab):
        result = detect(cvlab, write_clip("clip.mp4", squares()), "--no-track", "--class", "dog")
        assert result["metrics"]["num_objects"] == 20
        assert result["headline"] == "20 objects in 20 frames: dog 20"
        assert {row["track_id"] for row in read_tracks(result["run"])} == {""}

    def test_every_and_max_frames(self, cvlab):
        result = detect(cvlab, write_clip("clip.mp4", squares()), "--every", "2", "--max-frames", "7")
        assert result["metrics"]["num_frames"] == 7
        assert [row["frame"] for row in read_tracks(result["run"])[::2]] == [str(k) for k in range(0, 14, 2)]
        with av.open(str(Path(result["run"], "video.mp4"))) as container:
            assert container.streams.video[0].average_rate == 5

    def test_the_result_does_not_depend_on_the_batch_size(self, cvlab):
        clip = write_clip("clip.mp4", squares())
        tables = [read_tracks(detect(cvlab, clip, f"batch_size={size}")["run"]) for size in (1, 7, 64)]
        assert tables[0] == tables[1] == tables[2]

    def test_a_video_without_objects(self, cvlab):
        result = detect(cvlab, write_clip("clip.mp4", [Image.new("RGB", SIZE)] * 3))
        assert result["headline"] == "0 tracks in 3 frames"
        assert photos.load(Path(result["run"], "images/frame.png")).size == SIZE

    def test_an_interrupted_run_keeps_its_results_and_starts_again(self, cvlab, monkeypatch):
        clip = write_clip("clip.mp4", squares())
        write = videos.VideoWriter.write
        counter = itertools.count()

        def interrupt(self, *arguments):
            write(self, *arguments)
            if next(counter) == 9:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(videos.VideoWriter, "write", interrupt)
        code, out, err = cvlab("detect", "--source", clip, "batch_size=4", "--json")
        assert code == 130
        assert "interrupted after 12 frames" in json.loads(out)["error"]["message"]
        assert "begins again" in json.loads(out)["error"]["hint"]
        run = Path(json.loads(out)["error"]["run"])
        assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
        assert len(list(videos.read(str(run / "video.mp4")))) == 12
        assert [row["frame"] for row in read_tracks(run)[::2]] == [str(k) for k in range(12)]
        code, out, err = cvlab("resume", run, "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["num_frames"] == 20
        assert len(read_tracks(run)) == 40

    def test_a_camera_is_read_frame_by_frame(self, cvlab, monkeypatch):
        """A clip replaces the camera: its length is unknown, and each frame is processed as it arrives."""
        clip = write_clip("clip.mp4", squares())
        monkeypatch.setattr(videos, "_open_camera", lambda module, number: module.open(clip))
        sizes = []
        monkeypatch.setattr(
            videos, "probe", lambda source, probe=videos.probe: sizes.append(probe(source)) or sizes[-1]
        )
        result = detect(cvlab, "3", "--max-frames", "9")
        assert result["metrics"]["num_frames"] == 9
        assert result["class_counts"] == {"cat": 1, "dog": 1}
        assert {info.num_frames for info in sizes} == {None}
        code, out, _ = cvlab("detect", "--source", "3", "--dry-run")
        assert code == 0
        assert "video" in out

    def test_a_full_disk_gives_a_one_line_error(self, cvlab, monkeypatch):
        clip = write_clip("clip.mp4", squares(4))

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(videos.VideoWriter, "write", fail)
        code, _, err = cvlab("detect", "--source", clip)
        assert code == 5
        assert "No space left" in err
        assert "Traceback" not in err


def test_the_bundled_detector_on_moving_scenes(cvlab):
    """A camera that moves over three adjacent scenes."""
    side = generator.SIZE_PX
    canvas = Image.new("RGB", (3 * side, side))
    for column in range(3):
        scene = generator.generate_scene(7, column)
        canvas.paste(Image.open(io.BytesIO(scene.png())), (column * side, 0))
    frames = [canvas.crop((14 * k, 0, 14 * k + side, side)) for k in range(2 * side // 14 + 1)]
    result = detect(cvlab, write_clip("clip.mp4", frames), *SCENES, "--conf", "0.4", "threads=1")
    rows = read_tracks(result["run"])
    assert len(rows) > len(frames)
    shapes = [item.shape for column in range(3) for item in generator.generate_scene(7, column).objects]
    assert set(shapes) <= {row["class"] for row in rows}
    assert result["metrics"]["num_tracks"] <= 2 * len(shapes)
    lengths = [len(list(group)) for _, group in itertools.groupby(sorted(row["track_id"] for row in rows))]
    assert max(lengths) >= 10


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--source", "none.mp4"), 4, "none.mp4: no such file"),
        (("--source", "empty.mp4"), 4, "not a video that can be read"),
        (("--source", "."), 4, "not a file"),
        (("--source", "88"), 4, "camera 88: there is no /dev/video88"),
        (("--source", "http://localhost/a.mp4"), 4, "URLs are not opened"),
        (("--source", "clip.mp4", "sample"), 2, "give photos or a video, not both"),
        (("--source", "clip.mp4", "--save-txt"), 2, "tracks.csv has the boxes"),
        (("--source", "clip.mp4", "--every", "0"), 2, "every"),
        (("--source", "clip.mp4", "--class", "dgo"), 2, "did you mean 'dog'?"),
        (("clip.mp4",), 2, "cvlab detect --source clip.mp4"),
        (("sample", "--every", "3"), 2, "are for videos"),
    ],
)
def test_errors(cvlab, args, code, message, request):
    request.getfixturevalue("square_detector")
    Path("empty.mp4").write_bytes(b"")
    write_clip("clip.mp4", squares(2))
    actual, _, err = cvlab("detect", *args)
    assert actual == code, err
    assert message in err, err
    assert "Traceback" not in err
    assert not Path("runs").exists()
