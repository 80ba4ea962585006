"""What is trained on and what is tested on: all classes, base to new, across datasets, under domain shift.

One training has one or more test sets; the first is what the training itself was for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean

from coop.config import RunConfig
from coop.data.dataset import Dataset, Split
from coop.data.images import check_images
from coop.data.layouts import read_dataset
from coop.data.spec import DatasetSpec
from coop.errors import CoopError, unknown
from coop.io import track


@dataclass(frozen=True)
class Target:
    """A test set: some classes of a dataset, relabelled from 0, under the name that results give it."""

    name: str
    dataset: Dataset
    labels: range

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes, in label order."""
        return class_names(self.dataset, self.labels)

    @property
    def test(self) -> Split:
        """Its test images."""
        return restricted(self.dataset.test, self.labels, len(self.dataset.class_names))


class Datasets:
    """Datasets that are read once, and their test images looked for once, for all runs of a sweep."""

    def __init__(self) -> None:
        self._datasets: dict[tuple[int, Path], tuple[DatasetSpec, Dataset]] = {}
        self._checked: set[tuple[Path, str, range]] = set()

    def dataset(self, description: DatasetSpec, data_root: Path) -> Dataset:
        """Read a dataset, once."""
        key = (id(description), data_root)  # equal descriptions are one object (coop.config.described)
        if key not in self._datasets:
            self._datasets[key] = (description, read_dataset(description, data_root))
        return self._datasets[key][1]

    def targets(self, config: RunConfig) -> list[Target]:
        """Return a run's test sets. Raises CoopError where one has no test images, or they are not on disk."""
        dataset = self.dataset(config.dataset, config.data_root)
        others = {t.name: self.dataset(t, config.data_root) for t in config.protocol.targets}
        targets = protocol_named(config.protocol.name).targets(dataset, others)
        for target in targets:
            key = (target.dataset.root, target.dataset.digest, target.labels)
            if key not in self._checked:
                check_images(target.dataset.root, target.test.paths, target.dataset.follow_links)
                self._checked.add(key)
        return targets


def missing_data(configs: Iterable[RunConfig]) -> dict[str, tuple[int, str]]:
    """Return, by dataset, how many of these runs cannot be done for want of test images, and what is lacking."""
    groups: dict[tuple[int, ...], list[RunConfig]] = {}
    for config in configs:
        descriptions = (config.dataset, *config.protocol.targets)
        groups.setdefault(tuple(map(id, descriptions)), []).append(config)
    datasets, found = Datasets(), dict[str, tuple[int, str]]()
    for group in track(list(groups.values()), "looking for data", len(groups)):
        try:
            datasets.targets(group[0])
        except CoopError as error:
            found[group[0].dataset.name] = (len(group), str(error))
    return found


class AllClasses:
    """Train and test on all classes of the dataset; other datasets are tested on where they are named."""

    name = "all_classes"

    def training_labels(self, dataset: Dataset) -> range:
        """Return the labels that are trained on."""
        return range(len(dataset.class_names))

    def targets(self, dataset: Dataset, others: Mapping[str, Dataset]) -> list[Target]:
        """Return the test sets: of `dataset`, and of the `others` by the names that results give them.

        Raises CoopError if one has no test images.
        """
        named = {dataset.name: dataset, **others}
        return checked([Target(name, of, range(len(of.class_names))) for name, of in named.items()])

    def summary(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Return what is reported over the test sets: the `average` of those that were not trained on. Fractions."""
        others = list(accuracies.values())[1:]
        return {"average": fmean(others)} if others else {}

    def reported(self, dataset: str, others: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the columns of a run's results: its test sets by name, then what `summary` adds."""
        return (dataset, *others, *(("average",) if others else ()))


class CrossDataset(AllClasses):
    """Train on the dataset, test on its own test set and, unchanged, on other datasets (CoCoOp, Table 2)."""

    name = "cross_dataset"


class DomainGeneralisation(AllClasses):
    """Train on ImageNet, test on its own test set and on shifted versions of it (CoOp, Table 1)."""

    name = "domain_generalisation"


class BaseToNew(AllClasses):
    """Train on the first half of the classes, by label, rounded up; test on that half and on the other (CoCoOp)."""

    name = "base_to_new"

    def training_labels(self, dataset: Dataset) -> range:
        """Return the labels that are trained on."""
        return range(-(-len(dataset.class_names) // 2))

    def targets(self, dataset: Dataset, others: Mapping[str, Dataset]) -> list[Target]:
        """Return the test sets `base` and `new`. Raises CoopError for a dataset of one class."""
        count, base = len(dataset.class_names), self.training_labels(dataset)
        if count < 2:
            raise CoopError(f"dataset '{dataset.name}' has one class: protocol=base_to_new needs two or more")
        return checked([Target("base", dataset, base), Target("new", dataset, range(len(base), count))])

    def summary(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Return the `harmonic_mean` of both accuracies. Fractions."""
        return {"harmonic_mean": harmonic_mean(accuracies.values())}

    def reported(self, dataset: str, others: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the columns of a run's results."""
        return ("base", "new", "harmonic_mean")


Protocol = AllClasses  # what all protocols share
_PROTOCOLS: dict[str, Protocol] = {
    p.name: p for p in (AllClasses(), BaseToNew(), CrossDataset(), DomainGeneralisation())
}


def protocol_named(name: str) -> Protocol:
    """Return the protocol called `name`. Raises CoopError for an unknown one."""
    if name not in _PROTOCOLS:
        raise unknown("protocol", name, _PROTOCOLS)
    return _PROTOCOLS[name]


def checked(targets: list[Target]) -> list[Target]:
    """Return `targets`. Raises CoopError if one has no test images."""
    empty = [target.name for target in targets if not len(target.test)]
    if empty:
        name = targets[0].dataset.name
        raise CoopError(f"there are no test images for {', '.join(empty)}: check with `coop data check {name}`")
    return targets


def class_names(dataset: Dataset, labels: range) -> tuple[str, ...]:
    """Return the names of the classes with these labels."""
    return tuple(dataset.class_names[label] for label in labels)


def restricted(split: Split, labels: range, classes: int) -> Split:
    """Return the items with these labels of `classes`, relabelled from 0, in order."""
    if len(labels) == classes:
        return split
    some = split.subset([i for i, label in enumerate(split.labels) if label in labels])
    return Split(some.paths, [label - labels.start for label in some.labels])
