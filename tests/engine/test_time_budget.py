"""Plans of a time budget: continuous progress, replanning to end in time, invalid budgets."""

import itertools
import math

import pytest
from pydantic import ValidationError

from cvlab.config.schema import Duration
from cvlab.engine import time_budget
from cvlab.engine.time_budget import Plan
from cvlab.errors import ConfigError


def test_progress_without_replanning_is_the_fraction_of_steps():
    assert [Plan(4).progress(step + 0.5) for step in range(4)] == [0.125, 0.375, 0.625, 0.875]
    assert Plan(4).progress(0) == 0
    assert Plan(4).progress(4) == 1


def test_progress_is_continuous_when_the_plan_changes():
    plan = Plan(100).changed(50, 80).changed(60, 70)
    assert plan.total_steps == 70
    assert plan.progress(50) == 0.5
    assert plan.progress(60) == pytest.approx(0.5 + 0.5 / 3)
    assert plan.progress(70) == 1
    assert plan.progress(65) == pytest.approx((plan.progress(60) + 1) / 2)
    values = [plan.progress(step) for step in range(71)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert max(b - a for a, b in itertools.pairwise(values)) < 0.05
    assert Plan(100).changed(50, 20).total_steps == 51, "no fewer steps than have been taken"
    for step in range(50):
        assert plan.progress(step + 0.5) == Plan(100).progress(step + 0.5), "the progress of earlier steps is unchanged"


def test_a_replanned_run_ends_with_the_budget():
    plan = Plan(1000)
    assert plan.replan(500, seconds_left=30.0, seconds_per_step=0.0598) is plan, "the plan fits the budget"
    slower = plan.replan(500, seconds_left=30.0, seconds_per_step=0.1)
    assert slower.total_steps == 500 + 300
    assert slower.history == ((500, 1000),)
    assert plan.replan(500, 30.0, 0.03).total_steps == 500 + 1000, "faster: more steps"
    assert plan.replan(500, -1.0, 0.03).total_steps == 501
    replanned_after = [step for step in range(1, 1001) if plan.is_replanned_after(step)]
    assert replanned_after == [math.ceil(1000 * share - 1e-9) for share in time_budget.REPLAN_AT]


STEP_SECONDS = {
    "even": [0.01] * 5000,
    "slower": [0.01] * 300 + [0.02] * 5000,
    "faster": [0.02] * 200 + [0.008] * 8000,
    "slower near the end": [0.01] * 951 + [0.02] * 5000,
    "slower at the end": [0.01] * 991 + [0.02] * 5000,
}


@pytest.mark.parametrize("step_seconds", STEP_SECONDS.values(), ids=STEP_SECONDS)
def test_the_budget_is_almost_used_up_whatever_the_step_time(step_seconds):
    plan, used, step, previous = time_budget.first_plan(10.0, step_seconds[0]), 0.0, 0, (0, 0.0)
    while step < plan.total_steps:
        used += step_seconds[step]
        step += 1
        if plan.is_replanned_after(step):
            recent = (used - previous[1]) / (step - previous[0])
            previous = (step, used)
            plan = plan.replan(step, time_budget.usable_seconds(10.0) - used, max(recent, used / step))
    assert 9.7 < used <= 10.0


def test_the_time_of_a_step_excludes_the_warm_up(monkeypatch):
    clock = iter(itertools.accumulate([0, 100, 1, 1, 1, 1, 3, 1, 1, 1, 1]))
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: next(clock))
    assert time_budget.seconds_per_step(iter(range(100)), 60.0, lambda: None) == 1


def test_a_budget_too_short_for_a_step():
    with pytest.raises(ConfigError, match=r"0\.5 s are too short for a step, which takes 2 s"):
        time_budget.first_plan(0.5, 2.0)


@pytest.mark.parametrize("plan_history", [((5, 12), (4, 11)), ((5, 5),), ((11, 20),), ((5, 9), (5, 8))])
def test_impossible_plan_histories_are_rejected(plan_history):
    with pytest.raises(ValidationError, match="plan_history requires steps"):
        Duration(steps=10, plan_history=plan_history)
    with pytest.raises(ValidationError, match="plan_history requires steps"):
        Duration(epochs=10, plan_history=((5, 9),))
