"""Metrics of one test set, and the prediction for each of its images."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from coop.errors import CoopError

ECE_BINS = 15


@dataclass(frozen=True)
class Metrics:
    """Fractions, not percent. `per_class_accuracy` is None for a class without test images.

    `mean_per_class_accuracy` is the mean over the classes with test images (CLIP's metric for Pets, Flowers, Aircraft
    and Caltech101); `macro_f1` the mean over classes; `ece` the expected calibration error (15 bins, L1);
    `mean_confidence` the mean probability of the predicted class.
    """

    accuracy: float
    mean_per_class_accuracy: float
    macro_f1: float
    ece: float
    mean_confidence: float
    n: int
    per_class_accuracy: dict[str, float | None]


def evaluate(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], class_names: tuple[str, ...]) -> Metrics:
    """Return the metrics of `logits` against `labels`, by torchmetrics.

    Raises CoopError for logits that are not finite: they predict nothing, and would count as the first class.
    """
    logits, labels = logits.float().cpu(), labels.cpu()
    classes = len(class_names)
    broken = int((~logits.isfinite()).any(dim=1).sum())
    if broken:
        raise CoopError(
            f"the logits of {broken} of {len(logits)} test images are not finite: lower lr, or use precision=fp32"
        )
    if classes == 1:  # torchmetrics wants two; one class is always right
        return Metrics(1.0, 1.0, 1.0, 0.0, 1.0, len(labels), {class_names[0]: 1.0})
    probabilities = logits.softmax(dim=-1)
    per_class = multiclass_accuracy(logits, labels, classes, average="none")
    present = torch.bincount(labels, minlength=classes) > 0
    return Metrics(
        accuracy=float(multiclass_accuracy(logits, labels, classes, average="micro")),
        mean_per_class_accuracy=float(per_class[present].mean()),
        macro_f1=float(multiclass_f1_score(logits, labels, classes, average="macro")),
        ece=float(multiclass_calibration_error(probabilities, labels, classes, n_bins=ECE_BINS)),
        mean_confidence=float(probabilities.amax(dim=-1).mean()),
        n=len(labels),
        per_class_accuracy={
            name: float(value) if there else None
            for name, value, there in zip(class_names, per_class, present, strict=True)
        },
    )


def predictions(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> dict[str, Tensor]:
    """Return each image's `label`, its `predicted` class (n, int32) and that class's probability, `confidence` (n)."""
    confidence, predicted = logits.float().cpu().softmax(dim=-1).max(dim=-1)
    return {"label": labels.cpu().int(), "predicted": predicted.int(), "confidence": confidence}
