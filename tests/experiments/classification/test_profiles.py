"""Profiles, the sizes of an experiment: named, overridden, chosen by throughput, errors; and budgets in sweeps."""

import json

import pytest

from cvlab.config import loading
from cvlab.errors import ConfigError
from cvlab.experiments.classification import throughput
from cvlab.runs import run_dir
from cvlab.runs.records import read_summary
from cvlab.sweeps.experiment import load_sweep

TEXT = """experiment: classify
data: {name: scenes10, num_train: 200, val_fraction: 0.02}
model: {name: deep_convnet, filters: [4], pools: [0]}
optimizer: {name: sgd, lr: 1e-2}
batch_size: 20
duration: {seconds: 0.5}
precision: float32
eval_every: 1000
profiles:
  small: {epochs: 0}
  middle: {epochs: 5, set: {model.filters: [8], batch_size: 40}}
  large: {epochs: 500, set: {optimizer: {name: adam, lr: 1e-3}}}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "p.yaml").write_text(TEXT)
    return "p.yaml"


def test_a_profile_is_applied_between_the_file_and_the_overrides(config_file):
    loaded = loading.load(config_file, ["profile=middle", "batch_size=10"])
    assert loaded.config.model.filters == (8,)
    assert loaded.config.batch_size == 10
    assert loaded.config.profile == "middle"
    assert not loaded.config.profiles
    assert not loaded.variants
    # quoted, as in the repr of Python's dictionaries
    assert loading.load(config_file, ['profile="middle"']).config.profile == "middle"
    large = loading.load(config_file, ["profile=large", "duration.epochs=2"]).config
    assert large.optimizer.name == "adam"
    assert large.duration.epochs == 2


def test_auto_validates_all_profiles(config_file, tmp_path):
    loaded = loading.load(config_file)
    assert list(loaded.variants) == ["profile=small", "profile=middle", "profile=large"]
    assert loaded.variants["profile=large"].config.optimizer.name == "adam"
    assert loaded.config.optimizer.name == "sgd"
    (tmp_path / "p.yaml").write_text(TEXT.replace("filters: [8]", "filters: [0]"))
    with pytest.raises(ConfigError, match=r"model.filters.0: expected a whole number >= 1, got 0"):
        loading.load(config_file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profile=midle"], r"override profile=midle: unknown profile 'midle'; did you mean 'middle'"),
        (["duration.epochs=1"], "auto needs a budget in duration.seconds; else name one of small, middle, large"),
        (["profiles.middle.epochs=-1"], r"profiles.middle.epochs: expected a number >= 0, got -1"),
    ],
)
def test_invalid_profiles_are_rejected(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        loading.load(config_file, overrides)


def test_a_profile_is_rejected_if_there_are_none(config_file, tmp_path):
    (tmp_path / "plain.yaml").write_text(TEXT.partition("profiles")[0])
    with pytest.raises(ConfigError, match=r"profile=small: no profiles are defined"):
        loading.load("plain.yaml", ["profile=small"])


@pytest.mark.parametrize(
    ("speeds", "chosen"), [((1e3, 1e3), "small"), ((1e3, 3e3, 1e3), "middle"), ((1e6,) * 3, "large")]
)
def test_auto_takes_the_largest_profile_that_the_throughput_allows(config_file, cvlab, monkeypatch, speeds, chosen):
    """With 200 images and half a second, 1,000 images per second are 2.5 epochs."""
    rates = iter(speeds)
    monkeypatch.setattr(throughput, "images_per_second", lambda *_: next(rates))
    loaded = loading.load(config_file)
    config = throughput.choose_profile(loaded, loaded.config.data)
    assert config.profile == chosen
    assert list(rates) == []


def test_a_run_logs_its_profile_and_can_be_repeated_from_its_directory(config_file, cvlab):
    code, out, err = cvlab("train", config_file, "--json")
    assert code == 0, err
    assert "profile small: " in err
    assert "using profile " in err
    run = json.loads(out)["run"]
    recorded = loading.load(run)
    assert recorded.config.profile in ("small", "middle")
    assert recorded.config.duration.steps
    repeated = json.loads(cvlab("run", run, "--json", "-q")[1])
    summaries = [read_summary(run_dir.Path(path)) for path in (run, repeated["run"])]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]


def test_a_dry_run_does_not_measure_the_throughput(config_file, cvlab, monkeypatch):
    monkeypatch.setattr(throughput, "images_per_second", None)
    code, out, _ = cvlab("train", config_file, "--dry-run")
    assert code == 0
    assert "profile=small, profile=middle, profile=large" in out


def test_a_sweep_has_one_profile_and_runs_trials_with_a_budget_one_at_a_time(config_file, cvlab):
    code, _, err = cvlab("sweep", config_file, "seeds=[0,1]")
    assert code == 2
    assert "base.profile=small or base.profile=middle or base.profile=large" in err
    code, _, err = cvlab("sweep", config_file, "seeds=[0,1]", "base.profile=middle", "--workers", 2)
    assert code == 2
    assert "must run one at a time" in err
    config = load_sweep(config_file, ["seeds=[0,1]", "base.profile=middle"]).config
    assert config.base["model"]["filters"] == (8,)
    assert "profiles" not in config.base


def test_a_budget_that_is_too_short_is_rejected(config_file, cvlab):
    code, _, err = cvlab("train", config_file, "profile=small", "duration.seconds=1e-6")
    assert code == 2
    assert "too short for a step" in err
