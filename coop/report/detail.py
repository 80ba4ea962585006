"""One series on one dataset, class by class, against a baseline."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from coop.io import track
from coop.report.averages import MANY
from coop.report.cells import Cell, Record, said, where, with_key
from coop.report.content import ClassGain, Detail
from coop.report.examples import Pictures, same_images
from coop.report.pairs import pairs
from coop.report.reliability import Predictions, confusions, pooled_bins
from coop.report.runs import Runs

SHOWN = 3  # classes that gained most, and as many that lost most, have example images
SUMMARIES = ("harmonic_mean", "average")  # targets without images


class Details:
    """Makes the details of a report; all of them share the page's budget for pictures."""

    def __init__(self, runs: Runs) -> None:
        self._runs, self._pictures = runs, Pictures(runs)

    def __call__(self, records: Sequence[Record], show: Mapping[str, Any]) -> tuple[list[Detail], list[str]]:
        """Return a detail for each dataset on which both series are there, and what to say of the others."""
        chosen = [r for r in where(records, show.get("where", {})) if r["target"] not in SUMMARIES]
        if "target" not in show.get("where", {}):
            chosen = _first_targets(chosen)
        learned = [r for r in chosen if r["label"] == show["label"]]
        base = [r for r in chosen if r["label"] == show["baseline"]]
        more, found = pairs(learned, base, "dataset")
        made, gone = [], []
        for cell, baseline in track(found, "class by class", len(found)):
            runs, basis = _done(cell), _done(baseline) if baseline else []
            if runs and basis:
                made.append(self._detail(cell, show, runs, basis, more))
            else:
                gone.append(said(cell.keys["dataset"]))
        what = ", ".join(gone) if len(gone) <= MANY else f"{len(gone)} of {len(found)} datasets"
        note = f"class by class: {what} left out, where {show['label']} or {show['baseline']} is missing"
        return made, [note] if gone and made else []

    def _detail(
        self, cell: Cell, show: Mapping[str, Any], runs: list[str], basis: list[str], more: Sequence[str]
    ) -> Detail:
        target, note = str(cell.the("target")), ""
        digest = self._runs.result(basis[0])["identity"]["data"]
        same = [run for run in runs if self._runs.result(run)["identity"]["data"] == digest]
        if len(same) < len(runs):
            note = f"{len(runs) - len(same)} runs on other data than {show['baseline']}'s are left out"
        ours, theirs = (self._predictions(some, target) for some in (same, basis))
        after, before = (self._accuracies(some, target) for some in (same or runs, basis))
        gains = _gains(after, before, ours or theirs)
        if ours and theirs and same_images(ours[0]["label"], theirs[0]["label"]):
            names = list(self._runs.result(basis[0])["targets"][target]["per_class_accuracy"])
            pairs = confusions(ours, theirs, names)
            refused = self._pictures.refused(basis[0], target)
            if not refused:
                gains = self._with_examples(gains, basis[0], target, ours, theirs[0], names)
            note = "; ".join(part for part in (note, refused) if part)
        else:
            pairs, note = (), note or "these runs did not keep what they predicted"
        series = ((str(show["label"]), same, ours), (str(show["baseline"]), basis, theirs))
        reliability = tuple((name, self._ece(some, target), pooled_bins(p)) for name, some, p in series if p)
        heading = [with_key(key, cell.keys[key]) for key in more if key != "shots"]
        title = ", ".join([said(cell.keys["dataset"]), *heading])
        return Detail(title, str(show["label"]), str(show["baseline"]), tuple(same), gains, reliability, pairs, note)

    def _predictions(self, runs: Sequence[str], target: str) -> list[Predictions]:
        """Return what was predicted by all runs, or nothing if one did not keep it."""
        found = [self._runs.predictions(run, target) for run in runs]
        kept = [one for one in found if one is not None]
        return list(kept) if len(kept) == len(found) else []

    def _accuracies(self, runs: Sequence[str], target: str) -> dict[str, float]:
        """Return each class's accuracy in percent, the mean over runs; classes without test images are left out."""
        results = [self._runs.result(run)["targets"][target]["per_class_accuracy"] for run in runs]
        known = [name for name in results[0] if all(one.get(name) is not None for one in results)]
        return {name: 100 * fmean(one[name] for one in results) for name in known}

    def _ece(self, runs: Sequence[str], target: str) -> float:
        return 100 * fmean(self._runs.result(run)["targets"][target]["ece"] for run in runs)

    def _with_examples(
        self,
        gains: tuple[ClassGain, ...],
        run: str,
        target: str,
        learned: Sequence[Predictions],
        baseline: Predictions,
        names: Sequence[str],
    ) -> tuple[ClassGain, ...]:
        up = [gain for gain in gains[:SHOWN] if gain.learned > gain.baseline]
        down = [gain for gain in gains[-SHOWN:] if gain.learned < gain.baseline]
        out = []
        for gain in gains:
            if gain in up or gain in down:
                found = self._pictures.changed(
                    run, target, names.index(gain.name), learned, baseline, gain in up, names
                )
                gain = ClassGain(gain.name, gain.baseline, gain.learned, gain.n, found)
            out.append(gain)
        return tuple(out)


def _first_targets(records: Sequence[Record]) -> list[Record]:
    """Return the records of the test set that each run itself was for: the first that it names."""
    first: dict[tuple[Any, ...], str] = {}
    for record in records:
        first.setdefault((record["label"], record["overrides"]), str(record["target"]))
    return [r for r in records if first[r["label"], r["overrides"]] == r["target"]]


def _done(cell: Cell) -> list[str]:
    return [str(record["run"]) for record in cell.records if record["state"] == "done"]


def _gains(
    learned: Mapping[str, float], baseline: Mapping[str, float], predictions: Sequence[Predictions]
) -> tuple[ClassGain, ...]:
    """Return the classes that both have, the most gained first; their images are counted in the predictions."""
    counts = torch.bincount(predictions[0]["label"], minlength=len(baseline)).tolist() if predictions else []
    numbers = dict(zip(baseline, counts, strict=False)) if len(counts) == len(baseline) else {}
    gains = [
        ClassGain(name, before, learned[name], numbers.get(name, 0))
        for name, before in baseline.items()
        if name in learned
    ]
    return tuple(sorted(gains, key=lambda gain: gain.baseline - gain.learned))
