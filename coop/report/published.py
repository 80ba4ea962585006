"""Published numbers that a study shows beside its own, and what others report of reproducing them.

`experiments/published/README.md` says what its files hold. In every row here `verified` is False where the `source`
says UNVERIFIED: the number was recalled and never checked, and is no target.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coop.errors import CoopError
from coop.io import resource_folder
from coop.report.frame import AVERAGE, OWN, Cell, Published, text_of

FOLDER = "experiments/published"
ORIGIN = ("paper", "table", "source", "verified", "note")
COLUMNS = ("label", "dataset", "backbone", "shots", "target", "metric", "value", *ORIGIN)
WORDS = ("label", "dataset", "backbone", "shots", "position", "word", "distance", *ORIGIN)
REPRODUCTIONS = ("studies", "what", "published", "reproduced", "source", "note")
FILES = {
    "systems": ("system", "paper", "table", "method", "settings", "source", "note"),
    "values": ("system", "dataset", "backbone", "shots", "target", "metric", "value", "source", "note"),
    "shown": ("study", "label", "system", "only"),
    "words": tuple(name for name in WORDS if name != "verified"),
    "reproductions": REPRODUCTIONS,
}
METRICS = ("accuracy", "gain")


Place = tuple[str, str, str, str, str]  # label, dataset, backbone, shots, target


class Publications:
    """The published numbers of a study, found by what they are numbers of; remembers which of them were shown."""

    def __init__(self, numbers: pd.DataFrame | None = None, unverified: bool = False) -> None:
        self._numbers: dict[str, dict[Place, list[Published]]] = {}
        self._shown: set[Place] = set()
        rows = [] if numbers is None else numbers.astype(object).where(numbers.notna(), None).to_dict("records")
        for row in rows:
            if not (row["verified"] or unverified):
                continue
            dataset = text_of(row["dataset"])
            target = text_of(row.get("target") or dataset)
            place = (text_of(row["label"]), dataset, text_of(row["backbone"] or None), text_of(row["shots"]), target)
            paper = ", ".join(str(row[key]) for key in ("paper", "table") if row.get(key))
            source = "; ".join(part for part in (paper, str(row.get("source") or "")) if part)
            one = Published(float(row["value"]), source, bool(row["verified"]), str(row.get("note") or ""))
            self._numbers.setdefault(str(row.get("metric") or "accuracy"), {}).setdefault(place, []).append(one)
        for places in self._numbers.values():
            for found in places.values():
                found.sort(key=lambda number: not number.verified)

    def of(self, cell: Cell, metric: str = "accuracy") -> tuple[Published, ...]:
        """Return what is published of a cell or an average; nothing where a split is not the official one."""
        averaged = cell.keys.get("dataset") == AVERAGE
        if not self._numbers or not cell.comparable or (averaged and not cell.complete):
            return ()
        dataset = AVERAGE if averaged else text_of(cell.get("dataset"))
        place = self._place({key: cell.get(key) for key in ("label", "backbone", "shots", "target")}, dataset)
        self._shown.add(place)
        return tuple(self._numbers.get(metric, {}).get(place, ()))

    def others(
        self, cells: Sequence[Cell], keys: Iterable[str], metric: str = "accuracy"
    ) -> list[tuple[dict[str, Any], tuple[Published, ...]]]:
        """Return (what it is of, numbers) of systems that are not ours, where they fit a table or figure of `keys`.

        They are on our backbones; a key that the table does not have must be the same as that of all its cells.
        """
        ours = {text_of(cell.get("label")) for cell in cells}
        same = {
            key: {text_of(cell.get(key)) for cell in cells}
            for key in ("dataset", "backbone", "shots", "target")
            if key not in keys or key == "backbone"
        }
        if "dataset" in keys:
            same.pop("target", None)
        out = []
        for place, numbers in self._numbers.get(metric, {}).items():
            about: dict[str, Any] = dict(zip(("label", "dataset", "backbone", "shots", "target"), place, strict=True))
            if place[0] in ours or any(about[key] not in allowed for key, allowed in same.items()):
                continue
            if about["shots"].isdigit():
                about["shots"] = int(about["shots"])
            out.append((about, tuple(numbers)))
        return out

    def mark_shown(self, about: Mapping[str, Any]) -> None:
        """Remember that a part of the report shows the numbers of a place."""
        self._shown.add(self._place(about, text_of(about["dataset"])))

    def backbones(self) -> list[str]:
        """Return the backbones that something is published of."""
        return list(dict.fromkeys(place[2] for places in self._numbers.values() for place in places if place[2] != "-"))

    def rest(self, datasets: Iterable[str]) -> dict[str, dict[Place, tuple[Published, ...]]]:
        """Return {metric: {place: numbers}} of what no part of the report has shown, on these datasets."""
        there = {*datasets, AVERAGE}
        found = {
            metric: {p: tuple(n) for p, n in places.items() if p not in self._shown and p[1] in there}
            for metric, places in self._numbers.items()
        }
        return {metric: places for metric, places in found.items() if places}

    def _place(self, about: Mapping[str, Any], dataset: str) -> Place:
        target = about.get("target")
        texts = (text_of(about.get(key)) for key in ("backbone", "shots"))
        return (text_of(about.get("label")), dataset, *texts, text_of(target) if target not in (None, OWN) else dataset)  # type: ignore[return-value]


def published(study: str) -> pd.DataFrame:
    """Return the published numbers that the study shows: COLUMNS, a row each; empty if there are none.

    `shots` is 0 where nothing is trained, or `all`; `target` names a test set as results do. `backbone` is empty where
    the source does not say it. Raises CoopError for a damaged file.
    """
    shown = _read("shown")
    shown = shown[shown["study"] == study]
    if shown.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    systems = _read("systems")
    values = _read("values", {"shots": _shots, "metric": _metric, "value": float})
    for name, found in (("shown", set(shown["system"])), ("values", set(values["system"]))):
        if unknown_systems := sorted(found - set(systems["system"])):
            raise CoopError(f"{_path(name)} has the system '{unknown_systems[0]}', which systems.csv does not have")
    parts = []
    for row in shown.to_dict("records"):
        part = values[values["system"] == row["system"]]
        for condition in filter(None, str(row["only"]).split("; ")):
            key, _, allowed = condition.partition("=")
            if key not in values:
                raise CoopError(f"{_path('shown')}: '{condition}' is not of the form key=value value")
            part = part[part[key].astype(str).isin(allowed.split())]
        parts.append(part.assign(label=str(row["label"])))
    rows = pd.concat(parts).merge(systems, on="system", suffixes=("", "_of_system"))
    for key in ("source", "note"):
        rows[key] = rows[key].where(rows[key] != "", rows[f"{key}_of_system"])
    return _with_verified(rows)[list(COLUMNS)]


def published_words() -> pd.DataFrame:
    """Return the published words nearest to learned contexts: WORDS, a row for each vector, `position` from 1.

    `distance` is Euclidean, NaN where none was printed. Raises CoopError for a damaged file.
    """
    return _with_verified(_read("words", {"shots": _shots, "position": int, "distance": _maybe}))[list(WORDS)]


def reproductions(study: str) -> pd.DataFrame:
    """Return what others report of reproducing the study's published numbers: REPRODUCTIONS, all text."""
    rows = _read("reproductions")
    return rows[[study in studies.split() for studies in rows["studies"]]].reset_index(drop=True)


def _path(name: str) -> Path:
    return resource_folder(FOLDER) / f"{name}.csv"


def _read(name: str, kinds: dict[str, Callable[[str], Any]] | None = None) -> pd.DataFrame:
    """Return a file of FILES, its columns converted by `kinds`; raises CoopError for a damaged one."""
    path, columns = _path(name), FILES[name]
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file, strict=True)
    except (ValueError, OSError, csv.Error) as error:
        raise CoopError(f"{path} cannot be read ({error}): install the toolkit again") from error
    if tuple(header) != columns:
        raise CoopError(f"{path} has the columns {', '.join(header)}: it must have {', '.join(columns)}")
    for line, values in enumerate(lines, start=2):
        if len(values) != len(columns):
            raise CoopError(f"{path}, line {line}: {len(values)} values for {len(columns)} columns")
    rows = pd.DataFrame(lines, columns=header, dtype=str)
    for column, kind in (kinds or {}).items():
        converted = []
        for line, text in enumerate(rows[column], start=2):
            try:
                converted.append(kind(text))
            except ValueError as error:
                raise CoopError(f"{path}, line {line}: {column} is {text!r} ({error})") from error
        rows[column] = pd.Series(converted, dtype=object if column == "shots" else None)
    return rows


def _with_verified(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column `verified`."""
    return rows.assign(verified=~rows["source"].str.contains("UNVERIFIED"))


def _shots(text: str) -> int | str:
    return text if text == "all" else int(text)


def _maybe(text: str) -> float:
    return float(text or "nan")


def _metric(text: str) -> str:
    if text not in METRICS:
        raise ValueError(f"none of {', '.join(METRICS)}")
    return text
