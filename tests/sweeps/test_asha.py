"""Successive halving: the rule against algorithm 2 of the paper, and searches in which trials pause and continue."""

import json
import random
from pathlib import Path

import pytest

from cvlab.config import loading
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import rung as runs_rung
from cvlab.runs.records import read_metrics, read_status, read_summary
from cvlab.runs.rung import Rung
from cvlab.sweeps import adaptive, asha, rungs, scheduler
from cvlab.sweeps.asha import AshaConfig, TrialRungs
from tests.conftest import until

SEARCH = """experiment: sweep
base:
  experiment: classify
  data: {name: scenes10, num_train: 100, val_fraction: 0.5}
  model: {name: deep_convnet, filters: [4], pools: [0]}
  optimizer: {name: sgd, lr: 1e-2, momentum: 0.9}
  batch_size: 10
  duration: {epochs: 3}
  precision: float32
  threads: 1
search:
  trials: 4
  asha: {min_epochs: 1, factor: 2}
  space:
    optimizer.lr: {low: 1e-3, high: 1, log: true}
"""


class PaperRungs:
    """Algorithm 2 of the paper: `get_job` promotes a trial, from the top rung down, or else draws a configuration."""

    def __init__(self, num_limits, factor):
        self.losses = [{} for _ in range(num_limits + 1)]
        self.promoted = [set() for _ in range(num_limits + 1)]
        self.factor, self.num_drawn = factor, 0

    def get_job(self, can_continue):
        for k in range(len(self.losses) - 2, -1, -1):
            by_loss = sorted(self.losses[k], key=lambda trial: (self.losses[k][trial], trial))
            candidates = by_loss[: int(len(self.losses[k]) / self.factor)]
            promotable = [t for t in candidates if t not in self.promoted[k] and can_continue(t)]
            if promotable:
                self.promoted[k].add(promotable[0])
                return promotable[0], k + 1
        self.num_drawn += 1
        return self.num_drawn - 1, 0


@pytest.mark.parametrize(("factor", "maximize"), [(2, True), (3, False), (4, True)])
def test_promotions_match_the_paper(factor, maximize):
    generator = random.Random(factor)
    num_limits, workers, sign = 3, 5, -1 if maximize else 1
    for _ in range(20):
        reference, trials, running = PaperRungs(num_limits, factor), [], []
        diverged = set()
        for _ in range(300):
            if len(running) == workers or (running and generator.random() < 0.5):
                number, k = running.pop(generator.randrange(len(running)))
                has_diverged = generator.random() < 0.1
                value = -sign * float("inf") if has_diverged else float(generator.randrange(8))  # with ties
                value = -value if has_diverged else value
                diverged |= {number} if has_diverged else set()
                reference.losses[k][number] = sign * value
                trials[number] = TrialRungs(k, {**trials[number].values, k: value}, not has_diverged)
                continue
            expected = reference.get_job(lambda trial: trial not in diverged)  # noqa: B023
            number = asha.promotion(trials, num_limits, factor, maximize)
            job = (len(trials), 0) if number is None else (number, trials[number].rung + 1)
            assert job == expected
            if number is None:
                trials.append(TrialRungs(0, {}, can_continue=False))
            else:
                trials[number] = TrialRungs(job[1], trials[number].values, can_continue=False)
            running.append(job)
        assert max(trial.rung for trial in trials) == num_limits


def test_limits():
    assert AshaConfig(min_epochs=1, factor=3).limits(9) == [1, 3]
    assert AshaConfig(min_epochs=1, factor=3).limits(10) == [1, 3, 9]
    assert AshaConfig(min_steps=100, factor=4).limits(100) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("min_epochs: 1, factor: 2", "factor: 2"), "s.yaml:13:3: search.asha: give exactly one of min_epochs and"),
        (("min_epochs: 1", "min_epochs: 1, min_steps: 5"), "give exactly one of min_epochs and min_steps"),
        (("min_epochs: 1", "min_steps: 9"), "search.asha: min_steps: base.duration is in epochs; give min_epochs"),
        (("{epochs: 3}", "{seconds: 3}"), "search.asha: min_epochs: base.duration is in seconds"),
        (("min_epochs: 1", "min_epochs: 3"), "min_epochs: expected less than the 3 epochs of base.duration"),
        (("trials: 4", "trials: 3"), "search.asha: 3 trials are too few: 1 in 2^2 reaches the end, so at least 4"),
        (("trials: 4", "prune: median\n  trials: 4"), "prune and asha: successive halving stops trials by itself"),
        (("  space:", "  space:\n    duration.epochs: [3, 4]"), "`duration` cannot vary"),
        (("factor: 2", "factor: 1"), "search.asha.factor: expected a whole number >= 2 and <= 100, got 1"),
        (("min_epochs: 1", "min_epoch: 1"), "unknown key 'search.asha.min_epoch'; did you mean 'min_epochs'"),
    ],
)
def test_errors_have_their_position(tmp_path, change, message):
    (tmp_path / "s.yaml").write_text(SEARCH.replace(*change))
    with pytest.raises(ConfigError) as error:
        loading.load("s.yaml")
    texts = [str(problem) for problem in (error.value, *error.value.further_errors)]
    assert any(message in text for text in texts), texts


def outcomes(run):
    """Return the changes, the rung, the number of steps and the hash of the weights of each trial."""
    rows = []
    for trial in adaptive.trial_dirs(run):
        steps = [row["step"] for row in read_metrics(trial) if "val_accuracy" in row]
        assert steps == sorted(set(steps)), "a trial continues from its checkpoint, so that no step is evaluated twice"
        weights = read_summary(trial).get("weights_sha256")
        rows.append((adaptive.read_changes(trial), runs_rung.read(trial), steps[-1], weights))
    return rows


def run_interrupted(cvlab, tmp_path, monkeypatch):
    """Return the run directory of a search that is interrupted before its third and its seventh decision."""
    next_trial = adaptive.AdaptiveSearch.next_trial
    calls = []

    def interrupted(search, running):
        calls.append(1)
        if len(calls) in (3, 7):
            raise KeyboardInterrupt
        return next_trial(search, running)

    with monkeypatch.context() as patch:
        patch.setattr(adaptive.AdaptiveSearch, "next_trial", interrupted)
        codes = [cvlab("sweep", "s.yaml", "-q", "--fresh")[0]]
        run = (tmp_path / "runs" / "latest").resolve()
        while codes[-1] == 130:
            codes.append(cvlab("resume", run, "-q")[0])
    assert codes == [130, 130, 0]
    return run


def test_trials_are_paused_and_continued_also_after_an_interruption(cvlab, tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text(SEARCH + "expect: [steps_saved > 0.2, best > 0]\n")
    code, out, err = cvlab("sweep", "s.yaml", "--json")
    assert code == 0, err
    metrics, importance = json.loads(out)["metrics"], json.loads(out)["importance"]
    assert importance["after"] == "epoch 1"
    assert importance["reason"] == "4 trials have the metric; 10 are needed for 1 key(s)"
    assert 'class="wide parallel"' in (tmp_path / "runs" / "latest" / "report.html").read_text()
    run = (tmp_path / "runs" / "latest").resolve()
    undisturbed = outcomes(run)
    assert {steps for _, _, steps, _ in undisturbed} >= {10, 30}
    assert metrics["trials"] == 4
    assert metrics["full_steps"] == 120
    assert metrics["steps"] == sum(steps for _, _, steps, _ in undisturbed)
    assert metrics["steps_saved"] == pytest.approx(1 - metrics["steps"] / 120)
    assert f"{metrics['steps']} steps in place of 120" in err
    done = [trial for trial in adaptive.trial_dirs(run) if read_status(trial)["status"] == "done"]
    assert metrics["pruned"] == 4 - len(done)
    standalone = Path(json.loads(cvlab("run", done[0], "--json", "-q")[1])["run"])
    expected = read_summary(standalone)["weights_sha256"]
    assert read_summary(done[0])["weights_sha256"] == expected, "identical to a run that was never paused"
    # a paused trial that is resumed stops at once and reports what it waits for
    paused = next(trial for trial in adaptive.trial_dirs(run) if trial not in done)
    assert scheduler.has_ended(paused)
    code, _, err = cvlab("resume", paused)
    assert code == 143
    rung = runs_rung.read(paused).number + 1
    assert f"paused after step {10 * rung}, at rung {rung} of the search; remove" in err
    assert cvlab("show", run)[0] == 0
    assert f"paused at rung {rung}, val_accuracy" in (paused / "report.html").read_text()
    assert outcomes(run_interrupted(cvlab, tmp_path, monkeypatch)) == undisturbed


@pytest.mark.parametrize(
    ("metric", "key", "message"),
    [
        (
            "val_ece",
            "eval_every: 1",
            "val_ece is not measured during the training; search.metric: one of",
        ),
        ("val_accuracy", "eval_every: 3", "the first evaluation, after 30 steps, is not before the end at 30; lower"),
    ],
)
def test_runs_that_cannot_be_compared_at_a_rung_give_a_one_line_error(cvlab, tmp_path, metric, key, message):
    text = SEARCH.partition("base:\n")[2].partition("search:")[0].replace("\n  ", "\n").strip()
    (tmp_path / "s.yaml").write_text(f"{text}\n{key}\n")
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "config.yaml").write_text(loading.load("s.yaml").config.to_yaml())
    runs_rung.write(trial, Rung(0, metric, "epoch", 1))
    code, _, err = cvlab("resume", trial, "-q")
    assert code == 2
    assert message in err


def paused_trial(folder, number, value, status="interrupted"):
    trial = folder / f"{number:03d}-x"
    trial.mkdir()
    (trial / "config.yaml").write_text("experiment: classify\n")
    (trial / "status.json").write_text(json.dumps({"status": status, "step": 5, "total_steps": 15}))
    rows = [{"step": 5, "epoch": 1.0, "val_accuracy": value}]
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs_rung.write(trial, Rung(0, "val_accuracy", "epoch", 1))
    return trial


def test_rungs_are_read_from_the_run_directories(tmp_path):
    trials = [paused_trial(tmp_path, number, value) for number, value in enumerate((0.2, 0.5, 0.3, 0.1))]
    (trials[3] / "status.json").write_text(json.dumps({"status": "failed", "code": 6}))
    search = rungs.Rungs(AshaConfig(min_epochs=1, factor=2), 3, "val_accuracy", True, {})
    assert search.promote(trials[:1]) is None
    assert search.promote(trials, {trials[1].name}) == (trials[2], Rung(1, "val_accuracy", "epoch", 2, (0.3,)))
    runs_rung.write(trials[2], Rung(0, "val_accuracy", "epoch", 1))
    assert search.promote(trials) == (trials[1], Rung(1, "val_accuracy", "epoch", 2, (0.5,)))
    assert not scheduler.has_ended(trials[1])
    assert [scheduler.has_ended(trial) for trial in (trials[0], trials[2], trials[3])] == [True] * 3
    restarted = rungs.Rungs(AshaConfig(min_epochs=1, factor=2), 3, "val_accuracy", True, {})
    assert restarted.promote(trials) == (trials[2], Rung(1, "val_accuracy", "epoch", 2, (0.3,)))
    (trials[1] / "metrics.jsonl").unlink()  # truncated while it is resumed; its value at the first rung is recorded
    assert restarted.promote(trials) is None
    # a trial that ended by early stopping is at all rungs
    (trials[1] / "status.json").write_text(json.dumps({"status": "done"}))
    (trials[1] / "summary.json").write_text(json.dumps({"metrics": {"val_accuracy": 0.6}}))
    assert restarted._read(trials[1], False) == TrialRungs(1, {0: 0.5, 1: 0.6}, False)
    for text in ('{"number": 0}', '{"number": 0, "metric": "a", "unit": "day", "limit": 1}', "[]", "{"):
        (trials[0] / "rung.json").write_text(text)
        with pytest.raises(RunDirError, match=r"rung\.json: "):
            runs_rung.read(trials[0])
        assert not scheduler.has_ended(trials[0])


@pytest.mark.faults
def test_a_killed_parallel_search_continues(started_sweep, tmp_path):
    text = SEARCH.replace("{epochs: 3}", "{epochs: 8}").replace("trials: 4", "trials: 8")
    model = "{name: deep_convnet, filters: [4], pools: [0]}"
    (tmp_path / "s.yaml").write_text(text.replace(model, "{name: './net.py:net'}"))
    (tmp_path / "slow").touch()
    for count in (3, 6):
        process = started_sweep("--workers", "2")
        until(lambda minimum=count: len(list(tmp_path.glob("runs/2*/trials/*/metrics.jsonl"))) >= minimum)
        process.kill()
        process.wait()
    (tmp_path / "slow").unlink()
    assert started_sweep("--workers", "2").wait() == 0, (tmp_path / "stderr.txt").read_text()
    run = (tmp_path / "runs" / "latest").resolve()
    assert len(outcomes(run)) == 8
    done = [trial for trial in adaptive.trial_dirs(run) if read_status(trial)["status"] == "done"]
    assert done
    assert len(done) < 8
