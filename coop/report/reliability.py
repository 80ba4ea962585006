"""How sure predictions are against how often they are right, and which classes are taken for which."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coop.evaluate import ECE_BINS
from coop.report.content import Bin, Confusion

Predictions = Mapping[str, Tensor]  # label, predicted, confidence: (n) each


def bins(confidence: Float[Tensor, " n"], right: Int[Tensor, " n"], count: int = ECE_BINS) -> tuple[Bin, ...]:
    """Return what lies between equally spaced confidences: the bins of torchmetrics' calibration error.

    It counts a confidence on a border to the upper bin, and gives a bin of its own to 1.0, which here is in the last.
    """
    borders = torch.linspace(0, 1, count + 1)
    place = (torch.bucketize(confidence, borders, right=True) - 1).clamp(max=count - 1)
    n = torch.bincount(place, minlength=count)
    sums = (torch.bincount(place, weights=values.double(), minlength=count) for values in (confidence, right))
    found = zip(borders.tolist(), borders.tolist()[1:], n.tolist(), *(some.tolist() for some in sums), strict=False)
    return tuple(
        Bin(100 * low, 100 * high, k, 100 * sure / k if k else None, 100 * hits / k if k else None)
        for low, high, k, sure, hits in found
    )


def pooled_bins(runs: Sequence[Predictions]) -> tuple[Bin, ...]:
    """Return the bins of all runs' predictions together."""
    confidence = torch.cat([run["confidence"] for run in runs])
    right = torch.cat([(run["predicted"] == run["label"]).int() for run in runs])
    return bins(confidence, right)


def confusion_counts(runs: Sequence[Predictions], classes: int) -> Float[Tensor, "c c"]:
    """Return how many images of each class (row) are called what (column): the mean over runs."""
    total = torch.zeros(classes * classes, dtype=torch.double)
    for run in runs:
        total += torch.bincount(run["label"].long() * classes + run["predicted"].long(), minlength=classes * classes)
    return (total / len(runs)).reshape(classes, classes).float()


def confusions(
    learned: Sequence[Predictions], baseline: Sequence[Predictions], names: Sequence[str], most: int = 12
) -> tuple[Confusion, ...]:
    """Return the pairs of classes that the learned method confuses most often, most frequent first."""
    size = len(names)
    ours, theirs = confusion_counts(learned, size), confusion_counts(baseline, size)
    n = ours.sum(1)
    wrong = ours.clone().fill_diagonal_(0).flatten()
    values, places = wrong.topk(min(most, size * size))
    found = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > 0:
            label, predicted = divmod(place, size)
            with_learned, with_baseline = (
                100 * float(counts[label, predicted] / n[label]) for counts in (ours, theirs)
            )
            found.append(Confusion(names[label], names[predicted], with_learned, with_baseline, round(float(n[label]))))
    return tuple(found)
