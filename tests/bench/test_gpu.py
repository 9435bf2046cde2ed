"""The parts of `benchmarks/gpu.py` that need no GPU: its budget, its summary, the packed CIFAR-10."""

import numpy as np
import pytest

from benchmarks import cifar_pack, gpu


def test_webp_compression_of_a_batch_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, cifar_pack.PIXEL_BYTES, dtype=np.uint8).tobytes()
    assert cifar_pack.from_webp(cifar_pack.to_webp(pixels)) == pixels
    raw = b"head T" + b"T" + cifar_pack.PIXEL_BYTES.to_bytes(4, "little") + pixels + b"tail"
    assert raw[cifar_pack.pixel_offset(raw) :] == pixels + b"tail"
    assert cifar_pack.pixel_offset(b"batches.meta") is None


def test_a_failing_part_is_recorded_and_one_without_time_is_skipped(tmp_path):
    result = gpu.run(1.0, "cpu", True, tmp_path / "gpu.json", ["tests"])
    assert result["parts"]["tests"]["problem"] is None
    failed = gpu.start_part("engine", 60, "cpu:nosuch", True)
    assert failed["rows"] == []
    assert failed["problem"]["exit_code"] != 0
    result = gpu.run(0.1, "cpu", True, tmp_path / "gpu.json", ["engine"])
    assert "are left of 0.1 minutes" in result["parts"]["engine"]["skipped"]
    assert not result["ok"]


def test_runs_are_summarized_by_configuration_and_overrides():
    rows = [{"config": "a", "overrides": ["x=1"], "train_seconds": t, "test_accuracy_tta": 0.9} for t in (1.0, 3.0)]
    rows.append({"config": "a", "overrides": ["x=1"], "error": "failed"})
    (summary,) = gpu.summarize(rows)
    assert summary["n"] == 2
    assert summary["train_seconds"]["mean"] == pytest.approx(2.0)
