"""All shipped configurations are valid, documented, have expectations and a plan, and can take a step."""

import json
import re

import pytest
import torch

from cvlab.config import loading
from cvlab.errors import ConfigError
from cvlab.experiments.style.config import has_network

NAMES = loading.shipped_names()
COURSE_STYLES = ("style_composition_vii", "style_scream", "style_starry_night")  # need weights that must be fetched
STYLES = ("style", "style_fast", "style_sketch", "style_texture", "style_texture_synthesis", *COURSE_STYLES)
PHOTOS = (
    *("classify_photos", "saliency", "attack", "class_visualization", "class_visualization_course"),
    *("dream", "look", "feature_inversion", *STYLES, "detect", "caption"),
)
EXPERIMENTS = {name: loading.load(name).config.experiment for name in NAMES}
DETECTORS = [name for name in NAMES if EXPERIMENTS[name] == "detector"]
CAPTIONERS = [name for name in NAMES if EXPERIMENTS[name] == "captioner"]
USER_DATA = ("photos", "yolo", "faster_rcnn")  # need photos of the user; below they use a built-in data set
WITHOUT_STEPS = ("knn",)
TRAIN_CONFIGS = [name for name in NAMES if name not in (*PHOTOS, *DETECTORS, *CAPTIONERS, *USER_DATA, *WITHOUT_STEPS)]
SHORT_OVERRIDES = {  # the expectations still hold
    "class_visualization": ("targets=[tick]", "frames=2", "steps=30"),
    "dream": ("size=160", "octaves=2"),
    "feature_inversion": ("layers=[blocks.0,blocks.3]", "steps=60"),
    "style": ("size=128", "steps=100"),
    **({"style_fast": ()} if has_network() else {}),
}
VARIANT_OVERRIDES = {  # variants of those above: a few steps, without expectations
    "class_visualization_course": ("targets=[tick]", "frames=2", "steps=2", "expect=[]"),
    "style_sketch": ("size=64", "steps=2", "expect=[]"),
    "style_texture": ("size=64", "steps=2", "expect=[]"),
    "style_texture_synthesis": ("size=64", "steps=2", "expect=[]"),
}
FALLBACK_BUDGET = {"data.num_train": 64, "batch_size": 8, "duration.steps": 2, "log_every": 1}


def command_of(name):
    if name in PHOTOS:
        return "run"
    return "sweep" if EXPERIMENTS[name] == "sweep" else "train"


def train_arguments(name, folder):
    """Return arguments of `cvlab train`: the configuration in each of its profiles, or two trials of a sweep."""
    loaded = loading.load(name)
    if command_of(name) == "train":
        return [[name, variant] for variant in loaded.variants] or [[name]]
    trials = loaded.config.trials()
    files = []
    for trial in (trials[0], trials[-1]):
        path = folder / f"{trial.name[:3]}.yaml"
        path.write_text(json.dumps(trial.raw))
        files.append([path])
    return files


@pytest.mark.parametrize("name", NAMES)
class TestEachConfiguration:
    def test_header_has_purpose_command_and_result(self, name):
        text = (loading.shipped_folder() / f"{name}.yaml").read_text()
        header = [line for line in text.splitlines() if line.startswith("#")]
        assert re.match(r"# Shows: .{20,}", header[0])
        joined = "\n".join(header)
        command = f"{name} data.path=" if name in USER_DATA else f"configs/{name}.yaml"
        assert f"# Command: cvlab {command_of(name)} {command}" in joined
        assert re.search(r"# Result: .+", joined), "the header gives device, seconds and result"
        shortest = 5 if re.search(r"^base: \w+$", text, re.MULTILINE) else 10  # with a base, only what differs
        assert shortest <= len(text.splitlines()) <= 40

    def test_expectations_for_the_data_set_and_its_fallback(self, name):
        config = loading.load(name).config
        assert bool(config.expect) == (name not in USER_DATA)
        assert bool(config.expect_fallback) == bool(getattr(config, "data", None) and config.data.fallback)

    def test_plan(self, name, cvlab):
        overrides = ["data={name: scenes}", "expect=[]", "expect_fallback=[]"] if name in DETECTORS else []
        overrides = ["data={name: scenes10}"] if name == "photos" else overrides
        if name in CAPTIONERS:
            overrides = ["data={name: scene_captions}", "min_word_count=1", "expect=[]", "expect_fallback=[]"]
        code, out, _ = cvlab("train", name, *overrides, "--dry-run", "--json")
        if name in COURSE_STYLES and code == 4:
            assert "cvlab models fetch torchvision:squeezenet1_1" in out
            return  # tests/experiments/style/test_style.py runs them with weights from a file
        plan = json.loads(out)
        if name == "style_fast":
            assert plan.get("network") if has_network() else code == 2
            return
        assert code == 0
        assert plan["trials" if command_of(name) == "sweep" else "parameters"] > 1


@pytest.mark.parametrize("name", TRAIN_CONFIGS)
class TestEachTrainConfiguration:
    def test_two_steps_on_the_fallback(self, name, cvlab, tmp_path):
        for arguments in train_arguments(name, tmp_path):
            overrides = [f"{key}={value}" for key, value in FALLBACK_BUDGET.items()]
            overrides += ["evaluate_test=false"]  # it takes half a minute with the largest models
            code, out, err = cvlab(
                "train", *arguments, *overrides, "data.val_fraction=0.004", "expect=[]", "expect_fallback=[]", "--json"
            )
            assert code == 0, err
            result = json.loads(out)
            assert result["metrics"]["steps"] == 2
            assert result["data"].startswith("scenes10")


@pytest.mark.parametrize("name", DETECTORS)
def test_two_steps_of_each_detector_on_the_built_in_scenes(name, cvlab):
    overrides = ["data={name: scenes, num_train: 4}", "size=64", "views=1", "batch_size=2", "duration={steps: 2}"]
    code, out, err = cvlab(
        "train", name, *overrides, "evaluate_test=false", "expect=[]", "expect_fallback=[]", "--json"
    )
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["steps"] == 2
    assert 0 <= metrics["map50"] <= 1


@pytest.mark.parametrize("name", CAPTIONERS)
def test_two_steps_of_each_captioner_on_the_built_in_scenes(name, cvlab):
    overrides = ["data={name: scene_captions, num_train: 4}", "size=64", "min_word_count=1", "batch_size=2", "beam=2"]
    overrides += ["duration={steps: 2}", "evaluate_test=false", "expect=[]", "expect_fallback=[]"]
    code, out, err = cvlab("train", name, *overrides, "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["steps"] == 2
    assert 0 <= metrics["bleu1"] <= 1


@pytest.mark.parametrize("name", WITHOUT_STEPS)
def test_configurations_without_steps_on_the_fallback(name, cvlab):
    overrides = ["data={name: scenes10, num_train: 60, num_test: 20}", "ks=[1,5]", "expect=[]", "expect_fallback=[]"]
    code, out, err = cvlab("train", name, *overrides, "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["k"] in (1, 5)


@pytest.mark.parametrize("name", [name for name in PHOTOS if name not in COURSE_STYLES])
def test_expectations_of_configurations_on_photos_hold(name, cvlab):
    code, out, err = cvlab("run", name, "--json", *(SHORT_OVERRIDES | VARIANT_OVERRIDES).get(name, ()))
    assert code == 0, err
    assert json.loads(out)["results"]
    assert loading.load(name).config.expect


def test_documented_configurations_exist():
    expected = (
        "quickstart cifar_bn cifar_no_bn cifar_overfit_small cifar_three_layer_epoch cifar_fc_overfit_3 "
        "cifar_fc_overfit_5 cifar_overfit_small_grid cifar_optimizers cifar_dropout cifar_kaiming_depth "
        "cifar_losses cifar_schedules cifar_recent_optimizers cifar_training_keys "
        "cifar_learning_rates cifar_bn_lr_sweep cifar_bn_lr_sweep_fair cifar_api_barebones cifar_api_module "
        "cifar_api_sequential cifar_robust cifar_robust_plain cifar_augmentation_sweep "
        "cifar_plain32 cifar_resnet32 cifar_vgg_half_60s cifar_60s cifar_94 cifar_96 saliency attack "
        "class_visualization dream look yolo_scenes yolo_fruit yolo_bccd yolo_voc07 yolo_coco detect "
        "faster_rcnn_scenes faster_rcnn_fruit faster_rcnn_bccd faster_rcnn_voc07 "
        "caption caption_overfit caption_scenes caption_flickr8k_rnn caption_flickr8k_lstm caption_flickr8k_attention "
        "style style_texture_synthesis feature_inversion style_composition_vii style_scream style_starry_night"
    )
    assert set(expected.split()) <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("cifar_", "style_"))])
def test_a_name_without_its_prefix_is_suggested_with_it(name):
    short = name.partition("_")[2]
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        loading.find(short)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_expectations_hold_on_the_fallback(name, cvlab):
    if name in COURSE_STYLES:
        pytest.skip("needs weights that have to be fetched")
    if name == "style_fast" and not has_network():
        pytest.skip("the extra `style` is not installed")
    if name == "cifar_96" and not torch.cuda.is_available():
        pytest.skip("hours without a GPU")
    code, out, err = cvlab(command_of(name), name, "--json", "-q")
    assert code == 0, err + out


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    ["cifar_overfit_small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar_bn", "cifar_no_bn"))],
)
def test_expectations_hold_on_real_data(name, cvlab, real_cifar10):
    code, out, err = cvlab("train", name, "--json", "-q")
    assert code == 0, err + out
    assert json.loads(out)["data"] == "cifar10"
