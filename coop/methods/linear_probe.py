"""Linear probe: logistic regression on image features alone (Radford et al. 2021; CoOp's lpclip)."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.io import progress_display
from coop.methods.base import Classes, Method, load_parameters
from coop.options import LinearProbeOptions

GRID = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)  # powers of ten
BISECTIONS = 8
NEVER = -1e4  # the logit of a class without training images


class LinearProbe(Method):
    """logits = f A + b with the A, b that minimise sum_i CE(f_i A + b, y_i) + |A|^2 / (2 C): scikit-learn's L-BFGS.

    f is the test view, not normalised, as released. C maximises the accuracy on validation: the best of a grid from
    1e6 to 1e-6, then 8 bisections between C/10 and 10 C; each C is fitted once. Departure: the few-shot sample is the
    one that every method gets.
    """

    name = "linear_probe"
    Options = LinearProbeOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: LinearProbeOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        c, e = len(classes.names), backbone.joint_width
        self.weight, self.bias = torch.zeros(c, e), torch.zeros(c)
        self.chosen: list[list[int]] | None = None  # rows for each class, where these are some of those learned

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fit the regression, choosing C on `val`."""
        x, y = train.test_view.cpu().numpy(), train.labels.cpu().numpy()
        if len(np.unique(y)) < 2:
            raise CoopError("method=linear_probe needs training images of at least 2 classes")
        probes = _Probes(x, y, self.options)
        if self.options.C is not None:
            power, notes = math.log10(self.options.C), {}
        elif not len(val):
            raise CoopError("method=linear_probe searches C on validation images, and there are none: give C")
        else:
            power, accuracy = self._search(probes, val)
            notes = {"val_accuracy": accuracy}
        self.weight, self.bias = _rows(probes(power), len(self.classes.names))
        return {"C": 10.0**power, **notes}

    def _search(self, probes: "_Probes", val: Samples) -> tuple[float, float]:
        x, y = val.test_view.cpu().numpy(), val.labels.cpu().numpy()
        with progress_display() as display:
            task = display.add_task("searching C", total=len(GRID) + BISECTIONS + 1)

            def fitted(power: float) -> LogisticRegression:
                probe = probes(power)
                display.update(task, completed=len(probes.known))
                return probe

            for power in sorted(GRID):  # the strongest penalty is the easiest, and with warm starts begins the path
                fitted(power)
            found = search_c(lambda power: float(fitted(power).score(x, y)))
            display.remove_task(task)
        return found

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return the regression's scores."""
        scores = features.to(self.weight.device).float() @ self.weight.T + self.bias
        return scores if self.chosen is None else torch.stack([scores[:, rows].amax(1) for rows in self.chosen], 1)

    def for_classes(self, classes: Classes) -> "LinearProbe":
        """Return the scores of some of the classes (ImageNet-A has 200 of ImageNet's).

        Where several classes share the name, the best score among them is taken. Raises CoopError for a class that
        was not learned.
        """
        rows = {name: [i for i, own in enumerate(self.classes.names) if own == name] for name in classes.names}
        strange = [name for name, found in rows.items() if not found]
        if strange:
            raise CoopError(
                "method=linear_probe learns something for each class: it cannot be moved to other classes "
                f"than its own, and '{strange[0]}' is none of them"
            )
        probe = LinearProbe(self.backbone, classes, self.options, self.seed)
        probe.weight, probe.bias = self.weight, self.bias
        probe.chosen = [rows[name] for name in classes.names]
        return probe

    def state(self) -> dict[str, Tensor]:
        """Return `weight` (c, e) and `bias` (c,)."""
        return {"weight": self.weight, "bias": self.bias}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the regression back. Raises CoopError where it is not for these classes and this width."""
        load_parameters(self.name, self.state(), state)


def search_c(accuracy: Callable[[float], float]) -> tuple[float, float]:
    """Return the power of ten of the C that the protocol's search finds, and its accuracy.

    The first best of `GRID` gives the bracket C/10 .. 10 C. Each of 8 times the better end is kept, the lower one if
    both are equal, and the other moves to the middle (in powers of ten).
    """
    at = cache(accuracy)
    peak = max(GRID, key=at)
    left, right = peak - 1, peak + 1
    for _ in range(BISECTIONS):
        middle = (left + right) / 2
        if at(left) < at(right):
            kept, left = right, middle
        else:
            kept, right = left, middle
    return kept, at(kept)


class _Probes:
    """The regression for C = 10^power, fitted once; with warm starts, from the nearest solution with a smaller C."""

    def __init__(self, x: np.ndarray, y: np.ndarray, options: LinearProbeOptions) -> None:
        self.x, self.y, self.options = x, y, options
        self.known: dict[float, LogisticRegression] = {}

    def __call__(self, power: float) -> LogisticRegression:
        if power not in self.known:
            warm = self.options.warm_start
            probe = LogisticRegression(C=10.0**power, max_iter=self.options.max_iter, warm_start=warm)
            below = [p for p in self.known if warm and p < power]
            if below:
                start = self.known[max(below)]
                probe.classes_, probe.coef_, probe.intercept_ = start.classes_, start.coef_, start.intercept_
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # `max_iter` ends it, as in the protocol
                self.known[power] = probe.fit(self.x, self.y)
        return self.known[power]


def _rows(probe: LogisticRegression, n_classes: int) -> tuple[Float[Tensor, "c e"], Float[Tensor, " c"]]:
    """Return a row for every class, also of two classes and of those that the shots do not show."""
    coef, intercept = torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float()
    if len(coef) == 1:  # scikit-learn keeps one row for two classes: that of the second against the first
        coef, intercept = torch.cat([torch.zeros_like(coef), coef]), torch.cat([torch.zeros_like(intercept), intercept])
    shown = torch.from_numpy(probe.classes_).long()
    weight, bias = torch.zeros(n_classes, coef.shape[1]), torch.full((n_classes,), NEVER)
    weight[shown], bias[shown] = coef, intercept
    return weight, bias
