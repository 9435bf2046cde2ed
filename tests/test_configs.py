"""Over all shipped configurations: valid, documented, with expectations, planned, and able to take a step."""

import json
import re

import pytest

from cvlab import config

NAMES = config.shipped_names()
STANDIN_BUDGET = {"data.num_train": 64, "batch_size": 8, "duration.steps": 2, "log_every": 1}


@pytest.mark.parametrize("name", NAMES)
class TestEach:
    def test_header_says_what_it_shows_and_how_it_is_run(self, name):
        text = (config.shipped_folder() / f"{name}.yaml").read_text()
        header = [line for line in text.splitlines() if line.startswith("#")]
        assert re.match(r"# Shows: .{20,}", header[0])
        joined = "\n".join(header)
        assert f"# Command: cvlab train configs/{name}.yaml" in joined
        assert re.search(r"# Result: .+", joined), "the header gives device, seconds and result"
        assert 10 <= len(text.splitlines()) <= 40

    def test_expectations_for_the_real_set_and_for_its_stand_in(self, name):
        chosen = config.load(name).config
        assert chosen.expect
        assert bool(chosen.expect_standin) == bool(chosen.data.standin)

    def test_plan(self, name, cvlab):
        code, out, _ = cvlab("train", name, "--dry-run", "--json")
        assert code == 0 and json.loads(out)["parameters"] > 0

    def test_two_steps_on_the_stand_in(self, name, cvlab):
        short = [f"{key}={value}" for key, value in STANDIN_BUDGET.items()]
        code, out, err = cvlab(
            "train", name, *short, "data.val_fraction=0.02", "expect=[]", "expect_standin=[]", "--json"
        )
        assert code == 0, err
        found = json.loads(out)
        assert found["metrics"]["steps"] == 2 and found["data"].startswith("scenes10")


def test_there_are_the_promised_ones():
    promised = "quickstart cifar_bn cifar_no_bn overfit_small three_layer_epoch fc_overfit_3 fc_overfit_5"
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_expectations_hold_on_the_stand_in(name, cvlab):
    code, out, err = cvlab("train", name, "--json", "-q")
    assert code == 0, err + out


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cifar_bn", "cifar_no_bn", "overfit_small"])
def test_expectations_hold_on_real_data(name, cvlab, real_cifar10):
    code, out, err = cvlab("train", name, "--json", "-q")
    assert code == 0, err + out
    assert json.loads(out)["data"] == "cifar10"
