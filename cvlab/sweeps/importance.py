"""Which keys of a sweep matter for its metric: permutation importance of a model with few parameters.

References: Breiman, 2001, "Random Forests", section 10 (permutation importance); Ojala and Garriga, 2010, "Permutation
Tests for Studying Classifier Performance". An alternative is fANOVA (Hutter et al., 2014, "An Efficient Approach for
Assessing Hyperparameter Importance"), whose forests need hundreds of trials, and in Optuna another package.
Differs: sweeps have tens of trials. The metric is modeled by a ridge regression, additive in the keys: quadratic in a
number, one constant for each choice. Errors are those of trials that the model was not fitted to (leave one out), over
all pairs of trials rather than random permutations. Importances are returned only if the model predicts left-out trials
better than after the metric was shuffled among the trials; otherwise the reason.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvlab.runs.records import is_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_TRIALS, MIN_TRIALS_PER_KEY = 10, 3
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the ridge regression, chosen by its left-out errors
NUM_SHUFFLES, MAX_P = 199, 0.05
METHOD = "permutation importance of an additive quadratic ridge regression, leave-one-out"


def importance(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], log_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the importance of each key for a metric.

    Args:
        settings: For each trial the values of the keys that vary.
        values: For each trial its metric, finite.
        log_keys: Keys whose numbers are compared by their logarithms.

    Returns:
        `trials`, and either `reason`, why nothing can be said, or `method`; `explained`, the share of the variance of
        left-out trials that the model predicts; `p`, the share of shufflings that are predicted as well; and `keys`,
        the share of each key in [0, 1], with sum 1, the largest first.
    """
    import numpy as np

    count = {"trials": len(values)}
    keys = [key for key in (settings[0] if settings else ()) if len({repr(row[key]) for row in settings}) > 1]
    needed = max(MIN_TRIALS, MIN_TRIALS_PER_KEY * len(keys))
    if len(values) < needed:
        return {**count, "reason": f"{len(values)} trials have the metric; {needed} are needed for {len(keys)} key(s)"}
    if not keys or max(values) == min(values):
        return {**count, "reason": "the metric is the same in all trials" if keys else "no key varies"}
    blocks = [_features([row[key] for row in settings], key in log_keys) for key in keys]
    target = np.asarray(values, dtype=np.float64)
    target = (target - target.mean()) / target.std()
    models = [_Ridge(np.hstack(blocks), penalty) for penalty in PENALTIES]
    errors = np.array([model.left_out_errors(target[:, None])[0] for model in models])
    p = _p_value(models, target, float(errors.min()))
    explained = 1 - float(errors.min()) / _error_of_mean(len(values))
    if p > MAX_P or explained <= 0:
        reason = "the keys do not predict the metric of left-out trials better than chance"
        return {**count, "reason": f"{reason} (p = {p:.2g}); more trials may show more"}
    increases = models[int(errors.argmin())].increases(blocks, target)
    shares = np.maximum(increases, 0)
    shares = shares / shares.sum()
    ranked = sorted(zip(keys, map(float, shares), strict=True), key=lambda pair: -pair[1])
    return {**count, "method": METHOD, "explained": explained, "p": p, "keys": dict(ranked)}


def _features(values: Sequence[Any], is_log: bool) -> "Array":
    """Return the features of a key, float64 (trials, features): a number and its square, or one for each choice."""
    import numpy as np

    if all(is_number(value) for value in values):
        numbers = np.array([math.log(value) if is_log and min(values) > 0 else value for value in values], np.float64)
        scaled = 2 * (numbers - numbers.min()) / (numbers.max() - numbers.min()) - 1
        columns = np.stack([scaled, scaled**2] if len(set(values)) > 2 else [scaled], axis=1)
    else:
        choices = list(dict.fromkeys(map(repr, values)))
        columns = np.array([[float(repr(value) == choice) for choice in choices] for value in values])
    features: Array = columns - columns.mean(axis=0)
    features /= np.sqrt((features**2).mean() * features.shape[1])  # keys are penalized alike
    return features


class _Ridge:
    """A ridge regression with a constant that is not penalized.

    Args:
        features: float64 (trials, features), each with mean 0.
        penalty: Penalty of the squared coefficients, per trial.
    """

    def __init__(self, features: "Array", penalty: float) -> None:
        import numpy as np

        self.design = np.hstack([np.ones((len(features), 1)), features])
        weight = np.full(self.design.shape[1], penalty * len(features) / 10)
        weight[0] = 0.0
        self.inverse = np.linalg.pinv(self.design.T @ self.design + np.diag(weight))
        self.hat = self.design @ self.inverse @ self.design.T  # (trials, trials)

    def left_out_residuals(self, targets: "Array") -> "Array":
        """Return the errors of each trial in a fit to the others, for targets (trials, n): float64 (trials, n)."""
        import numpy as np

        residuals: Array = (targets - self.hat @ targets) / np.maximum(1 - np.diag(self.hat), 1e-9)[:, None]
        return residuals

    def left_out_errors(self, targets: "Array") -> "Array":
        """Return the mean squared errors of left-out trials, for targets (trials, n): float64 (n,)."""
        errors: Array = (self.left_out_residuals(targets) ** 2).mean(axis=0)
        return errors

    def increases(self, blocks: "Sequence[Array]", target: "Array") -> "Array":
        """Return for each key by how much the mean squared error of left-out trials rises without its value.

        The value of a trial is replaced by that of each other trial in turn.
        """
        import numpy as np

        residuals = self.left_out_residuals(target[:, None])[:, 0]
        coefficients = self.inverse @ self.design.T @ target
        left_out = coefficients - (self.inverse @ self.design.T).T * residuals[:, None]  # (trials, features): of fits
        increases, first, n = [], 1, len(target)
        for block in blocks:
            of_key = left_out[:, first : first + block.shape[1]]
            first += block.shape[1]
            replaced = of_key @ block.T  # (trials, trials): the part of a key in trial i, with the value of trial j
            changed = residuals[:, None] + np.diag(replaced)[:, None] - replaced
            increases.append((changed**2).sum() / (n * (n - 1)) - (residuals**2).sum() / (n * (n - 1)))
        increase: Array = np.array(increases) - (residuals**2).mean()
        return increase


def _error_of_mean(count: int) -> float:
    """Return the mean squared error of left-out values, with variance 1, that the mean of the others predicts."""
    return (count / (count - 1)) ** 2


def _p_value(models: Sequence[_Ridge], target: "Array", error: float) -> float:
    """Return the share of shufflings of the metric that are predicted as well; the penalty is chosen for each."""
    import numpy as np

    generator = random.Random(0)
    orders = [generator.sample(range(len(target)), len(target)) for _ in range(NUM_SHUFFLES)]
    shuffled = np.stack([target[order] for order in orders], axis=1)
    errors = np.min([model.left_out_errors(shuffled) for model in models], axis=0)
    return float((1 + (errors <= error).sum()) / (1 + NUM_SHUFFLES))
