"""Checkpoints with a valid checksum and invalid values: a one-line error, or no effect on the result."""

import json
import math
import random
import shutil

import pytest
import torch

from cvlab.cli import main
from cvlab.errors import CvlabError, StoppedError
from cvlab.runs import checkpoint
from tests import tiny
from tests.engine.test_resume import STATE_KEYS, stop_at

INVALID_VALUES = (
    *(
        None,
        True,
        -1,
        7,
        10**12,
        10**400,
        0.5,
        math.nan,
        math.inf,
        "x",
        "",
        [],
        [1, "x"],
        {},
        {"a": {"b": None}},
        {3: 4},
    ),
    *(torch.zeros(0), torch.full((2, 3), math.nan), (("a", "b"),), {"a": torch.zeros(2, 2)}),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "run"
    with pytest.raises(StoppedError):
        tiny.train(path, tiny.settings(), stop_at(29))
    return path


def edit_checkpoints(run, edit):
    for step in checkpoint.steps(run / "checkpoints"):
        path = checkpoint.path_of(run / "checkpoints", step)
        state = checkpoint.load(path)
        edit(state)
        checkpoint.write(path, state)


def set_value(key, value):
    def edit(state):
        *parents, last = key.split(".")
        block = state
        for part in parents:
            block = block[part]
        block[last] = value

    return edit


@pytest.mark.parametrize(
    "key", [*STATE_KEYS, "optimizer.state", "optimizer.param_groups", "unknown", "progress.unknown"]
)
def test_an_invalid_value_of_a_key_is_ignored_or_a_one_line_error(stopped, tmp_path, key):
    for number, value in enumerate(random.Random(key).sample(INVALID_VALUES, 3)):
        run = tmp_path / str(number)
        shutil.copytree(stopped, run)
        edit_checkpoints(run, set_value(key, value))
        try:
            tiny.train(run)
        except CvlabError as error:
            assert "\n" not in str(error)
            assert error.code in (5, 6, 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("model", value) for value in (None, [], [1], {}, {"a": 1}, "x", 7, {3: torch.zeros(1)})),
        *(("step", value) for value in ("x", None, -1, 0.5, 10**12, True, 33)),
        *(("progress.total_steps", value) for value in ("x", None, -1, 10**12, 33, True)),
        *(("uses_ema", value) for value in (7, None, "x")),
        *(("ema_model", value) for value in (7, None, [], {})),
        *(("progress.loss_sums", value) for value in ({"loss": "x"}, {"loss": torch.zeros(3)}, [])),
        *(("progress.plan_history", value) for value in (("a",), ((1,),), 7)),
        *(("optimizer.state", value) for value in ({0: {"exp_avg": "x"}}, {0: {"exp_avg": torch.zeros(9)}})),
        ("progress.best_value", "x"),
        ("metrics_bytes", 10**12),
        ("unknown", 1),
        ("progress.unknown", 1),
        ("extra_state.losses", torch.zeros(3)),
    ],
    ids=repr,
)
def test_values_that_would_change_the_result_are_rejected(stopped, tmp_path, key, value):
    shutil.copytree(stopped, tmp_path / "run")
    edit_checkpoints(tmp_path / "run", set_value(key, value))
    with pytest.raises(CvlabError) as error:
        tiny.train(tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, 7], ids=repr)
@pytest.mark.parametrize("key", ["model", "ema_model", "uses_ema"])
def test_eval_rejects_invalid_weights(tmp_path, key, value):
    model = torch.nn.Linear(2, 2)
    state = {"model": dict(model.state_dict()), "ema_model": dict(model.state_dict()), "uses_ema": True}
    missing = {name: part for name, part in state.items() if name != key}
    with pytest.raises(CvlabError):
        checkpoint.load_eval_weights(model, missing, tmp_path)
    used = {**state, "uses_ema": key != "model"} | {key: value}
    if key == "uses_ema" or (key == "ema_model" and value is None):
        return
    with pytest.raises(CvlabError):
        checkpoint.load_eval_weights(model, used, tmp_path)


TRAIN_COMMAND = (
    *("train", "quickstart", "data.num_train=60", "batch_size=20", "duration={steps: 3}", "expect=[]"),
    *("evaluate_test=false", "threads=1", "-q"),
)


@pytest.mark.parametrize("key", ["threads", "processes"])
def test_invalid_numbers_in_env_json_are_one_line_errors(tmp_path, key, capsys):
    assert main.run_command_line([*TRAIN_COMMAND, f"--runs-dir={tmp_path}"]) == 0
    run = next(tmp_path.glob("2*"))
    env, status = (json.loads((run / name).read_text()) for name in ("env.json", "status.json"))
    for value in ("many", -3, 0, 10**12, 10**400, 2.5, True, [], {}, math.nan):
        (run / "env.json").write_text(json.dumps(env | {key: value}))
        (run / "status.json").write_text(json.dumps(status | {"status": "interrupted"}))
        capsys.readouterr()
        assert main.run_command_line(["resume", str(run)]) == 5, value
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(error) == 1
        assert key in error[0]
    (run / "env.json").write_text(json.dumps(env | {"resumed": 7, key: None}))
    assert main.run_command_line(["resume", str(run)]) == 0
