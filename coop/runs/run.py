"""One run: data -> features -> method -> result."""

import dataclasses
import hashlib
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import open_clip
import torch
from omegaconf import OmegaConf

import coop
from coop.config import RunConfig
from coop.data import (
    Dataset,
    Split,
    check_images,
    few_shot,
    few_shot_notes,
    read_sample_file,
    write_sample_file,
)
from coop.errors import CoopError
from coop.evaluate import evaluate, predictions
from coop.features import FeatureCache, Samples
from coop.io import write_json, write_text
from coop.learned import FILE, Learned
from coop.methods import METHODS
from coop.methods.base import Method
from coop.runs.protocol import Target, classes_of, restricted, summary, training_labels
from coop.runs.store import CONFIG, FAILURE, RESULT, SAMPLE, flat, identity, run_folder, write_predictions
from coop.runs.workshop import Workshop


@dataclass(frozen=True)
class Run:
    """A run that has been checked and can start: what it is, and where it goes."""

    config: RunConfig
    dataset: Dataset
    train: Split
    val: Split
    targets: tuple[Target, ...]
    about: dict[str, Any]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it has a result already."""
        return (self.folder / RESULT).is_file()


def prepare(config: RunConfig, workshop: Workshop) -> Run:
    """Check everything that can be checked without a model, and name the run.

    Raises CoopError for what the data does not allow.
    """
    dataset = workshop.dataset(config.dataset, config.data_root)
    targets = workshop.targets(config)
    train, val = Split((), ()), Split((), ())
    if config.options.trains:
        if config.sample_file:
            train, val = read_sample_file(config.sample_file, dataset)
        else:
            train, val = few_shot(dataset, config.shots, config.seed)
        check_images(dataset.root, [*train.paths, *val.paths], dataset.follow_links)
    for target in targets:
        workshop.check_test_images(target)
    sample = _sample_digest(train, val) if config.sample_file else None
    others = [target.dataset for target in targets if target.dataset is not dataset]
    about = identity(config, dataset, {other.name: other.digest for other in others}, sample)
    defaults = flat(dataclasses.asdict(type(config.options)()))
    folder = run_folder(config.results, about, defaults)
    return Run(config, dataset, train, val, tuple(targets), about, folder)


def execute(run: Run, workshop: Workshop) -> dict[str, Any]:
    """Do a run and return its result; on failure leave `failure.json` in its folder and raise."""
    with recording_failure(run.folder, run.about):
        write_text(run.folder / CONFIG, OmegaConf.to_yaml(_plain(run.config)))
        result = _execute(run, workshop)
        write_json(run.folder / RESULT, result)
    return result


@contextmanager
def recording_failure(folder: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Leave `failure.json` in a run's folder if what is done inside fails; an interruption is no failure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        trace = None if isinstance(error, CoopError) else traceback.format_exc()
        told = {"error": str(error) or type(error).__name__, "traceback": trace, "identity": about}
        write_json(folder / FAILURE, told)
        raise


def _execute(run: Run, workshop: Workshop) -> dict[str, Any]:
    config, watch = run.config, Stopwatch()
    backbone, cache = workshop.backbone(config)
    labels = training_labels(config.protocol.name, run.dataset)
    method = METHODS[config.method](backbone, classes_of(run.dataset, labels), config.options, config.seed)
    for target in run.targets:  # what cannot be tested is not trained
        _for_target(method, target)
    watch("prepare")
    fit: dict[str, Any] = {}
    if method.options.trains:
        parts = [restricted(part, labels) for part in (run.train, run.val)]
        about = {"dataset": run.dataset.name, "shots": config.shots, "seed": config.seed}
        write_sample_file(run.folder / SAMPLE, run.train, run.val, run.dataset.class_names, **about)
        train, val = _sample_features(cache, run, parts)
        watch("train_features")
        fit = method.fit(train, val)
        watch("fit")
    tests = {target.name: workshop.test_features(cache, target) for target in run.targets}
    watch("test_features")
    metrics, said = {}, {}
    for target in run.targets:
        logits = _for_target(method, target).logits(tests[target.name])
        truth = torch.tensor(target.test.labels)
        metrics[target.name] = dataclasses.asdict(evaluate(logits, truth, target.classes.names))
        said[target.name] = predictions(logits, truth)
    artefact = Learned.of(method)
    artefact.save(run.folder / FILE)
    write_predictions(run.folder, said)
    watch("test")
    accuracies = {name: m["accuracy"] for name, m in metrics.items()}
    return {
        "identity": run.about,
        "accuracy": accuracies[run.targets[0].name],
        **summary(config.protocol.name, accuracies),
        "targets": metrics,
        "fit": fit,
        "seconds": watch.seconds,
        "split_source": run.dataset.split_source,
        "own_split": run.dataset.own_split,
        "notes": [*run.dataset.notes, *_method_notes(run, method)],
        "weights": backbone.identity,
        "device": str(backbone.device),
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _method_notes(run: Run, method: Method) -> list[str]:
    """Return what a reader of the result must know of how it came about."""
    if not method.options.trains:
        return []
    notes = list(few_shot_notes(run.dataset, run.config.shots)) if run.config.sample_file is None else []
    if run.dataset.val_is_test:
        notes.append("this dataset's validation images are test images, as in the original")
    return notes


def _for_target(method: Method, target: Target) -> Method:
    """Return the method for a target's classes: itself where it was made for them."""
    return method if target.classes.names == method.classes.names else method.for_classes(target.classes)


def _sample_features(cache: FeatureCache, run: Run, parts: Sequence[Split]) -> tuple[Samples, Samples]:
    """Return the features of the train sample, with its random views, and of the validation sample."""
    device = cache.backbone.device
    train, val = parts
    augment = getattr(run.config.options, "augment", None)
    fresh = augment is not None and augment.views == "epochs"
    features = cache(run.dataset.root, train.paths, range(run.config.options.n_views + 1)).to(device)
    shown = cache(run.dataset.root, val.paths)[0].to(device) if len(val) else features[0, :0]
    return (
        Samples(torch.tensor(train.labels, device=device), features[0], features[1:], fresh),
        _labelled(val, shown),
    )


def _labelled(part: Split, features: torch.Tensor) -> Samples:
    """Return what is only looked at: the (n, e) test view."""
    labels = torch.tensor(part.labels, dtype=torch.long, device=features.device)
    return Samples(labels, features, features.new_empty(0, *features.shape))


def _sample_digest(train: Split, val: Split) -> str:
    rows = [[*zip(part.paths, part.labels, strict=True)] for part in (train, val)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as YAML can write it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


class Stopwatch:
    """Seconds between one call and the next, by name."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._last, self.seconds = clock, clock(), dict[str, float]()

    def __call__(self, name: str) -> None:
        """Note the time since the last call under `name`."""
        now = self._clock()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "coop": coop.__version__,
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
        "python": platform.python_version(),
    }
