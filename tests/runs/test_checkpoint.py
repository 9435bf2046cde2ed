"""Checkpoints: durable, verified, and unable to run code."""

import os
import pickle
import random
import stat
import zipfile

import pytest
import torch

from cvlab.errors import CheckpointError, DivergedError, RunDirError
from cvlab.runs import checkpoint
from cvlab.storage import atomic


@pytest.fixture
def state():
    weights = {f"layer{k}.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last) for k in range(5)}
    return {"step": 7, "model": weights, "plain": (1, 2.5, "text", None, [1], {"a": True})}


def test_a_state_is_restored_exactly(tmp_path, state):
    path = checkpoint.save(tmp_path, 7, state)
    loaded = checkpoint.load(path)
    assert loaded["plain"] == state["plain"]
    for name, tensor in state["model"].items():
        assert torch.equal(loaded["model"][name], tensor)
        assert loaded["model"][name].stride() == tensor.stride()


def test_the_file_mode_follows_the_umask(tmp_path, state):
    assert stat.S_IMODE(checkpoint.save(tmp_path, 7, state).stat().st_mode) == 0o666 & ~atomic.UMASK


def test_the_latest_two_and_the_best_are_kept(tmp_path, state):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state | {"step": step}, is_best=step == 2)
    assert checkpoint.steps(tmp_path) == [4, 5]
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_000000004.pt", "step_000000005.pt"]


def test_the_latest_checkpoint_is_the_highest_step_not_the_newest_file(tmp_path, state):
    for step in (9, 8):
        checkpoint.save(tmp_path, step, state | {"step": step})
    assert checkpoint.load_latest(tmp_path, print)[1]["step"] == 9


def damaged_copies(raw, count):
    generator = random.Random(0)
    for share in (0, 0.001, 0.1, 0.5, 0.9999):
        yield raw[: int(len(raw) * share)]
    yield raw[:1]
    yield raw[:-1]
    yield raw + b"\0"
    for _ in range(count):
        position = generator.randrange(len(raw) * 8)
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        yield bytes(flipped)
    for _ in range(count // 10):
        start = generator.randrange(len(raw))
        zeroed = bytearray(raw)
        zeroed[start : start + 4096] = bytes(len(zeroed[start : start + 4096]))
        if zeroed != raw:
            yield bytes(zeroed)


def test_damaged_checkpoints_are_rejected(tmp_path, state):
    raw = checkpoint.save(tmp_path, 7, state).read_bytes()
    path = tmp_path / "damaged.pt"
    for number, damaged in enumerate(damaged_copies(raw, 300)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value), number


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pt"
    checkpoint.write(path, {"model": Canary(canary)})
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not canary.exists()


def add_checksum(path):
    """Add a valid checksum footer to a zip, as an attacker could."""
    import hashlib

    body = path.read_bytes()[:-2] + checkpoint.CHECKSUM_BYTES.to_bytes(2, "little")
    path.write_bytes(body + checkpoint.CHECKSUM_PREFIX + hashlib.sha256(body).hexdigest().encode())


def test_compressed_members_are_rejected(tmp_path, state):
    source = checkpoint.save(tmp_path, 7, state)
    path = tmp_path / "deflated.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member.filename), zipfile.ZIP_DEFLATED)
    add_checksum(path)
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, state, value):
    checkpoint.save(tmp_path, 7, state)
    state["model"]["layer3.weight"][0, 0, 0, 0] = value
    with pytest.raises(DivergedError, match=r"layer3\.weight"):
        checkpoint.save(tmp_path, 8, state)
    assert checkpoint.steps(tmp_path) == [7]


def test_the_checkpoint_of_another_model_is_rejected(tmp_path):
    model = torch.nn.Linear(3, 2)
    checkpoint.match_model(model, model.state_dict(), tmp_path)
    for other, text in (
        (torch.nn.Linear(3, 3), "is (3, 3)"),
        (torch.nn.Linear(3, 2, bias=False), "1 missing (bias"),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), "2 unknown (0.bias"),
        (torch.nn.Linear(3, 2, dtype=torch.float64), "torch.float64"),
    ):
        with pytest.raises(CheckpointError, match="another model") as error:
            checkpoint.match_model(model, other.state_dict(), tmp_path)
        assert text in str(error.value)


def test_the_digest_changes_with_one_bit():
    state = {"w": torch.zeros(3)}
    changed = {"w": torch.tensor([0.0, -0.0, 0.0])}
    assert checkpoint.weights_digest(state) == checkpoint.weights_digest({"w": torch.zeros(3)})
    assert checkpoint.weights_digest(state) != checkpoint.weights_digest(changed)
    assert checkpoint.weights_digest(state) != checkpoint.weights_digest({"v": torch.zeros(3)})


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_temporary_files(tmp_path, state, monkeypatch):
    checkpoint.save(tmp_path, 7, state)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirError, match="No space left on device") as error:
        checkpoint.save(tmp_path, 8, state)
    assert error.value.code == 5
    assert os.listdir(tmp_path) == ["step_000000007.pt"]


def test_torch_does_not_hide_a_disk_error(tmp_path, state, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            self.file.close()

    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Full(fdopen(descriptor, mode)))
    with pytest.raises(RunDirError, match="No space left on device"):
        checkpoint.save(tmp_path, 8, state)
    assert os.listdir(tmp_path) == []


def test_linking_the_best_checkpoint_twice(tmp_path, state):
    path = checkpoint.save(tmp_path, 1, state, is_best=True)
    checkpoint.link_best(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [checkpoint.BEST, path.name]
