"""Speed and memory of decoding a folder of photos into the cache, against a bare loop of Pillow.

Command: python benchmarks/photo_cache.py --photos 20000

Most of the photos are hard links to the same 500 files, so that they need no disk space.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cvlab.experiments.classification.data import folder
from cvlab.ops.resample import EvalTransform

NUM_FILES = 500
SIDE = 224
TRANSFORM = EvalTransform(224, 256, "bicubic")
MIB = 1024**2


def write_photos(root: Path, count: int) -> list[Path]:
    """Write `count` photos of 224 px in ten classes: smooth random colors, which compress like photos."""
    generator = np.random.default_rng(0)
    paths: list[Path] = []
    for index in range(count):
        path = root / f"class {index % 10}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index < NUM_FILES:
            coarse = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            path.hardlink_to(paths[index % NUM_FILES])
        paths.append(path)
    return paths


def decode(path: Path) -> int:
    """Decode, convert, resize and crop a photo."""
    with Image.open(path) as image:
        return TRANSFORM(image.convert("RGB")).size[0]


def bare_loop(paths: Sequence[Path]) -> float:
    """Return the seconds of decoding all photos with one thread per core, without keeping them."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(decode, paths, chunksize=64):
            pass
    return time.perf_counter() - start


def anonymous_mib() -> float:
    """Return the anonymous memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1024


def main() -> None:
    """Print one line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=20_000)
    count = parser.parse_args().photos
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CVLAB_DATA"] = str(Path(scratch, "data"))
        paths = write_photos(Path(scratch, "photos"), count)
        bare_seconds = bare_loop(paths[: count // 4]) * count / len(paths[: count // 4])
        start = time.perf_counter()
        listing = folder.scan(Path(scratch, "photos"), folder.SplitConfig())
        list_seconds, before = time.perf_counter() - start, anonymous_mib()
        peaks: list[float] = []
        start = time.perf_counter()
        dataset = folder.load(listing, TRANSFORM, lambda: peaks.append(anonymous_mib()))
        decode_seconds = time.perf_counter() - start
        start = time.perf_counter()
        folder.load(listing, TRANSFORM)
        cached_seconds = time.perf_counter() - start
        pixels = len(dataset.train_images) * SIDE * SIDE * 3 / MIB
    index_tenth = max(1, len(peaks) // 10)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"list {count} photos: {list_seconds:.1f} s")
    print(f"decode into the cache: {decode_seconds:.1f} s, {count / decode_seconds:.0f} photos/s")
    print(f"bare loop of Pillow: {bare_seconds:.1f} s, {count / bare_seconds:.0f} photos/s")
    print(f"ratio of the rates: {bare_seconds / decode_seconds:.2f}")
    print(f"from the cache: {cached_seconds:.1f} s")
    print(f"anonymous memory: {before:.0f} MiB, {peaks[index_tenth]:.0f} after a tenth, {peaks[-1]:.0f} at the end")
    print(f"training images: {pixels:.0f} MiB; peak memory with mapped files: {peak_mib:.0f} MiB")


if __name__ == "__main__":
    main()
