"""One run: data -> samples -> method -> metrics, and what stays in memory between the runs of a sweep."""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import open_clip
import torch

import coop
from coop.clip.backbone import RANDOM, Backbone, check_model, load_backbone
from coop.config import BackboneConfig, RunConfig, config_text, run_config
from coop.data.dataset import EMPTY, Dataset, Split
from coop.data.few_shot import HELD_OUT, few_shot, few_shot_notes
from coop.data.images import check_images
from coop.data.splits import read_sample_file, write_sample_file
from coop.errors import CoopError, raise_interruption
from coop.evaluate import evaluate, predictions
from coop.features import FeatureCache, Rows
from coop.io import write_text
from coop.learned import FILE, Learned
from coop.methods import METHODS
from coop.methods.base import Classes, Method
from coop.options import Tap
from coop.runs.key import RunKey
from coop.runs.protocol import Datasets, Target, class_names, protocol_named, restricted
from coop.runs.store import (
    CONFIG,
    FAILURE,
    RESULT,
    SAMPLE,
    Predictions,
    stored_runs,
    write_failure,
    write_predictions,
    write_result,
)

FEW_TEST_IMAGES = 50  # below it a note says how coarse the accuracy is
TUNED_ON_TEST = "settings were chosen on the test images: an upper bound, to compare with published numbers made so"


class Resources(Datasets):
    """What the runs of a sweep share: datasets, one backbone, and its features of test sets, each loaded once."""

    def __init__(self) -> None:
        super().__init__()
        self._backbone: tuple[tuple[Any, ...], Backbone, FeatureCache] | None = None
        self._refused: dict[tuple[Any, ...], CoopError] = {}
        self._known_models: set[BackboneConfig] = set()
        self._tests: dict[tuple[str, Path, range, Tap], torch.Tensor | Rows] = {}
        self._done: dict[Path, dict[RunKey, Path]] = {}

    def backbone(self, config: RunConfig) -> tuple[Backbone, FeatureCache]:
        """Load the run's backbone and its feature cache; the last one stays. One that fails is not tried again."""
        wanted = (config.backbone, config.device, config.precision, config.cache, config.workers)
        if wanted in self._refused:
            raise self._refused[wanted]
        if self._backbone is None or self._backbone[0] != wanted:
            self._backbone = None  # the old one leaves before the new one comes
            self._tests.clear()
            model = config.backbone
            try:
                loaded = load_backbone(model.architecture, model.pretrained, config.device, config.precision)
            except CoopError as error:
                raise_interruption(error)
                self._refused[wanted] = error
                raise
            self._backbone = (wanted, loaded, FeatureCache(loaded, config.cache, config.workers))
        return self._backbone[1:]

    def check_backbone(self, model: BackboneConfig) -> None:
        """Raise CoopError where the backbone's names are wrong, before anything is written."""
        if model not in self._known_models:
            check_model(model.architecture, model.pretrained)
            self._known_models.add(model)

    def test_inputs(self, cache: FeatureCache, target: Target, tap: Tap) -> torch.Tensor | Rows:
        """Return the (n, ...) test views of a test set, as the cache's rows of a tap."""
        key = (target.dataset.digest, target.dataset.root, target.labels, tap)
        if key not in self._tests:
            self._tests[key] = cache.test(target.dataset.root, target.test.paths, tap)
        return self._tests[key]

    def folder(self, key: RunKey, results: Path) -> Path:
        """Return a run's folder: that of a finished run of the same key where an older version named it otherwise."""
        folder = key.folder(results)
        siblings = folder.parent
        if os.path.lexists(folder / RESULT) or not siblings.is_dir():
            return folder
        if siblings not in self._done:
            self._done[siblings] = {r.key: r.folder for r in stored_runs(siblings) if r.state == "done" and r.key}
        return self._done[siblings].get(key, folder)


@dataclass(frozen=True)
class Run:
    """A run that has been checked and can start: what it is, and where it goes."""

    config: RunConfig
    key: RunKey
    dataset: Dataset
    train: Split
    val: Split
    targets: tuple[Target, ...]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it has a result already."""
        return os.path.lexists(self.folder / RESULT)


def prepare(config: RunConfig, resources: Resources) -> Run:
    """Check everything that can be checked without a model, and make the run's key.

    Raises CoopError for what the data does not allow.
    """
    resources.check_backbone(config.backbone)
    dataset = resources.dataset(config.dataset, config.data_root)
    targets = resources.targets(config)
    train, val = EMPTY, EMPTY
    key = RunKey.of(config)
    if config.options.trains:
        rule = key.validation or "none"
        if config.sample_file:
            train, val = read_sample_file(config.sample_file, dataset)
            val = EMPTY if rule in ("none", "test") else val
            key = replace(key, sample=_sample_digest(train, val))
        else:
            train, val = few_shot(dataset, config.shots, config.seed, rule)
        check_images(dataset.root, [*train.paths, *val.paths], dataset.follow_links)
    digests = {target.name: target.dataset.digest for target in targets}
    others = tuple((name, digests[name]) for name, _ in key.targets)
    key = replace(key, data=dataset.digest, targets=others)
    return Run(config, key, dataset, train, val, tuple(targets), resources.folder(key, config.results))


def run(**keys: Any) -> dict[str, Any]:
    """Do one run and return its result, or the result that is there: `coop run` from Python.

    Keys are those of the command line (`coop run --help-keys`): dataset="eurosat", method="coop", shots=4, n_ctx=4;
    dotted ones as {"augment.views": 0} with **. Raises CoopError for what `coop run` calls a mistake.
    """
    resources = Resources()
    prepared = prepare(run_config(keys), resources)
    if not prepared.done:
        execute(prepared, resources)
    result: dict[str, Any] = json.loads((prepared.folder / RESULT).read_text(encoding="utf-8"))
    return {**result, "folder": str(prepared.folder)}


def execute(run: Run, resources: Resources) -> dict[str, Any]:
    """Do a run, write its folder, and return its result; on failure leave `failure.json` there and raise."""
    with recording_failure(run.folder, run.key):
        write_text(run.folder / CONFIG, config_text(run.config))
        result = _execute(run, resources)
        write_result(run.folder, run.key, result)
    return result


@contextmanager
def recording_failure(folder: Path, key: RunKey) -> Iterator[None]:
    """Write `failure.json` if what is done inside fails. An interruption is no failure, nor is a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise_interruption(error)
        write_failure(folder, key, error, None if isinstance(error, CoopError) else traceback.format_exc())
        raise


def _execute(run: Run, resources: Resources) -> dict[str, Any]:
    config, watch = run.config, _Stopwatch()
    backbone, cache = resources.backbone(config)
    protocol, tap = protocol_named(config.protocol.name), config.options.reads
    labels = protocol.training_labels(run.dataset)
    classes = Classes(class_names(run.dataset, labels), run.dataset.template, run.dataset.name)
    method = METHODS[config.method](backbone, classes, config.options, config.seed)
    for target in run.targets:  # what cannot be tested is not trained
        _for_target(method, target)
    watch("prepare")
    fit: dict[str, Any] = {}
    images = 0
    if config.options.trains:
        about = {"dataset": run.dataset.name, "shots": config.shots, "seed": config.seed}
        write_sample_file(run.folder / SAMPLE, run.train, run.val, run.dataset.class_names, **about)
        count = len(run.dataset.class_names)
        part, root, o = restricted(run.train, labels, count), run.dataset.root, config.options
        train = cache.samples(root, part.paths, part.labels, getattr(o, "augment", None), o.epoch_views, tap)
        target = run.targets[0]
        tuning = target.test if run.key.validation == "test" else restricted(run.val, labels, count)
        val = cache.samples(root, tuning.paths, tuning.labels, tap=tap)
        images = len(val)
        watch("train_features")
        fit = method.fit(train, val)
        watch("fit")
    tests = {target.name: resources.test_inputs(cache, target, tap) for target in run.targets}
    watch("test_features")
    metrics: dict[str, dict[str, Any]] = {}
    predicted: dict[str, Predictions] = {}
    for target in run.targets:
        inputs: Any = tests[target.name]  # `Rows` where the method reads pixels
        logits = _for_target(method, target).logits(inputs)
        truth = torch.tensor(target.test.labels)
        metrics[target.name] = dataclasses.asdict(evaluate(logits, truth, target.class_names))
        arrays = {name: tensor.numpy() for name, tensor in predictions(logits, truth).items()}
        predicted[target.name] = Predictions(**arrays, paths=tuple(target.test.paths))
    Learned.of(method).save(run.folder / FILE)
    write_predictions(run.folder, predicted)
    watch("test")
    accuracies = {name: m["accuracy"] for name, m in metrics.items()}
    tried = fit.pop("settings_tried", None) if run.key.validation else 1
    return {
        "accuracy": accuracies[run.targets[0].name],
        **protocol.summary(accuracies),
        "targets": metrics,
        "fit": fit,
        "validation": {"rule": run.key.validation, "images": images, "settings_tried": tried},
        "seconds": watch.seconds,
        "split_source": run.dataset.split_source,
        "own_split": run.dataset.own_split,
        "notes": [*run.dataset.notes, *_notes(run)],
        "weights": backbone.identity,
        "device": str(backbone.device),
        "versions": versions(),
        "command": shlex.join(["coop", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("coop", "cli") else "",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _notes(run: Run) -> list[str]:
    """Return what a reader of the result must know of how it came about."""
    notes = [
        f"the test part of '{target.name}' has {n} image{'s' * (n != 1)}: one more right is {100 / n:.1f} points of "
        "accuracy"
        for target in run.targets
        if (n := len(target.test)) < FEW_TEST_IMAGES
    ]
    if run.config.backbone.pretrained == RANDOM:
        notes.append("the backbone's weights are random")
    if not run.config.options.trains:
        return notes
    rule = run.key.validation
    if run.config.sample_file is None:
        notes += few_shot_notes(run.dataset, run.config.shots, rule or "none")
    if rule == "test":
        notes.append(TUNED_ON_TEST)
    elif rule not in (None, "none", HELD_OUT) and run.dataset.val_is_test:
        notes.append("this dataset's validation images are test images, as in the original")
    return notes


def _for_target(method: Method, target: Target) -> Method:
    """Return the method for a target's classes: itself where it was made for them."""
    if target.class_names == method.classes.names:
        return method
    return method.for_classes(Classes(target.class_names, target.dataset.template, target.dataset.name))


def _sample_digest(train: Split, val: Split) -> str:
    rows = [[*zip(part.paths, part.labels, strict=True)] for part in (train, val)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class _Stopwatch:
    """Seconds between one call and the next, by name."""

    def __init__(self) -> None:
        self._last, self.seconds = time.perf_counter(), dict[str, float]()

    def __call__(self, name: str) -> None:
        """Note the time since the last call under `name`."""
        now = time.perf_counter()
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
