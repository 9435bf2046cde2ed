"""Reading and writing videos: time stamps, sizes, rotation; files that are not videos."""

import struct
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvlab.data import videos
from cvlab.errors import ConfigError, DataError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[video]'")
RATE, TIME_BASE = Fraction(25), Fraction(1, 12800)


def write_squares(path, size=(64, 48), num_frames=12, times=None):
    """Write a white square that moves from the upper left corner to the right by 4 pixels a frame, on black."""
    writer = videos.VideoWriter(path, size, RATE, TIME_BASE)
    for k in range(num_frames):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (4 * k, 0, 4 * k + 12, 12))
        writer.write(image, times[k] if times else k / 25)
    writer.close()
    return str(path)


def left_edge(image):
    return int((np.asarray(image.convert("L"))[:10] > 128).any(0).nonzero()[0].min())


def rotate(path, degrees):
    """Change the display matrix of an MP4, as phones do, so that players rotate the picture clockwise."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    content = bytearray(Path(path).read_bytes())
    start = content.index(b"tkhd") + 44
    matrix = [a * 65536, b * 65536, 0, -b * 65536, a * 65536, 0, 0, 0, 1 << 30]
    content[start : start + 36] = struct.pack(">9i", *matrix)
    Path(path).write_bytes(content)


class TestRead:
    def test_frames_and_their_times_round_trip(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4")
        assert videos.probe(source) == videos.VideoInfo(RATE, TIME_BASE, 12)
        frames = list(videos.read(source))
        assert [frame.index for frame in frames] == list(range(12))
        assert [frame.time_s for frame in frames] == pytest.approx([k / 25 for k in range(12)])
        assert all(frame.image.size == (64, 48) and frame.image.mode == "RGB" for frame in frames)
        assert [left_edge(frame.image) for frame in frames] == pytest.approx([4 * k for k in range(12)], abs=1)

    def test_nothing_is_logged_from_decoding_threads(self, tmp_path):
        import av

        source = write_squares(tmp_path / "a.mp4")
        av.logging.set_level(av.logging.ERROR)  # as torchvision 0.25 does when it is imported
        videos.probe(source)
        assert av.logging.get_level() is None

    def test_stride_and_maximum_number_of_frames(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4")
        assert [frame.index for frame in videos.read(source, every=5)] == [0, 5, 10]
        frames = list(videos.read(source, every=3, max_frames=2))
        assert [(frame.index, left_edge(frame.image)) for frame in frames] == [(0, 0), (3, 12)]

    def test_a_variable_frame_rate(self, tmp_path):
        times = [0, 0.04, 0.5, 0.51, 2.0, 2.25]
        source = write_squares(tmp_path / "a.mp4", num_frames=6, times=times)
        assert [frame.time_s for frame in videos.read(source)] == pytest.approx(times, abs=1e-3)

    @pytest.mark.parametrize(
        ("degrees", "size", "corner"), [(90, (48, 64), (1, 0)), (180, (64, 48), (1, 1)), (270, (48, 64), (0, 1))]
    )
    def test_phone_videos_are_upright(self, tmp_path, degrees, size, corner):
        source = write_squares(tmp_path / "a.mp4")
        rotate(source, degrees)
        image = next(videos.read(source)).image
        assert image.size == size
        x, y = (4 if side == 0 else edge - 5 for side, edge in zip(corner, size, strict=True))
        assert image.getpixel((x, y))[0] > 200
        assert image.getpixel((size[0] // 2, size[1] // 2))[0] < 50

    def test_damaged_packets_are_skipped(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4", (320, 240), 60)
        content = bytearray(Path(source).read_bytes())
        start = content.index(b"mdat") + 1500
        content[start : start + 300] = bytes(300)
        Path(source).write_bytes(content)
        assert 1 <= len(list(videos.read(source))) <= 60


class TestWrite:
    def test_odd_sizes_become_even(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4", (63, 47))
        image = next(videos.read(source)).image
        assert image.size == (64, 48)
        assert image.getpixel((4, 4))[0] > 200

    @pytest.mark.parametrize("time_base", [TIME_BASE, Fraction(1, 90000)])
    def test_mpeg4_replaces_h264_if_it_is_missing(self, tmp_path, monkeypatch, time_base):
        monkeypatch.setattr(videos, "CODECS", ("no such codec", "mpeg4"))
        writer = videos.VideoWriter(tmp_path / "a.mp4", (64, 48), RATE, time_base)
        for k in range(5):
            writer.write(Image.new("RGB", (64, 48), "red"), k / 25)
        writer.close()
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "mpeg4"
        frames = list(videos.read(str(tmp_path / "a.mp4")))
        assert [frame.time_s for frame in frames] == pytest.approx([k / 25 for k in range(5)], abs=1e-4)

    def test_h264(self, tmp_path):
        with av.open(write_squares(tmp_path / "a.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "h264"


class TestErrors:
    def error_of(self, source):
        with pytest.raises(DataError) as error:
            videos.probe(str(source))
        assert "\n" not in str(error.value)
        assert str(source) in error.value.message
        assert error.value.hint
        return error.value.message

    def test_files_that_are_not_videos(self, tmp_path):
        (tmp_path / "empty.mp4").write_bytes(b"")
        (tmp_path / "text.mp4").write_text("no video at all")
        Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
        with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(1600))
        for name in ("empty.mp4", "text.mp4", "photo.png", "sound.wav"):
            assert "not a video that can be read" in self.error_of(tmp_path / name)
        assert "not a file" in self.error_of(tmp_path)
        assert "no such file" in self.error_of(tmp_path / "none.mp4")

    def test_a_video_container_with_audio_only(self, tmp_path):
        path = tmp_path / "sound.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert "has no video stream" in self.error_of(path)

    def test_a_video_without_frames(self, tmp_path):
        with av.open(str(tmp_path / "a.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        assert "has no frame that can be decoded" in self.error_of(tmp_path / "a.avi")

    def test_a_video_whose_frames_are_damaged(self, tmp_path):
        path = Path(write_squares(tmp_path / "a.mp4"))
        content = bytearray(path.read_bytes())
        start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
        content[start:end] = bytes(end - start)
        path.write_bytes(content)
        assert "has no frame that can be decoded" in self.error_of(path)

    def test_a_truncated_video(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4")
        content = Path(source).read_bytes()
        Path(source).write_bytes(content[: len(content) // 2])
        assert "not a video that can be read" in self.error_of(source)

    def test_a_playlist_opens_no_other_file(self, tmp_path):
        source = write_squares(tmp_path / "a.mp4")
        (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{source}\n#EXT-X-ENDLIST\n")
        assert "not a video that can be read" in self.error_of(tmp_path / "list.mp4")
        (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {source}\n")
        assert "not a video that can be read" in self.error_of(tmp_path / "concat.mp4")

    def test_urls_are_not_opened(self):
        assert "URLs are not opened" in self.error_of("rtsp://localhost/camera")

    def test_a_missing_camera(self):
        with pytest.raises(DataError, match="camera 77: "):
            videos.probe("77")

    def test_without_pyav(self, monkeypatch, tmp_path):
        monkeypatch.setitem(__import__("sys").modules, "av", None)
        with pytest.raises(ConfigError, match=r"PyAV, which is not installed; pip install -e '\.\[video\]'"):
            videos.probe(str(tmp_path))
