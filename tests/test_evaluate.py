"""Metrics against scikit-learn."""

import math
import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from coop.errors import CoopError
from coop.evaluate import evaluate

NAMES = ("forest", "river", "abbey", "sea", "pond")


@pytest.mark.parametrize("present", [5, 3])
def test_metrics_are_scikit_learns(present: int) -> None:
    """Also where some classes have no test images, and others very many."""
    random = torch.Generator().manual_seed(present)
    labels = torch.randint(present, (200,), generator=random) * torch.randint(2, (200,), generator=random)
    logits = torch.randn(200, 5, generator=random) + 2 * torch.nn.functional.one_hot(labels, 5)
    logits[:, 0] += 1
    metrics, predicted = evaluate(logits, labels, NAMES), logits.argmax(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that are not there
        balanced = balanced_accuracy_score(labels, predicted)
    assert metrics.mean_per_class_accuracy == pytest.approx(balanced, abs=1e-6)
    assert metrics.accuracy == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    assert abs(metrics.accuracy - metrics.mean_per_class_accuracy) > 1e-2  # so that one cannot pass for the other
    f1 = f1_score(labels, predicted, average="macro", labels=range(5), zero_division=0)
    assert metrics.macro_f1 == pytest.approx(f1, abs=1e-6)
    there = [metrics.per_class_accuracy[name] is not None for name in NAMES]
    assert there == [c < present for c in range(5)]


def test_one_class_is_always_right() -> None:
    metrics = evaluate(torch.randn(3, 1), torch.zeros(3, dtype=torch.long), ("forest",))
    assert (metrics.accuracy, metrics.mean_per_class_accuracy, metrics.n) == (1.0, 1.0, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [1, 5])
def test_logits_that_are_not_finite_are_an_error(value: float, classes: int) -> None:
    logits = torch.zeros(4, classes)
    logits[2, 0] = value
    with pytest.raises(CoopError, match="1 of 4 test images"):
        evaluate(logits, torch.zeros(4, dtype=torch.long), NAMES[:classes])
