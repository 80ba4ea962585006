"""One series on one dataset, class by class, against a baseline: gains, confusions, calibration, example images."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from coop.errors import CoopError
from coop.io import track
from coop.report.frame import Cell, heading, listed, pairs, text_of, where
from coop.report.tables import shown
from coop.runs.protocol import protocol_named
from coop.runs.store import SUMMARIES, Predictions, StoredRun, read_predictions, stored_run
from coop.runs.study import DetailPart

ECE_BINS = 15
CHANGED = 3  # classes that gained most, and as many that lost most, have example images
EACH, SIDE, QUALITY = 4, 112, 72  # images of a class; their pixels; of JPEG
BUDGET = 1_000_000  # characters of pictures in a page


@dataclass(frozen=True)
class Example:
    """A test image whose answer changed, as a small JPEG in a data address."""

    image: str
    label: str
    baseline: str
    learned: str


@dataclass(frozen=True)
class ClassGain:
    """A class's accuracy by the baseline and by the learned method (means over seeds), its number of test images."""

    name: str
    baseline: float
    learned: float
    n: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence between `low` and `high`: how many, their mean confidence, how many are right."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of class `label` called `predicted`: by the learned method and by the baseline, of n images; percent."""

    label: str
    predicted: str
    learned: float
    baseline: float
    n: int


@dataclass(frozen=True)
class Detail:
    """One series on one dataset, class by class, against a baseline."""

    dataset: str
    label: str
    baseline: str
    runs: tuple[str, ...]
    classes: tuple[ClassGain, ...]  # by gain, largest first
    reliability: tuple[tuple[str, float, tuple[Bin, ...]], ...]  # series, its expected calibration error, its bins
    confusions: tuple[Confusion, ...]  # most frequent first
    note: str = ""


class Runs:
    """The runs of a report by their folders in `results`, and what they predicted, each file read once."""

    def __init__(self, results: Path, runs: Sequence[StoredRun] = ()) -> None:
        self.results = results
        self._runs = {run.folder.relative_to(results).as_posix(): run for run in runs}
        self._predictions: dict[str, dict[str, Predictions]] = {}

    def __getitem__(self, run: str) -> StoredRun:
        if run not in self._runs:
            self._runs[run] = stored_run(self.results / run)
        return self._runs[run]

    def data(self, run: str) -> str | None:
        """Return the digest of a run's dataset."""
        key = self[run].key
        return key.data if key else None

    def predictions(self, run: str, target: str) -> Predictions | None:
        """Return what was predicted of a target's images; None if the run did not keep it, or its file is damaged."""
        if run not in self._predictions:
            try:
                self._predictions[run] = read_predictions(self.results / run)
            except CoopError:
                self._predictions[run] = {}
        return self._predictions[run].get(target)


class Details:
    """Makes the details of a report; all of them share the page's budget for pictures."""

    def __init__(self, runs: Runs) -> None:
        self._runs, self._left = runs, BUDGET
        self._datasets: dict[str, Any] = {}

    def __call__(self, frame: pd.DataFrame, show: DetailPart) -> tuple[list[Detail], list[str]]:
        """Return a detail for each dataset on which both series are there, and what to say of the others."""
        chosen = where(frame, show.where)
        chosen = chosen[~chosen["target"].isin(SUMMARIES)]
        if "target" not in show.where and len(chosen):  # the first target of a run is what it was trained for
            chosen = chosen.groupby(["label", "run_id"], sort=False, dropna=False).head(1)
        more, found = pairs(chosen, show.label, show.baseline, "dataset")
        made, gone = [], []
        for cell, baseline in track(found, "class by class", len(found)):
            if cell.value.runs and baseline is not None and baseline.value.runs:
                made.append(self._detail(cell, baseline, show, more))
            else:
                gone.append(shown("dataset", text_of(cell.keys["dataset"])))
        note = f"class by class: {listed(gone, 'datasets')} left out, where {show.label} or {show.baseline} is missing"
        return made, [note] if gone and made else []

    def _detail(self, cell: Cell, baseline: Cell, show: DetailPart, more: Sequence[str]) -> Detail:
        runs, basis = list(cell.value.runs), list(baseline.value.runs)
        target, note = str(cell.get("target")), ""
        same = [run for run in runs if self._runs.data(run) == self._runs.data(basis[0])]
        if len(same) < len(runs):
            note = f"{len(runs) - len(same)} runs on other data than {show.baseline}'s are left out"
        ours, theirs = self._predictions(same, target), self._predictions(basis, target)
        names = list(self._runs[basis[0]].targets[target]["per_class_accuracy"])
        after, before = self._accuracies(same or runs, target), self._accuracies(basis, target)
        gains, pairs_of_classes = _gains(after, before, names, ours or theirs), tuple[Confusion, ...]()
        if ours and theirs and np.array_equal(ours[0].label, theirs[0].label):
            pairs_of_classes = confusions(ours, theirs, names)
            refused = self._no_pictures(basis[0], target)
            if not refused:
                gains = self._with_examples(gains, basis[0], target, ours, theirs[0], names)
            note = "; ".join(part for part in (note, refused) if part)
        else:
            note = note or "these runs did not keep what they predicted"
        series = ((show.label, same, ours), (show.baseline, basis, theirs))
        reliability = tuple((name, self._ece(some, target), pooled_bins(kept)) for name, some, kept in series if kept)
        rest = [heading(key, cell.keys[key]) for key in more if key != "shots" and cell.keys[key] is not None]
        title = ", ".join([text_of(cell.keys["dataset"]), *rest])
        return Detail(title, show.label, show.baseline, tuple(same), gains, reliability, pairs_of_classes, note)

    def _predictions(self, runs: Sequence[str], target: str) -> list[Predictions]:
        """Return what was predicted by all runs, or nothing if one did not keep it."""
        found = [self._runs.predictions(run, target) for run in runs]
        return [one for one in found if one is not None] if all(one is not None for one in found) else []

    def _accuracies(self, runs: Sequence[str], target: str) -> dict[str, float]:
        """Return each class's accuracy in percent, the mean over runs; classes without test images are left out."""
        results = [self._runs[run].targets[target]["per_class_accuracy"] for run in runs]
        known = [name for name in results[0] if all(one.get(name) is not None for one in results)]
        return {name: 100 * fmean(one[name] for one in results) for name in known}

    def _ece(self, runs: Sequence[str], target: str) -> float:
        return 100 * fmean(self._runs[run].targets[target]["ece"] for run in runs)

    def _with_examples(
        self,
        gains: tuple[ClassGain, ...],
        run: str,
        target: str,
        learned: Sequence[Predictions],
        baseline: Predictions,
        names: Sequence[str],
    ) -> tuple[ClassGain, ...]:
        """Add images to the most changed classes: what the baseline had wrong and the learned runs right, or back.

        Those on which the most runs agree come first; what is shown as the learned answer is the first run's.
        """
        right = np.stack([one.predicted == one.label for one in learned])
        was = baseline.predicted == baseline.label
        root, paths = self._images(run, target)
        out = []
        for place, gain in enumerate(gains):
            up = place < CHANGED and gain.learned > gain.baseline
            down = place >= len(gains) - CHANGED and gain.learned < gain.baseline
            examples: list[Example] = []
            if up or down:
                turned = right & ~was if up else ~right & was
                votes = turned.sum(0) * (turned[0] & (baseline.label == names.index(gain.name)))
                for i in np.argsort(-votes, kind="stable")[:EACH]:
                    if votes[i] and self._left > 0 and (picture := thumbnail(root / paths[int(i)])):
                        self._left -= len(picture)
                        answers = (names[int(some.predicted[i])] for some in (baseline, learned[0]))
                        examples.append(Example(picture, gain.name, *answers))
            out.append(replace(gain, examples=tuple(examples)))
        return tuple(out)

    def _no_pictures(self, run: str, target: str) -> str:
        """Return why there are no example images of a run, or nothing where there can be."""
        if self._left <= 0:
            return "no example images: the page has as many as it can hold"
        try:
            return "" if self._images(run, target)[1] else "no example images of other datasets' test sets"
        except CoopError as error:
            return f"no example images: {error}"

    def _images(self, run: str, target: str) -> tuple[Path, Sequence[str]]:
        """Return the root and the paths of a target's test images. Raises CoopError where the data is not here."""
        if run not in self._datasets:
            self._datasets[run] = _read_dataset(self._runs[run])
        dataset = self._datasets[run]
        if isinstance(dataset, str):
            raise CoopError(dataset)
        key = self._runs[run].key
        targets = protocol_named(key.protocol).targets(dataset, {}) if key else []
        return dataset.root, next((one.test.paths for one in targets if one.name == target), ())


def _read_dataset(run: StoredRun) -> Any:
    """Return a run's dataset as it was, or why it is not here."""
    from omegaconf import OmegaConf

    from coop.data import read_dataset

    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(run.folder / "config.yaml"))
        dataset = read_dataset(config["dataset"], Path(config["data_root"]))
    except (CoopError, OSError, KeyError, TypeError, ValueError) as error:
        return str(error)
    if run.key is None or dataset.digest != run.key.data:
        return f"the dataset in {dataset.root} is not the one that the runs used"
    return dataset


def thumbnail(path: Path) -> str:
    """Return an image as a JPEG of at most SIDE pixels in a data address; nothing if it cannot be read."""
    from PIL import Image

    from coop.data import open_rgb

    try:
        image = open_rgb(path)
    except CoopError:
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _gains(
    learned: Mapping[str, float], baseline: Mapping[str, float], names: Sequence[str], kept: Sequence[Predictions]
) -> tuple[ClassGain, ...]:
    """Return the classes that both have, the most gained first; their images are counted in the predictions."""
    counts = np.bincount(kept[0].label, minlength=len(names)).tolist() if kept else []
    numbers = dict(zip(names, counts, strict=False)) if len(counts) == len(names) else {}
    gains = [
        ClassGain(name, before, learned[name], numbers.get(name, 0))
        for name, before in baseline.items()
        if name in learned
    ]
    return tuple(sorted(gains, key=lambda gain: gain.baseline - gain.learned))


def pooled_bins(runs: Sequence[Predictions], count: int = ECE_BINS) -> tuple[Bin, ...]:
    """Return the bins of all runs' predictions together: those of torchmetrics' calibration error.

    It counts a confidence on a border to the upper bin, and gives a bin of its own to 1.0, which here is in the last.
    """
    sure = np.concatenate([run.confidence for run in runs])
    right = np.concatenate([run.predicted == run.label for run in runs])
    borders = np.linspace(0, 1, count + 1, dtype=np.float32)
    place = np.clip(np.searchsorted(borders, sure, side="right") - 1, 0, count - 1)
    n = np.bincount(place, minlength=count)
    confidence, hits = (np.bincount(place, weights=some.astype(float), minlength=count) for some in (sure, right))
    return tuple(
        Bin(100 * i / count, 100 * (i + 1) / count, int(k), *((100 * s / k, 100 * h / k) if k else (None, None)))
        for i, (k, s, h) in enumerate(zip(n.tolist(), confidence.tolist(), hits.tolist(), strict=True))
    )


def confusions(
    learned: Sequence[Predictions], baseline: Sequence[Predictions], names: Sequence[str], most: int = 12
) -> tuple[Confusion, ...]:
    """Return the pairs of classes that the learned method confuses most often, most frequent first."""
    size = len(names)

    def counts(runs: Sequence[Predictions]) -> np.ndarray:
        places = [run.label.astype(int) * size + run.predicted.astype(int) for run in runs]
        total = np.bincount(np.concatenate(places), minlength=size * size) / len(runs)
        return total.reshape(size, size)

    ours, theirs = counts(learned), counts(baseline)
    n = ours.sum(1)
    wrong = (ours * (1 - np.eye(size))).ravel()
    found = []
    for place in np.argsort(-wrong, kind="stable")[:most]:
        if wrong[place] > 0:
            label, predicted = divmod(int(place), size)
            after, before = (100 * float(some[label, predicted] / n[label]) for some in (ours, theirs))
            found.append(Confusion(names[label], names[predicted], after, before, round(float(n[label]))))
    return tuple(found)
