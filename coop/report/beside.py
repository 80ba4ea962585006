"""Published numbers beside ours: only where backbone, dataset, shots and test set are the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from coop.report.averages import Average
from coop.report.cells import Cell, metric_name, said, with_key
from coop.report.content import Grid, Published, Value
from coop.report.published import published, published_words, reproductions
from coop.report.table import AVERAGE

Place = tuple[str, str, str, str, str]  # label, dataset, backbone, shots, target


@dataclass(frozen=True)
class Literature:
    """What others report of a study: numbers and words, and how their reproduction went (coop.report.published)."""

    numbers: pd.DataFrame
    words: pd.DataFrame
    reproductions: pd.DataFrame

    @classmethod
    def of(cls, study: str) -> "Literature":
        """Return what the toolkit knows of a study."""
        return cls(published(study), published_words(), reproductions(study))


class Beside:
    """The published numbers of a study, found by what they are numbers of."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._numbers: dict[str, dict[Place, list[Published]]] = {}
        self._shown: set[Place] = set()
        for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
            dataset = said(row["dataset"])
            target = said(row.get("target") or dataset)
            place = (said(row["label"]), dataset, said(row["backbone"] or None), said(row["shots"]), target)
            metric = str(row.get("metric") or "accuracy")
            self._numbers.setdefault(metric, {}).setdefault(place, []).append(_published(row))
        for places in self._numbers.values():
            for numbers in places.values():
                numbers.sort(key=lambda number: not number.verified)

    def of(self, cell: Cell, metric: str = "accuracy") -> tuple[Published, ...]:
        """Return what is published of a cell; nothing where its runs did not use the official split."""
        if not cell.comparable:
            return ()
        dataset = said(cell.the("dataset"))
        target = cell.the("target")
        return self._at(metric, cell, dataset, said(target) if target else dataset)

    def of_average(self, average: Average, metric: str = "accuracy") -> tuple[Published, ...]:
        """Return what is published of an average over all of the study's datasets."""
        if not average.complete or not all(cell.comparable for cell in average.cells):
            return ()
        whole = Cell(average.keys, tuple(record for cell in average.cells for record in cell.records))
        return self._at(metric, whole, AVERAGE, said(average.keys.get("target") or AVERAGE))

    def _at(self, metric: str, cell: Cell, dataset: str, target: str) -> tuple[Published, ...]:
        place = (said(cell.the("label")), dataset, said(cell.the("backbone")), said(cell.the("shots")), target)
        self._shown.add(place)
        return tuple(self._numbers.get(metric, {}).get(place, ()))

    def others(
        self, labels: Iterable[str], backbones: Iterable[str], metric: str = "accuracy"
    ) -> dict[Place, tuple[Published, ...]]:
        """Return {place: numbers} of systems that are not ours (`labels`), on our backbones."""
        ours, here = set(labels), set(backbones)
        return {
            place: tuple(numbers)
            for place, numbers in self._numbers.get(metric, {}).items()
            if place[0] not in ours and place[2] in here
        }

    def shown(self, place: Place) -> None:
        """Remember that a part of the report shows the numbers of a place."""
        self._shown.add(place)

    def backbones(self) -> list[str]:
        """Return the backbones that something is published of."""
        return list(dict.fromkeys(place[2] for places in self._numbers.values() for place in places if place[2] != "-"))

    def rest(self, datasets: Iterable[str]) -> list[Grid]:
        """Return tables of what no part of the report has shown: other backbones' numbers, and other systems'."""
        there = {*datasets, AVERAGE}
        grids = []
        for metric, places in self._numbers.items():
            left = {p: tuple(n) for p, n in places.items() if p not in self._shown and p[1] in there}
            if left:
                grids.append(_grid(left, metric))
        return grids


def _grid(places: Mapping[Place, tuple[Published, ...]], metric: str) -> Grid:
    """Return published numbers alone: a row for each backbone, test set and system, a column for shots."""
    columns = sorted({place[3] for place in places}, key=lambda shots: float(shots) if shots.isdigit() else 1e9)
    rows: dict[tuple[str, ...], dict[str, Value]] = {}
    for (label, dataset, backbone, shots, target), numbers in places.items():
        key = (backbone, dataset if target == dataset else f"{dataset}, {target}", label)
        rows.setdefault(key, {})[shots] = Value("missing", published=numbers, note="published only")
    ordered = sorted(rows, key=lambda key: (key[0], key[1].startswith(AVERAGE), key[1]))
    words = "" if metric == "accuracy" else f": {metric_name(metric)}"
    return Grid(
        id=f"published-{metric}",
        title=f"Published, with nothing of ours to compare{words}",
        keys=("backbone", "dataset", "label"),
        columns=tuple(with_key("shots", int(shots) if shots.isdigit() else shots) for shots in columns),
        rows=tuple((key, tuple(rows[key].get(shots) for shots in columns)) for key in ordered),
        notes=("numbers of other backbones, other systems, or cells that this report does not have; none is ours",),
    )


def _published(row: Mapping[Any, Any]) -> Published:
    paper = ", ".join(said(row[key]) for key in ("paper", "table") if row.get(key))
    source = "; ".join(part for part in (paper, str(row.get("source") or "")) if part)
    verified = str(row.get("verified")).lower() in ("true", "1", "1.0", "yes")
    return Published(float(row["value"]), source, verified, str(row.get("note") or ""))
