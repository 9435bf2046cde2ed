"""Search: proposals from the run directories alone, pruning by the median, complete searches."""

import importlib.util
import json
import math
from collections import Counter

import pytest

from cvlab.config import loading
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import run_dir
from cvlab.runs.find import create_run
from cvlab.runs.records import PRUNE_FILE, pruning_reason, read_status, read_summary
from cvlab.sweeps import adaptive, experiment, results, scheduler, search, trials
from cvlab.sweeps.search import Range, SearchConfig, TrialRecord
from tests.conftest import SMALL_SWEEP, until, weights_of_trials

HAS_OPTUNA = importlib.util.find_spec("optuna") is not None
needs_optuna = pytest.mark.skipif(not HAS_OPTUNA, reason="optuna is not installed")
all_algorithms = pytest.mark.parametrize("algorithm", ["random", pytest.param("optuna", marks=needs_optuna)])
BASE = SMALL_SWEEP.partition("grid")[0].replace("num_train: 1000", "num_train: 200").replace("1500", "30")
SEARCH = """search:
  algorithm: optuna
  trials: 4
  startup: 2
  space:
    optimizer.lr: {low: 1e-4, high: 1, log: true}
    batch_size: {low: 10, high: 40, step: 10, int: true}
    model.batchnorm: [true, false]
"""
SPACE = {
    "x": Range(low=0, high=1),
    "n": Range(low=2, high=9, int=True),
    "lr": Range(low=1e-6, high=1, log=True),
    "part": ({"name": "sgd"}, {"name": "adam", "betas": (0.9, 0.99)}, None),
}


def search_config(**options):
    return SearchConfig(**({"algorithm": "optuna", "trials": 9, "space": SPACE} | options))


def random_changes(space, trials=40, **options):
    return [
        trial.changes
        for trial in run_trials(search_config(algorithm="random", space=space, **options), lambda _: 0, trials)
    ]


def run_trials(config, objective, count):
    """Return trials proposed one after the other, with the values `objective(changes)`."""
    trials = []
    for _ in range(count):
        changes = search.propose(config, trials)
        trials.append(TrialRecord(changes, "done", objective(changes)))
    return trials


@all_algorithms
def test_proposals_are_in_the_search_space(algorithm):
    for trial in run_trials(search_config(algorithm=algorithm), lambda changes: changes["x"], 25):
        assert 0 <= trial.changes["x"] <= 1
        assert 1e-6 <= trial.changes["lr"] <= 1
        assert trial.changes["n"] in range(2, 10)
        assert isinstance(trial.changes["n"], int)
        assert trial.changes["part"] in SPACE["part"]


@all_algorithms
def test_proposals_are_deterministic(algorithm):
    config = search_config(algorithm=algorithm, startup=3)
    done = run_trials(config, lambda changes: changes["x"], 8)
    for number in range(8):
        assert search.propose(config, done[:number]) == done[number].changes
    other = search_config(algorithm=algorithm, startup=3, seed=1)
    assert search.propose(other, done) != search.propose(config, done)
    assert len({repr(trial.changes) for trial in done}) == 8


def test_random_values_depend_only_on_seed_number_and_key():
    changes = random_changes({"x": Range(low=0, high=1), "lr": Range(low=1e-4, high=1, log=True)}, 3)
    assert [trial["x"] for trial in changes] == [trial["x"] for trial in random_changes({"x": Range(low=0, high=1)}, 3)]
    assert [trial["x"] for trial in changes[:2]] == [0.21352889634152072, 0.3745018404921109]
    assert changes[0]["lr"] == pytest.approx(0.00033230711131881105)


def test_random_search_covers_a_finite_space_without_repetition():
    space = {"n": Range(low=2, high=6, step=2, int=True), "x": Range(low=0.1, high=0.5, step=0.1), "k": (1, True)}
    samples = random_changes(space, 30)
    assert len({repr(change) for change in samples}) == 3 * 5 * 2
    assert sorted({change["n"] for change in samples}) == [2, 4, 6]
    assert sorted({change["x"] for change in samples}) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="trials: 31, but the space has 30 points; use grid for all"):
        search_config(algorithm="random", space=space, trials=31)
    assert search_config(algorithm="random", space={"n": Range(low=0, high=1e300, int=True)}).num_points() > 9


def test_random_values_are_uniform_on_their_scale():
    quantiles = [(k + 0.5) / 10000 for k in range(10000)]
    decades = Counter(math.floor(math.log10(Range(low=1e-4, high=1, log=True).at(q))) for q in quantiles)
    assert decades == dict.fromkeys((-4, -3, -2, -1), 2500)
    integers = Counter(Range(low=3, high=6, int=True).at(q) for q in quantiles)
    assert integers == dict.fromkeys((3, 4, 5, 6), 2500)
    log_integers = Counter(Range(low=1, high=8, int=True, log=True).at(q) for q in quantiles)
    shares = {n: math.log((n + 0.5) / (n - 0.5)) / math.log(8.5 / 0.5) for n in range(1, 9)}
    assert {n: count / 10000 for n, count in log_integers.items()} == pytest.approx(shares, abs=2e-4)
    assert Range(low=1, high=8, int=True, log=True).at(0.0) == 1


@needs_optuna
@pytest.mark.parametrize(("goal", "sign"), [("maximize", -1), ("minimize", 1)])
def test_optuna_is_better_than_chance(goal, sign):
    config = search_config(space={"x": Range(low=-3, high=3), "y": Range(low=-3, high=3)}, goal=goal)
    done = run_trials(config, lambda changes: sign * ((changes["x"] - 1) ** 2 + (changes["y"] + 1) ** 2), 60)
    distances = [abs(trial.value) for trial in done]
    assert sorted(distances[30:])[15] < 0.5 * sorted(distances[:10])[5]


@needs_optuna
def test_trials_are_passed_to_optuna_with_their_state():
    changes = search.propose(search_config(), [])
    records = [
        TrialRecord(changes, "running"),
        TrialRecord(changes, "failed"),
        TrialRecord(changes, "pruned"),
        TrialRecord(changes, "pruned", curve={5: 0.2}),
        TrialRecord(changes, "done", 0.5),
    ]
    states = [search._optuna_trial(search_config(), trial).state.name for trial in records]
    assert states == ["RUNNING", "FAIL", "PRUNED", "PRUNED", "COMPLETE"]
    assert search.propose(search_config(startup=1), records)


def test_boundary_points_have_every_end_and_every_choice_once():
    points = search_config().boundary_points()
    assert points[0] == {"x": 0, "n": 2, "lr": 1e-6, "part": {"name": "sgd"}}
    assert len(points) == 1 + 3 + 2
    assert [point["n"] for point in points].count(9) == 1
    assert points[-1]["part"] is None


def test_trials_worse_than_the_median_are_pruned():
    others = [{10: 0.1, 20: 0.2}, {10: 0.3, 20: 0.4}, {10: 0.5, 20: 0.6}]
    config = search_config(prune="median", startup=3)
    assert search.should_prune(config, {}, others) is None
    assert search.should_prune(config, {10: 0.3}, others) is None, "as good as the median"
    reason = "val_accuracy 0.29, the median of 3 trials at step 10 is 0.3"
    assert search.should_prune(config, {10: 0.29}, others) == reason
    assert search.should_prune(config, {10: 0.5, 20: 0.1}, others) is None, "the best value counts"
    assert search.should_prune(config, {15: 0.29}, others) == reason.replace("step 10", "step 15"), (
        "compared with the last value before"
    )
    assert search.should_prune(config, {5: 0.0}, others) is None, "no trial has a value so early"
    assert search.should_prune(search_config(startup=4), {10: 0.0}, others) is None
    assert search.should_prune(search_config(startup=3, goal="minimize"), {10: 0.31}, others) is not None
    assert search.should_prune(search_config(startup=3, goal="minimize"), {10: 0.29}, others) is None


def load_errors(tmp_path, text, *overrides):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        loading.load("s.yaml", overrides)
    return [str(error) for error in (caught.value, *caught.value.further_errors)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("low: 1e-4, high: 1,", "low: 1, high: 1,"),
            "s.yaml:17:5: search.space.optimizer.lr: low 1 is not below",
        ),
        (("low: 1e-4", "low: 0"), "search.space.optimizer.lr: log: low must be above 0"),
        (("low: 1e-4, high: 1, log: true", "low: -1, high: 1"), "s.yaml:17:5: optimizer.lr: expected a number > 0"),
        (("log: true", "log: true, step: 0.1"), "log and step exclude each other"),
        (("low: 1e-4", "lo: 1e-4"), "unknown key 'search.space.optimizer.lr.lo'; did you mean 'low'"),
        (("optimizer.lr", "optimizer.lrr"), "s.yaml:17:5: unknown key 'optimizer.lrr'; did you mean 'lr'"),
        (("[true, false]", "[true, 3]"), "s.yaml:19:5: model.batchnorm: expected true or false, got 3"),
        (("[true, false]", "[]"), "space.model.batchnorm: the list of choices is empty"),
        (("[true, false]", "[true, true]"), "space.model.batchnorm: a choice is listed twice"),
        (("[true, false]", "7"), "search.space.model.batchnorm: expected a block of keys or a list, got 7"),
        ((", int: true", ""), "got 10; a range of whole numbers has int: true"),
        (("high: 40", "high: 40.5"), "search.space.batch_size: int: low, high and step must be whole numbers"),
        (("trials: 4", "trials: 0"), "s.yaml:14:3: search.trials: expected a whole number >= 1 and <= 1000, got 0"),
        (("startup: 2", "metric: val_acuracy"), "no metric 'val_acuracy'; did you mean 'val_accuracy'"),
        (("optuna", "grid"), "s.yaml:13:3: search.algorithm: expected random | optuna, got"),
        (("algorithm: optuna\n  trials: 4", "trials: 9\n  prune: 3"), "search.prune: expected"),
        (("search:", "seeds: [0, 1]\nsearch:"), "seeds and search: a search proposes all trials"),
        (("search:", "grid: {reg: [0.1]}\nsearch:"), "grid and search: a search proposes all trials"),
        (("model.batchnorm", "model.batchnorm: [true]\n    model"), "model.batchnorm is varied twice, also by model"),
    ],
)
def test_errors_have_their_position(tmp_path, change, message):
    errors = load_errors(tmp_path, BASE + SEARCH.replace(*change))
    assert any(message in text for text in errors), errors


def test_overrides_of_a_space(tmp_path):
    (tmp_path / "s.yaml").write_text(BASE + SEARCH)
    config = loading.load("s.yaml", ["search.space.optimizer.lr=[1e-3,1e-2]", "search.trials=7"]).config
    assert config.search.space["optimizer.lr"] == (1e-3, 1e-2)
    assert config.search.trials == 7
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert loading.load("again.yaml").config.to_yaml() == config.to_yaml()


@all_algorithms
def test_a_complete_search(cvlab, tmp_path, algorithm):
    text = BASE + SEARCH.replace("optuna", algorithm)
    (tmp_path / "s.yaml").write_text(text + "expect: [best > 0, trials == 4, max(val_accuracy) > 0]\n")
    code, out, err = cvlab("sweep", "s.yaml", "--json")
    result = json.loads(out)
    assert code == 0, err
    run = (tmp_path / "runs" / "latest").resolve()
    summary = read_summary(run)
    values = [read_summary(trial)["metrics"]["val_accuracy"] for trial in sorted(run.glob("trials/*"))]
    assert result["metrics"] == {"trials": 4, "diverged": 0, "pruned": 0, "best": max(values)}
    assert summary["best"]["trial"] == sorted(run.glob("trials/*"))[values.index(max(values))].name
    assert list(result["settings"][0]["keys"]) == ["optimizer.lr", "batch_size", "model.batchnorm"]
    changes = [adaptive.read_changes(trial) for trial in adaptive.trial_dirs(run)]
    trial_configs = [loading.load(str(trial)).config for trial in adaptive.trial_dirs(run)]
    for change, trial_config in zip(changes, trial_configs, strict=True):
        assert change["optimizer.lr"] == trial_config.optimizer.lr
        assert change["batch_size"] == trial_config.batch_size
    assert cvlab("show", run)[0] == cvlab("report", run)[0] == 0
    # an interrupted sweep runs no trial again that has ended
    status = json.loads((run / "status.json").read_text()) | {"status": "interrupted"}
    (run / "status.json").write_text(json.dumps(status))
    (run / "trials" / ".partial").mkdir()
    code, _, err = cvlab("sweep", "s.yaml")
    assert code == 0, err
    assert "4 trials, 4 already done" in err, err
    pruned = adaptive.trial_dirs(run)[1]
    (pruned / PRUNE_FILE).write_text("too bad")
    (pruned / "status.json").write_text('{"status": "interrupted"}')
    out, config = run_dir.RunDir(run), loading.load(str(run)).config
    assert [row["status"] for row in experiment.trial_rows(config, out)] == ["done", "pruned", "done", "done"]
    assert len(experiment.SweepExperiment().grouped_results(config, out)) == 3, (
        "expectations are evaluated on the trials that have ended"
    )
    pruned.rename(tmp_path / "away")
    with pytest.raises(RunDirError, match="the trial 001 is missing"):
        adaptive.trial_dirs(run)


def test_an_invalid_combination_gives_a_one_line_error(tmp_path):
    tied = "conditions: [{when: {batch_size: 40, model.batchnorm: false}, set: {reg: -1.0}}]\n"
    (tmp_path / "s.yaml").write_text(BASE + SEARCH + tied)
    config = loading.load("s.yaml").config  # every end of a range and every choice is valid by itself
    out = create_run(tmp_path / "runs", "s")
    out.folder("trials")
    changes = {"optimizer.lr": 0.1, "batch_size": 30, "model.batchnorm": False}
    assert trials.add_trial(config, out, 0, changes) == out.path / "trials" / "000-lr-0.1-batch_size-30-batchnorm-false"
    with pytest.raises(ConfigError, match=r"proposed 001-.*, which is not valid: reg: expected .* conditions"):
        trials.add_trial(config, out, 1, changes | {"batch_size": 40})
    assert len(adaptive.trial_dirs(out.path)) == 1


def test_a_pruned_trial_ends_at_an_evaluation_and_can_be_resumed(cvlab, tmp_path):
    text = BASE.partition("base:\n")[2].replace("\n  ", "\n").strip().replace("eval_every: 1000", "eval_every: 1")
    (tmp_path / "s.yaml").write_text(text)
    assert cvlab("run", "s.yaml", "-q")[0] == 0
    expected = read_summary((tmp_path / "runs" / "latest").resolve())["weights_sha256"]
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "config.yaml").write_text(loading.load("s.yaml").config.to_yaml())
    (trial / PRUNE_FILE).write_text("too bad\n")
    code, _, err = cvlab("resume", trial)
    status = read_status(trial)
    assert code == 143
    assert "pruned after step 10: too bad; remove " in err
    assert (status["status"], status["step"]) == ("interrupted", 10)
    assert scheduler.has_ended(trial)
    assert results.read_trial(trial)["status"] == "pruned"
    assert results.outcome_text(trial) == "pruned: too bad"
    (trial / PRUNE_FILE).unlink()
    assert not scheduler.has_ended(trial)
    assert cvlab("resume", trial)[0] == 0
    assert read_summary(trial)["weights_sha256"] == expected


def test_the_scheduler_prunes_trials_worse_than_the_median(tmp_path):
    out = create_run(tmp_path / "runs", "s")
    for number, (state, accuracies) in enumerate([("done", (0.4, 0.6)), ("done", (0.5, 0.7)), ("running", (0.3,))]):
        trial = out.path / "trials" / f"{number:03d}-x"
        trial.mkdir(parents=True)
        adaptive.write_changes(trial, {"x": 0.5, "n": 3, "lr": 1e-3, "part": None})
        (trial / "config.yaml").write_text("experiment: classify\n")
        (trial / "status.json").write_text(json.dumps({"status": state}))
        rows = [{"step": 10 * (k + 1), "val_accuracy": value} for k, value in enumerate(accuracies)]
        (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 5, "lr": 1}, *rows]))
        if state == "done":
            (trial / "summary.json").write_text(json.dumps({"metrics": {"val_accuracy": accuracies[-1]}}))
    for config, expected in ((search_config(startup=2), None), (search_config(startup=2, prune="median"), True)):
        adaptive.AdaptiveSearch(out, config, {}, lambda number, changes: None).prune([trial])
        assert bool(pruning_reason(trial)) == bool(expected)
    assert adaptive.read_trial(trial, config, {}).state == "pruned"
    assert adaptive.read_trial(trial, config, {}).curve == {10: 0.3}
    best = adaptive.AdaptiveSearch(out, config, {}, lambda number, changes: None).best()
    assert (best["trial"], best["val_accuracy"]) == ("001-x", 0.7)
    (trial / "status.json").write_text(json.dumps({"status": "failed", "code": 6}))
    assert adaptive.read_trial(trial, config, {}) == TrialRecord(adaptive.read_changes(trial), "pruned")
    assert adaptive.read_trial(trial, config, {"val_accuracy": 0.1}).value == 0.1
    (trial / "status.json").write_text(json.dumps({"status": "failed", "code": 1}))
    assert adaptive.read_trial(trial, config, {}).state == "failed"
    (trial / "status.json").write_text(json.dumps({"status": "done"}))
    (trial / "summary.json").write_text(json.dumps({"metrics": {"val_accuracy": math.nan}}))
    assert adaptive.read_trial(trial, config, {}).state == "failed"


@pytest.mark.slow
@all_algorithms
def test_a_killed_search_continues_as_if_undisturbed(started_sweep, tmp_path, algorithm):
    text = SEARCH.replace("trials: 4", "trials: 6").replace("optuna", algorithm)
    (tmp_path / "s.yaml").write_text(BASE.replace("steps: 30", "steps: 1000") + text)
    assert started_sweep().wait() == 0
    undisturbed = (tmp_path / "runs" / "latest").resolve()
    changes = [adaptive.read_changes(trial) for trial in adaptive.trial_dirs(undisturbed)]
    weights = weights_of_trials(tmp_path)
    for count in (3, 5):
        process = started_sweep(*(["--fresh"] if count == 3 else []))
        until(lambda number=count - 1: len(list(tmp_path.glob(f"runs/2*/trials/{number:03d}-*/metrics.jsonl"))) == 2)
        process.kill()
        process.wait()
    assert started_sweep().wait() == 0, (tmp_path / "stderr.txt").read_text()
    restarted = (tmp_path / "runs" / "latest").resolve()
    assert restarted != undisturbed
    assert [adaptive.read_changes(trial) for trial in adaptive.trial_dirs(restarted)] == changes
    assert weights_of_trials(tmp_path) == weights
    assert "already running" not in (tmp_path / "stderr.txt").read_text()
