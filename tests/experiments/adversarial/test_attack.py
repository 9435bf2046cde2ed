"""The attack command: success on the saved file, bounds, interruptions."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base

from cvlab.data import photo_paths, photos
from cvlab.models import pretrained


def classify_file(path):
    """Classify a file without using any code of attacks."""
    model = pretrained.build()
    with Image.open(path) as image:
        view = model.transform(image.convert("RGB"))
    with torch.inference_mode():
        return model.classes[int(model.module(photos.to_tensor(view)[None]).argmax())]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--size", "model"],
        ["--method", "pgd", "--eps", "4"],
        ["batch_size=1", "precision=auto"],
        ["--method", "deepfool", "--size", "model"],
        ["--method", "cw", "--size", "model", "steps=15", "search_steps=2"],
    ],
)
def test_the_saved_file_is_classified_as_the_target(two_photos, cvlab, tmp_path, options):
    paths = two_photos[:1] if {"model", "pgd"} & set(options) else two_photos
    code, out, err = cvlab("attack", "--target", "ostrich", *paths, *options, "--json")
    assert code == 0, err
    result = json.loads(out)
    for path, row in zip(paths, result["results"], strict=True):
        saved = tmp_path / result["run"] / row["attacked"]
        assert row["success"]
        assert row["label"] == "ostrich"
        assert row["target_after"] > row["target_before"]
        is_view = "model" in options
        assert classify_file(saved) == "ostrich"
        _, out, _ = cvlab("classify", saved, "--json")
        prediction = json.loads(out)["results"][0]
        assert prediction["label"] == "ostrich"
        assert prediction["score"] == pytest.approx(row["score"], abs=1e-5)
        before = photos.load(path)
        before = pretrained.build().transform(before) if is_view else before
        change = np.asarray(photos.load(saved), int) - np.asarray(before, int)
        assert np.abs(change).max() == round(row["linf_255"]) > 0
        assert row["l2_photo"] == pytest.approx(np.sqrt((change**2).sum()) / 255, rel=1e-4)
        if "pgd" in options:
            assert row["linf_255"] <= 4.001
        assert (tmp_path / result["run"] / row["panel"]).is_file()


def test_untargeted_attack(two_photos, cvlab):
    code, out, _ = cvlab("attack", two_photos[0], "--json", "--then", "saliency")
    row = json.loads(out)["results"][0]
    assert code == 0
    assert row["label"] != row["before"]["label"]
    assert "target" not in row
    assert "saliency" in row


def test_the_attack_survives_compression_resizing_and_cropping(two_photos, cvlab, tmp_path):
    code, out, err = cvlab("attack", two_photos[0], "--survive", "jpeg60,resize,crop", "--json")
    assert code == 0, err
    result = json.loads(out)
    row = result["results"][0]
    assert row["survived"]
    assert row["survives"] == "jpeg60, resize, crop"
    assert result["metrics"]["survival_rate"] == result["metrics"]["success_rate_crop"] == 1
    saved = Image.open(tmp_path / result["run"] / row["attacked"])
    saved.save("compressed.jpg", quality=60)
    width, height = saved.size
    saved.resize((round(width / 2), round(height / 2)), Image.Resampling.BICUBIC).save("half.png")
    saved.crop((0, 0, round(0.9 * width), round(0.9 * height))).save("corner.png")
    _, out, _ = cvlab("classify", "compressed.jpg", "half.png", "corner.png", "--json")
    assert row["before"]["label"] not in [prediction["label"] for prediction in json.loads(out)["results"]]


def test_an_attack_that_survives_no_change_has_exit_code_3(two_photos, cvlab):
    options = ("--survive", "jpeg10", "--target", "ostrich", "steps=2", "--json")
    code, out, _ = cvlab("attack", two_photos[0], *options)
    document = json.loads(out)
    assert code == 3
    assert not document["results"][0]["survived"]
    assert document["results"][0]["survives"] == "nothing"


@pytest.mark.parametrize("option", ["--eps=4", "--survive=crop"])
def test_settings_of_other_methods_are_rejected(cvlab, option):
    code, _, err = cvlab("attack", "sample", "--method", "cw", option)
    assert code == 2
    assert "has no effect with method cw; use method" in err


@pytest.mark.parametrize("text", ["jpg75", "jpeg0", "jpeg101", "crop,crop"])
def test_unknown_and_duplicate_changes_are_rejected(cvlab, text):
    code, _, err = cvlab("attack", "sample", "--survive", text)
    assert code == 2
    assert "survive: " in err


def test_a_photo_of_the_target_class_is_unchanged(two_photos, cvlab, tmp_path):
    _, out, _ = cvlab("classify", two_photos[0], "--json")
    label = json.loads(out)["results"][0]["label"]
    code, out, _ = cvlab("attack", "--target", label, *two_photos[:1], "--json")
    result = json.loads(out)
    row = result["results"][0]
    assert code == 0
    assert row["is_target_before"]
    assert row["outcome"] == f"already {label}, left as it is"
    assert row["steps"] == 0
    assert row["linf_255"] == 0
    assert "success_rate" not in result["metrics"]
    assert result["metrics"]["num_attacked"] == 0


def test_a_signal_stops_between_two_steps(two_photos, cvlab, monkeypatch):
    from cvlab.engine import image_optimizer

    optimization_steps = image_optimizer.optimization_steps

    def raise_interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return optimization_steps(*arguments)

    monkeypatch.setattr(image_optimizer, "optimization_steps", raise_interrupt)
    code, _, err = cvlab("attack", "--target", "ostrich", *two_photos)
    assert code == 130
    assert "interrupted after 0 photos; continue with `cvlab resume " in err
    monkeypatch.setattr(image_optimizer, "optimization_steps", optimization_steps)
    code, out, _ = cvlab("resume", "latest", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["success_rate"] == 1


@pytest.mark.parametrize("size", ["original", "model"])
def test_the_attacked_image_keeps_camera_date_and_color_profile(cvlab, tmp_path, size):
    sample = Image.open(photo_paths.find_images(["sample"])[0]).convert("RGB").resize((300, 200))
    exif = Image.Exif()
    exif[Base.Make], exif[Base.DateTime], exif[Base.Orientation] = "Camera Works", "2026:11:26 10:00:00", 6
    exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = "2026:11:26 09:59:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sample.save("photo.jpg", exif=exif, icc_profile=profile)
    code, out, err = cvlab("attack", "photo.jpg", "--method", "fgsm", "--size", size, "--json")
    assert code in (0, 3), err
    result = json.loads(out)
    with Image.open(tmp_path / result["run"] / result["results"][0]["attacked"]) as attacked:
        assert attacked.size == ((200, 300) if size == "original" else (224, 224))
        assert attacked.info["icc_profile"] == profile
        saved_exif = attacked.getexif()
        assert (saved_exif[Base.Make], saved_exif[Base.DateTime]) == ("Camera Works", "2026:11:26 10:00:00")
        assert saved_exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] == "2026:11:26 09:59:00"
        assert Base.Orientation not in saved_exif


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("L", b"GRAY")])
def test_a_color_profile_that_is_not_rgb_is_left_out(tmp_path, mode, space):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = space
    Image.new(mode, (9, 9)).save(tmp_path / "a.jpg", icc_profile=bytes(profile))
    assert photos.read_metadata(tmp_path / "a.jpg") == {}
    assert photos.read_metadata(tmp_path / "none.jpg") == {}
