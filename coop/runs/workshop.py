"""What stays in memory between the runs of a sweep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coop.clip.backbone import Backbone, load_backbone
from coop.config import RunConfig
from coop.data import Dataset, check_images, load_description, read_dataset
from coop.errors import CoopError
from coop.features import FeatureCache
from coop.runs.protocol import Target, targets_of


class Workshop:
    """Datasets, one backbone, and its features of test sets: each is read, loaded or encoded once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Dataset] = {}
        self._checked: set[tuple[Path, str]] = set()
        self._backbone: tuple[tuple[Any, ...], Backbone, FeatureCache] | None = None
        self._tests: dict[tuple[str, str], torch.Tensor] = {}

    def dataset(self, description: Mapping[str, Any], data_root: Path) -> Dataset:
        """Return a dataset, read once."""
        key = json.dumps([description, str(data_root)], sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = read_dataset(description, data_root)
        return self._datasets[key]

    def target(self, name: Any, data_root: Path) -> Dataset:
        """Return a dataset that a protocol names, or a mapping with its name and changed keys."""
        changed = dict(name) if isinstance(name, Mapping) else {"name": name}
        key = json.dumps([changed, str(data_root)], sort_keys=True, default=str)
        if key not in self._datasets:
            called = str(changed.pop("name", ""))
            self._datasets[key] = read_dataset(load_description(called, **changed), data_root)
        return self._datasets[key]

    def targets(self, config: RunConfig) -> list[Target]:
        """Return a run's test sets. Raises CoopError for what the data lacks."""
        dataset, protocol = self.dataset(config.dataset, config.data_root), config.protocol
        others = [self.target(name, config.data_root) for name in protocol.targets]
        if protocol.name in ("cross_dataset", "domain_generalisation") and not others:
            raise CoopError(f"protocol={protocol.name} needs protocol.targets=[...]: the datasets to test on")
        return targets_of(protocol.name, dataset, others)

    def check_test_images(self, target: Target) -> None:
        """Look, once, whether a test set's images are there."""
        key = (target.dataset.root, target.name + target.dataset.digest)
        if key not in self._checked:
            check_images(target.dataset.root, target.test.paths, target.dataset.follow_links)
            self._checked.add(key)

    def backbone(self, config: RunConfig) -> tuple[Backbone, FeatureCache]:
        """Return the run's backbone and its feature cache; the last one stays loaded."""
        wanted = (config.backbone, config.device, config.precision, config.cache, config.workers)
        if self._backbone is None or self._backbone[0] != wanted:
            self._backbone = None  # the old one leaves before the new one comes
            self._tests.clear()
            b = load_backbone(config.backbone.architecture, config.backbone.pretrained, config.device, config.precision)
            self._backbone = (wanted, b, FeatureCache(b, config.cache, config.workers))
        return self._backbone[1:]

    def test_features(self, cache: FeatureCache, target: Target) -> torch.Tensor:
        """Return the (n, e) test-view features of a test set."""
        key = (target.dataset.digest + str(target.dataset.root), target.name)
        if key not in self._tests:
            self._tests[key] = cache(target.dataset.root, target.test.paths)[0].to(cache.backbone.device)
        return self._tests[key]
