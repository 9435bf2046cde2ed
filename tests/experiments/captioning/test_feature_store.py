"""Backbone features: the combination of feature maps, and the files of the cache, which are reused and verified."""

import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.engine import device
from cvlab.experiments.captioning import checkpoint, feature_store
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import build


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a function that loads the features of a photo listed twice, the folder of the cache, and the photo."""
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    path = tmp_path / "photo.png"
    photos.load(photo_paths.find_images(("sample",))[0]).save(path)
    extractor, ctx = FeatureExtractor(build(), ["bn2"]), device.select_device("cpu", "float32", 1)

    def load(pool=False, mirrored=False, extra=()):
        spec = feature_store.FeatureSpec(pool, mirrored)
        return feature_store.load_features(
            [feature_store.FeatureSource(extractor, 64), *extra], [path, path], ctx, spec, lambda: None
        )

    return load, tmp_path / "data" / feature_store.FOLDER, path


def test_features_are_stored_verified_and_reused(store, capsys):
    load, folder, _ = store
    first = load().clone()
    assert first.shape == (2, 4, 1280)
    assert first.dtype == torch.float16
    assert len(list(folder.glob("*.npy"))) == 1
    (path,) = folder.glob("*.npy")
    modified_ns = path.stat().st_mtime_ns
    assert torch.equal(load(), first)
    assert path.stat().st_mtime_ns == modified_ns
    torch.testing.assert_close(load(pool=True)[:, 0].float(), first.float().mean(1), rtol=1e-2, atol=1e-2)
    assert not torch.equal(load(mirrored=True), first)
    assert len(list(folder.glob("*.npy"))) == 3
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert torch.equal(load(), first)
    assert "computing it again" in capsys.readouterr().err


def test_a_changed_photo_of_the_same_name_gets_new_features(store):
    load, folder, path = store
    load()
    photos.load(path).rotate(90).save(path)
    load()
    assert len(list(folder.glob("*.npy"))) == 2


def test_features_stay_in_memory_if_the_disk_cannot_be_written(store, tmp_path, capsys):
    load, _, _ = store
    (tmp_path / "data").write_text("a file where the folder should be")
    assert load().shape == (2, 4, 1280)
    assert "could not be cached" in capsys.readouterr().err


def test_additional_backbones_have_separate_files(store):
    load, folder, _ = store
    first = load().clone()
    nanodet = checkpoint.build_feature_extractor((32, 16), "nanodet_g", None, torch.device("cpu"))
    for count, size_px in ((2, 64), (3, 96)):
        features = load(extra=[feature_store.FeatureSource(nanodet, size_px)])
        assert features.shape == (2, 4, 1280 + 512 + 256)
        assert len(list(folder.glob("*.npy"))) == count
    assert torch.equal(load(), first)


def noise_photos(count, size_px):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size_px, size_px, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def test_the_first_feature_map_defines_the_spatial_positions():
    extractor = checkpoint.build_feature_extractor((16, 8, 32), "efficientnet_lite0", None, torch.device("cpu"))
    images, sources = noise_photos(2, 64), [feature_store.FeatureSource(extractor, 64)]
    ctx = device.select_device("cpu", "float32", 1)
    features = feature_store.extract_features(sources, images, ctx, feature_store.FeatureSpec(pool=False))
    maps = extractor.batch(torch.stack([photos.to_tensor(image) for image in images]))
    medium, fine, coarse = (maps[name].detach() for name in extractor.names)
    channels = [feature_map.shape[1] for feature_map in (medium, fine, coarse)]
    assert features.shape == (2, 16, sum(channels))
    parts = [part.mT.unflatten(2, (4, 4)) for part in features.split(channels, 2)]
    torch.testing.assert_close(parts[0], medium)
    torch.testing.assert_close(parts[1][..., 1, 2], fine[..., 2:4, 4:6].mean((2, 3)))
    torch.testing.assert_close(parts[2], coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    pooled = feature_store.extract_features(sources, images, ctx, feature_store.FeatureSpec(pool=True))
    torch.testing.assert_close(pooled, features.mean(1, keepdim=True))


def test_the_maps_of_several_backbones_have_the_same_scale_and_positions():
    images, ctx = noise_photos(2, 64), device.select_device("cpu", "float32", 1)
    cpu, spec = torch.device("cpu"), feature_store.FeatureSpec(pool=False)
    sources = [
        feature_store.FeatureSource(checkpoint.build_feature_extractor((16,), "efficientnet_lite0", None, cpu), 64),
        feature_store.FeatureSource(checkpoint.build_feature_extractor((32, 16), "nanodet_g", None, cpu), 128),
    ]
    features = feature_store.extract_features(sources, images, ctx, spec)
    first, stride_32, stride_16 = features.split([112, 512, 256], 2)
    for part in (first, stride_32, stride_16):
        torch.testing.assert_close(part.square().mean((1, 2)), torch.ones(2))
    (single,) = sources[0].maps(images, ctx)  # 4 x 4, as is stride 32 of twice the size
    torch.testing.assert_close(first[0] / first[0].amax(), single[0].flatten(1).mT / single[0].amax())
    raw_32, raw_16 = sources[1].maps(images, ctx)
    torch.testing.assert_close(stride_32[0] / stride_32[0].amax(), raw_32[0].flatten(1).mT / raw_32[0].amax())
    averaged = raw_16[0].unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean((2, 4)).flatten(1).mT
    torch.testing.assert_close(stride_16[0] / stride_16[0].amax(), averaged / averaged.amax())
