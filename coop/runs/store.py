"""What lies in a run's folder, and reading it: of this version and of older ones, whole or damaged.

config.yaml              everything that made the run
sample.json              the few-shot list
learned.safetensors      what was learned
predictions.safetensors  label, predicted class, its probability and the path of every test image
result.json              written last: a run is done if and only if it exists
failure.json             instead, why it is not
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from coop.data.dataset import joined
from coop.errors import CoopError, first_line, short
from coop.io import atomic_write, read_file, write_json
from coop.runs.key import RunKey

RESULT, FAILURE, CONFIG, SAMPLE = "result.json", "failure.json", "config.yaml", "sample.json"
PREDICTIONS = "predictions.safetensors"
PER_CLASS = "mean_per_class_accuracy"  # results of older versions do not have it
METRICS = ("accuracy", PER_CLASS, "macro_f1", "ece", "mean_confidence")  # fractions, of every test set
SUMMARIES = ("harmonic_mean", "average")  # over test sets, where the protocol has one
State = Literal["done", "failed", "damaged"]
MAX_BYTES = 50_000_000  # of a result file that can be one


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it. `result` is result.json, checked; empty unless the run is done.

    `error` says why a run failed or is damaged.
    """

    folder: Path
    state: State
    key: RunKey | None
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @cached_property
    def targets(self) -> dict[str, dict[str, Any]]:
        """The metrics of each test set, in the run's order: METRICS, `n`, `per_class_accuracy`."""
        return {name: _with_class_mean(metrics) for name, metrics in self.result.get("targets", {}).items()}

    @property
    def summary(self) -> dict[str, float]:
        """What the protocol reports over the test sets: `harmonic_mean` or `average`, or nothing."""
        return {name: self.result[name] for name in SUMMARIES if name in self.result}

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracy of each test set, then the summary."""
        return {name: metrics["accuracy"] for name, metrics in self.targets.items()} | self.summary

    @property
    def fit(self) -> dict[str, Any]:
        """What the method recorded of its training."""
        return dict(self.result.get("fit", {}))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase."""
        return dict(self.result.get("seconds", {}))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how the result came about."""
        return tuple(self.result.get("notes", ()))

    @property
    def own_split(self) -> bool:
        """Whether the split was made here, so that the numbers are not comparable with published ones."""
        return bool(self.result.get("own_split", False))

    @property
    def split_source(self) -> str:
        """Where the split comes from."""
        return str(self.result.get("split_source", ""))

    @property
    def validation(self) -> dict[str, Any]:
        """`rule` (None: nothing is chosen on validation), `images`, `settings_tried` (None: not recorded)."""
        found = self.result.get("validation")
        if isinstance(found, Mapping):
            return dict(found)
        return {"rule": self.key.validation if self.key else None, "images": None, "settings_tried": None}

    @property
    def weights(self) -> str:
        """The identity of the backbone's weights."""
        return str(self.result.get("weights", ""))

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the result was made with."""
        return dict(self.result.get("versions", {}))

    @property
    def finished(self) -> str:
        """When, in UTC, as ISO 8601."""
        return str(self.result.get("finished", ""))


@dataclass(frozen=True)
class Predictions:
    """What a run predicted of each image of a test set. `paths` is empty where an older version did not keep them."""

    label: np.ndarray[Any, np.dtype[np.int32]]
    predicted: np.ndarray[Any, np.dtype[np.int32]]
    confidence: np.ndarray[Any, np.dtype[np.float32]]
    paths: tuple[str, ...] = ()


def stored_runs(results: Path) -> list[StoredRun]:
    """Return every run below a results folder: done, failed, or damaged with the reason; sorted by folder.

    Raises CoopError only where there is no such folder.
    """
    if not results.is_dir():
        raise CoopError(f"there is no results folder {results}: name it, or run something first (coop run)")
    unreadable: list[OSError] = []
    runs = [stored_run(folder) for folder in _run_folders(results, unreadable.append)]
    damaged = [StoredRun(Path(e.filename), "damaged", None, error=first_line(e)) for e in unreadable]
    return sorted([*runs, *damaged], key=lambda run: run.folder)


def _run_folders(results: Path, refused: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the folders that hold a result or a failure; `refused` hears of those that cannot be read."""
    for place, folders, files in os.walk(results, onerror=refused):
        folders.sort()
        if not {RESULT, FAILURE}.isdisjoint([*files, *folders]):
            yield Path(place)


def stored_run(folder: Path) -> StoredRun:
    """Return the run of a folder that has a result or a failure. A result wins."""
    path = folder / RESULT if os.path.lexists(folder / RESULT) else folder / FAILURE
    key: RunKey | None = None
    try:
        content = _read(path)
        key = RunKey.from_dict(content.get("key") or content.get("identity") or {})
        if path.name == FAILURE:
            return StoredRun(folder, "failed", key, error=str(content.get("error") or "no reason is given"))
        check_result(content)
        return StoredRun(folder, "done", key, content)
    except CoopError as error:
        reason = str(error)
    except (OSError, RecursionError, MemoryError) as error:
        reason = first_line(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"not of this toolkit ({type(error).__name__}: {first_line(error)})"
    return StoredRun(folder, "damaged", key, error=f"{path.name}: {reason}")


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise CoopError("too large for a result")
    content = json.loads(read_file(path))
    if not isinstance(content, dict):
        raise CoopError("not a JSON object")
    return content


def check_result(content: Mapping[str, Any]) -> None:
    """Raise CoopError if a result's parts are of wrong types, or a metric is not a number from 0 to 1."""
    kinds = {"targets": dict, "fit": dict, "seconds": dict, "notes": list, "versions": dict}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise CoopError(f"'{name}' is not a JSON {'array' if kind is list else 'object'}")
    if not isinstance(content.get("own_split"), bool):
        raise CoopError("'own_split' is not true or false")
    for name in ("split_source", "weights", "finished"):
        if not isinstance(content.get(name), str):
            raise CoopError(f"'{name}' is not a text")
    if not content["targets"]:
        raise CoopError("no test set")
    for target, metrics in content["targets"].items():
        if not isinstance(metrics, dict):
            raise CoopError(f"the metrics of '{target}' are not a JSON object")
        for name in METRICS:
            if name in metrics or name != PER_CLASS:
                _check_fraction(f"{name} of '{target}'", metrics.get(name))
        if not isinstance(metrics.get("n"), int) or isinstance(metrics["n"], bool) or metrics["n"] < 1:
            raise CoopError(f"n of '{target}' is not a number of images")
        if not isinstance(metrics.get("per_class_accuracy"), dict):
            raise CoopError(f"per_class_accuracy of '{target}' is not a JSON object")
        for name, value in metrics["per_class_accuracy"].items():
            if value is not None and not (type(value) is float and 0 <= value <= 1):
                _check_fraction(f"the accuracy of class '{name}'", value)
    for name in SUMMARIES:
        if name in content:
            _check_fraction(name, content[name])
    for name, value in content["seconds"].items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise CoopError(f"seconds of '{name}' is not a number")
    if not all(isinstance(note, str) for note in content["notes"]):
        raise CoopError("a note is not a text")


def _with_class_mean(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a test set with the mean of its classes' accuracies; None where these are not recorded."""
    if PER_CLASS in metrics:
        return metrics
    known = [value for value in metrics.get("per_class_accuracy", {}).values() if value is not None]
    return {PER_CLASS: sum(known) / len(known) if known else None, **metrics}


def _check_fraction(what: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise CoopError(f"{what} is {short(json.dumps(value), 40)}, not a number from 0 to 1")


def write_result(folder: Path, key: RunKey, result: Mapping[str, Any]) -> None:
    """Write result.json, the last of a run's files. Raises CoopError for a value that is not a finite number."""
    content = {"key": key.as_dict(), **result}
    _check_finite(content, "")
    check_result(content)
    write_json(folder / RESULT, content)


def write_failure(folder: Path, key: RunKey, error: BaseException, trace: str | None) -> None:
    """Write failure.json: why a run has no result, with the traceback where it was not the user's mistake."""
    write_json(
        folder / FAILURE, {"error": str(error) or type(error).__name__, "traceback": trace, "key": key.as_dict()}
    )


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_finite(part, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            _check_finite(part, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CoopError(f"{where} is {value}: a result holds finite numbers only; lower lr, or use precision=fp32")


def write_predictions(folder: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write what was predicted, by test set: the images in the order of the test split."""
    arrays: dict[str, Any] = {}
    for target, of in predictions.items():
        arrays |= {
            f"{target}/label": of.label,
            f"{target}/predicted": of.predicted,
            f"{target}/confidence": of.confidence,
        }
        arrays[f"{target}/paths"] = np.frombuffer(joined(of.paths), dtype=np.uint8)
    with atomic_write(folder / PREDICTIONS) as temporary:
        save_file(arrays, temporary)


def read_predictions(folder: Path) -> dict[str, Predictions]:
    """Return what a run predicted, by test set; empty if it was not kept. Raises CoopError for a damaged file."""
    path = folder / PREDICTIONS
    if not path.is_file():
        return {}
    arrays: dict[str, dict[str, Any]] = {}
    try:
        for name, array in load_file(path).items():
            target, _, key = name.rpartition("/")
            arrays.setdefault(target, {})[key] = array
        out = {}
        for target, of in arrays.items():
            text = of["paths"].tobytes().decode("utf-8", "surrogateescape") if "paths" in of else ""
            paths = tuple(text.split("\n")) if text else ()
            out[target] = Predictions(of["label"], of["predicted"], of["confidence"], paths)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CoopError(f"{path} is damaged: {first_line(error)}; remove the folder and run it again") from error
    return out
