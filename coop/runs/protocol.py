"""What is trained on and what is tested on: all classes, base to new, across datasets, under domain shift.

One training has one or more targets; the first is what the training itself was for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean

from coop.data import Dataset, Split
from coop.errors import CoopError
from coop.methods.base import Classes


@dataclass(frozen=True)
class Target:
    """A test set: some classes of a dataset, relabelled from 0."""

    name: str
    dataset: Dataset
    classes: Classes
    test: Split


def base_and_new(count: int) -> tuple[range, range]:
    """Return the labels of the first half of `count` classes, rounded up, and the rest (CoCoOp's rule)."""
    half = -(-count // 2)
    return range(half), range(half, count)


def training_labels(protocol: str, dataset: Dataset) -> range:
    """Return the labels that are trained on."""
    count = len(dataset.class_names)
    return base_and_new(count)[0] if protocol == "base_to_new" else range(count)


def targets_of(protocol: str, dataset: Dataset, others: Sequence[Dataset] = ()) -> list[Target]:
    """Return the test sets of a run. Raises CoopError if one has no test images."""
    if protocol == "base_to_new":
        if len(dataset.class_names) < 2:
            raise CoopError(f"dataset '{dataset.name}' has one class: protocol=base_to_new needs two or more")
        base, new = base_and_new(len(dataset.class_names))
        targets = [_target("base", dataset, base), _target("new", dataset, new)]
    else:
        names = [dataset.name, *(other.name for other in others)]
        if len(set(names)) < len(names):
            raise CoopError(f"protocol.targets names a dataset twice, or the trained one again: {', '.join(names)}")
        targets = [_target(d.name, d, range(len(d.class_names))) for d in (dataset, *others)]
    empty = [target.name for target in targets if not len(target.test)]
    if empty:
        raise CoopError(f"there are no test images for {', '.join(empty)}: check with `coop data check {dataset.name}`")
    return targets


def restricted(split: Split, labels: range) -> Split:
    """Return the items with these labels, relabelled from 0, in order."""
    kept = [i for i, label in enumerate(split.labels) if label in labels]
    some = split.subset(kept)
    return Split(some.paths, [label - labels.start for label in some.labels])


def classes_of(dataset: Dataset, labels: range) -> Classes:
    """Return these classes of a dataset, as methods see them."""
    return Classes(tuple(dataset.class_names[label] for label in labels), dataset.template, dataset.name)


def summary(protocol: str, accuracies: Mapping[str, float]) -> dict[str, float]:
    """Return what a protocol reports over its targets.

    `harmonic_mean` of base and new; `average` of the targets that were not trained on. Fractions.
    """
    if protocol == "base_to_new":
        return {"harmonic_mean": harmonic_mean(accuracies.values())}
    others = list(accuracies.values())[1:]
    return {"average": fmean(others)} if others else {}


def reported(protocol: str, dataset: str, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names under which a run's results are reported: its test sets, then what `summary` adds."""
    if protocol == "base_to_new":
        return ("base", "new", "harmonic_mean")
    return (dataset, *others, *(("average",) if others else ()))


def _target(name: str, dataset: Dataset, labels: range) -> Target:
    whole = len(labels) == len(dataset.class_names)
    test = dataset.test if whole else restricted(dataset.test, labels)
    return Target(name, dataset, classes_of(dataset, labels), test)
