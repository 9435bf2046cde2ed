"""Two processes take the same steps as one, with every optimizer."""

import pytest

from tests.distributed import ranks
from tests.distributed.test_processes import connected


def test_every_optimizer_takes_the_steps_of_one_process(tmp_path):
    alone = ranks.steps_of_optimizers()
    assert {"muon, sam None", "schedule_free_adamw, sam None", "sgd, sam 0.05"} < alone.keys()
    assert alone["sgd, sam 0.05"] != alone["sgd, sam None"]
    for weights in connected("steps_of_optimizers", tmp_path, 2):
        for name, expected in alone.items():
            tolerance = 2e-2 if name.startswith("muon") else 1e-9  # Muon may orthogonalize in bfloat16
            assert weights[name] == pytest.approx(expected, rel=tolerance, abs=tolerance), name
