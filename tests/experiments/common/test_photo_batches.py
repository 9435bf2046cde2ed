"""Commands on photos: unreadable photos, labels, errors, resuming."""

import json
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from cvlab.errors import DataError
from cvlab.experiments.common import photo_batches


def test_unreadable_photos_are_reported_and_the_others_are_processed(two_photos, cvlab, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    code, out, err = cvlab("classify", two_photos[0], "bad.jpg", "gone.jpg", two_photos[1], "--json")
    result = json.loads(out)
    assert code == 4
    assert not result["ok"]
    assert result["error"]["code"] == 4
    assert ["error" in row for row in result["results"]] == [False, True, True, False]
    assert "2 of 4 photos could not be read" in err
    assert result["metrics"]["num_photos"] == 2
    code, out, err = cvlab("classify", "bad.jpg")
    assert code == 4
    assert "bad.jpg: not a photo" in err.splitlines()[-1]
    code, out, err = cvlab("classify", "gone.jpg")
    assert code == 4
    assert not (tmp_path / "runs" / "latest" / "x").exists()


@pytest.mark.parametrize(("verb", "num_files"), [("detect", 1), ("caption", 2)])  # captions also load a detector
def test_plan_and_run_share_one_loaded_model(cvlab, monkeypatch, verb, num_files):
    from cvlab.runs import weights_file

    loads = []
    read = weights_file.read

    def count_reads(path, *arguments):
        loads.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(weights_file, "read", count_reads)
    for count in (1, 2):  # models are not cached across commands, as the file may have changed
        code, _, err = cvlab(verb, "sample")
        assert code == 0, err
        assert len(loads) == count * num_files


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["attack", "--target", "ostrch", "sample"], 2, "did you mean 'ostrich'"),
        (["attack", "--target", "crane", "sample"], 2, "134 crane"),
        (["attack", "--target", "ostrich", "sample", "--method", "bim"], 2, "method"),
        (["attack", "sample", "--method", "pgd", "--eps", "0.1"], 2, "eps"),
        (["saliency", "sample", "--class", "xyz"], 2, "no class 'xyz'"),
        (["classify", "--model", "timm:resnet5O", "sample"], 2, "did you mean 'resnet50'"),
        (["classify", "https://example.org/a.jpg"], 4, "URLs are not downloaded"),
        (["classify", "nothing*.jpg"], 4, "matches no file"),
        (["classify"], 2, "no photo is named"),
        (["classify", "gone.jpg", "gone too.jpg"], 4, "gone.jpg: no such file"),
        (["classvis", "--init", "image"], 2, "init: image starts from exactly one photo, 0 are named"),
        (["attack", "sample", "--eps", "4"], 2, "eps has no effect with method l2"),
        (["classvis", "--target", "tick,tock"], 2, "no class 'tock'"),
        (["classvis", "--target", "tick", "octaves=2", "parametrization=pixels"], 2, "octaves"),
        (["eval", "latest"], 5, "is a training run"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(cvlab, tmp_path, args, code, text):
    if args[0] == "eval":
        cvlab("classify", "sample")
    result, _, err = cvlab(*args)
    assert result == code
    assert text in err.splitlines()[-1]
    assert args[0] == "eval" or not (tmp_path / "runs").exists()


def test_folders_labels_and_dry_run(two_photos, cvlab, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "wide.png").write_bytes(two_photos[0].read_bytes())
    code, out, _ = cvlab("saliency", tmp_path, tmp_path / "sub", "--json")
    maps = [row["map"] for row in json.loads(out)["results"]]
    assert maps == ["images/tall-map.png", "images/wide-map.png", "images/wide-2-map.png"]
    before = sorted((tmp_path / "runs").iterdir())
    code, out, _ = cvlab("classify", tmp_path, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["photos"] == 2
    assert sorted((tmp_path / "runs").iterdir()) == before


def test_an_interrupted_run_resumes_bitwise_identically(two_photos, cvlab, tmp_path, monkeypatch):
    from cvlab.experiments.adversarial import attack

    arguments = ("--target", "ostrich", *two_photos, "batch_size=1", "--method", "pgd", "threads=1")
    _, out, _ = cvlab("attack", *arguments, "--json")
    uninterrupted = json.loads(out)
    attack_batch = attack.Attack.__call__
    calls = []

    def interrupt_second(self, batch, check_interrupt):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack_batch(self, batch, check_interrupt)

    monkeypatch.setattr(attack.Attack, "__call__", interrupt_second)
    assert cvlab("attack", *arguments)[0] == 130
    monkeypatch.setattr(attack.Attack, "__call__", attack_batch)
    code, out, err = cvlab("resume", "latest", "--json")
    resumed = json.loads(out)
    assert code == 0
    assert "resumed: 1 of 2 photos are done" in err
    assert resumed["results"] == uninterrupted["results"]
    assert resumed["metrics"] == uninterrupted["metrics"]
    for row in uninterrupted["results"]:
        expected, actual = ((tmp_path / run["run"] / row["attacked"]).read_bytes() for run in (uninterrupted, resumed))
        assert expected == actual


class TestReadAhead:
    """The photos of the next batch are decoded while a batch is processed."""

    @pytest.fixture
    def loaded(self, monkeypatch):
        """Return a list that receives the numbers of loaded photos; photo 4 cannot be read."""
        loaded = []

        def load(path):
            loaded.append(int(path.name))
            if path.name == "4":
                raise DataError("4: not a photo")
            return Image.new("RGB", (1, 1))

        monkeypatch.setattr(photo_batches.photos, "load", load)
        return loaded

    def read_ahead(self, *sizes, num_threads=1):
        numbers = iter(range(sum(sizes)))
        batches = [[(Path(str(next(numbers))), "") for _ in range(size)] for size in sizes]
        return photo_batches._read_ahead(batches, num_threads)

    def test_several_threads_decode_in_parallel_and_the_order_is_preserved(self, loaded, monkeypatch):
        load, all_started = photo_batches.photos.load, threading.Barrier(3)

        def load_together(path):
            if int(path.name) < 3:
                all_started.wait(20)  # ends only if three photos are loaded at once
            return load(path)

        monkeypatch.setattr(photo_batches.photos, "load", load_together)
        batches = list(self.read_ahead(3, 5, 1, num_threads=3))
        names = [[str(p) if isinstance(p, DataError) else p.path.name for p in batch] for batch in batches]
        assert names == [["0", "1", "2"], ["3", "4: not a photo", "5", "6", "7"], ["8"]]

    def test_only_one_batch_is_decoded_ahead(self, loaded):
        for k, batch in enumerate(self.read_ahead(2, 2, 2, 1)):
            expected = min(2 * k + 4, 7)
            deadline = time.monotonic() + 20
            while len(loaded) < expected and time.monotonic() < deadline:
                time.sleep(0.001)  # while this batch is being processed
            time.sleep(0.01)
            assert loaded == list(range(expected))
            names = [str(photo) if isinstance(photo, DataError) else photo.path.name for photo in batch]
            assert names == [["0", "1"], ["2", "3"], ["4: not a photo", "5"], ["6"]][k]

    def test_closing_ends_the_thread_after_the_current_photo(self, loaded, monkeypatch):
        load, may_continue = photo_batches.photos.load, threading.Event()

        def slow_load(path):
            if path.name == "2":
                may_continue.wait(20)
            return load(path)

        monkeypatch.setattr(photo_batches.photos, "load", slow_load)
        before = threading.active_count()
        batches = self.read_ahead(2, 5)
        next(batches)
        threading.Timer(0.05, may_continue.set).start()
        batches.close()
        assert loaded == [0, 1, 2]
        assert threading.active_count() <= before + 1  # the timer may still be ending

    def test_other_errors_are_raised_for_their_batch(self, loaded, monkeypatch):
        load = photo_batches.photos.load

        def failing_load(path):
            if path.name == "2":
                raise MemoryError
            return load(path)

        monkeypatch.setattr(photo_batches.photos, "load", failing_load)
        batches = self.read_ahead(2, 2)
        assert len(next(batches)) == 2
        with pytest.raises(MemoryError):
            next(batches)
