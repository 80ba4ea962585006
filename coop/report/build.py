"""From a study's plan, its runs and the published numbers to everything that its report says."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

import coop
from coop.errors import CoopError, unknown
from coop.io import track
from coop.report.beside import Beside, Literature
from coop.report.cells import Record, is_baseline, most, records_of, said, where
from coop.report.content import Bars, Curves, Detail, Grid, Report, Reproduction, Words
from coop.report.detail import Details
from coop.report.grids import make_grid
from coop.report.missing import missing_runs, unique_runs
from coop.report.panels import make_bars, make_curves
from coop.report.prompts import Prompts
from coop.report.runs import Runs
from coop.report.summary import summary
from coop.runs.study import Study, texts_of

Part = Grid | Curves | Bars | Words | Detail
KINDS = ("curves", "gains", "table", "words", "detail")


def make_report(
    study: Study,
    plan: pd.DataFrame,
    literature: Literature,
    results: Path,
    overrides: Sequence[str] = (),
    device: str = "cpu",
) -> Report:
    """Return what a study's report says, from whatever is there.

    `plan` has a row for each planned run and test set (runs.study.plan); its runs lie below `results`; `overrides` are
    those that the study was asked with. Raises CoopError for a part of the study's `show` that no report has.
    """
    builder = _Builder(study, plan, literature, results, device)
    parts = [part for show in track(study.show, "reading runs", len(study.show)) for part in builder(show)]
    parts += builder.beside.rest(str(name) for name in plan["dataset"].unique())
    records, runs = builder.records("accuracy"), builder.runs
    counted = unique_runs(records)
    done = list(dict.fromkeys(str(r["run"]) for r in counted if r["state"] == "done"))
    return Report(
        name=study.name,
        title=study.title,
        reproduces=study.reproduces,
        about=study.about,
        summary=tuple(summary(records, _main(study, records))),
        planned=len(counted),
        done=sum(r["state"] == "done" for r in counted),
        failed=sum(r["state"] == "failed" for r in counted),
        made=datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        versions=(("report", f"coop {coop.__version__}"), *((f"runs: {k}", v) for k, v in runs.versions(done))),
        parts=tuple(parts),
        reproductions=tuple(_reproduction(row) for row in literature.reproductions.to_dict("records")),
        missing=tuple(missing_runs(records, study.name, overrides)),
        notes=tuple(dict.fromkeys([*builder.comparison(), *builder.notes])),
    )


class _Builder:
    """Makes the parts of one report; what several parts need is read once."""

    def __init__(self, study: Study, plan: pd.DataFrame, literature: Literature, results: Path, device: str) -> None:
        self._plan, self.runs, self.beside = plan, Runs(results), Beside(literature.numbers)
        self._records: dict[str, list[Record]] = {}
        self._ids: set[str] = set()
        self.whole = _own_datasets(study)
        self.labels = list(dict.fromkeys(str(label) for label in plan["label"]))
        self.backbones = list(dict.fromkeys(said(name) for name in plan["backbone"]))
        self.notes: list[str] = []
        self._details, self._prompts = Details(self.runs), Prompts(self.runs, literature.words, device)

    def records(self, value: str) -> list[Record]:
        """Return the plan's rows with the differences of a metric, and whether their split is the official one."""
        if value not in self._records:
            self._records[value] = [
                {**record, "unofficial": record["state"] == "done" and self.runs.unofficial(str(record["run"]))}
                for record in records_of(self._plan, value)
            ]
        return self._records[value]

    def __call__(self, show: Mapping[str, Any]) -> list[Part]:
        """Return the parts that an entry of `show` asks for; what cannot be made becomes a note."""
        kind = str(show["kind"])
        if kind not in KINDS:
            raise unknown("kind of a report's part", kind, KINDS)
        wanted = [show[key] for key in ("label", "baseline") if key in show]
        gone = [label for label in wanted if label not in self.labels]
        if gone:
            self.notes.append(f"{kind}: the series {', '.join(map(repr, gone))} is not among those asked for")
            return []
        records = self.records(str(show.get("value", "accuracy")))
        show = self._asked(show, records)
        id = self._id(kind, show)
        try:
            if kind == "curves":
                return [make_curves(records, show, self.beside, self.whole, id)]
            if kind == "gains":
                return [make_bars(records, show, self.beside, id)]
            if kind == "table":
                return [make_grid(records, show, self.beside, self.whole, id)]
        except KeyError as error:
            raise CoopError(
                f"a {kind} of the study's `show` lacks or misnames the key {error}: {dict(show)}"
            ) from error
        made, notes = (self._prompts if kind == "words" else self._details)(records, show)
        self.notes += notes
        return list(made)

    def _asked(self, show: Mapping[str, Any], records: Sequence[Record]) -> Mapping[str, Any]:
        """Return `show` with the most shots, or the first seed, in place of ones that nobody asked for."""
        conditions = dict(show.get("where", {}))
        trained = [r for r in records if r["label"] == show.get("label", r["label"]) and r["shots"] != 0]
        for key, choose in (("shots", most), ("seed", min)):
            planned = [r[key] for r in trained]
            if planned and key in conditions and not where(trained, {key: conditions[key]}):
                wanted, conditions[key] = said(conditions[key]), choose(planned)
                self.notes.append(f"{show['kind']}: {key}={conditions[key]}, since {key}={wanted} was not asked for")
        return {**show, "where": conditions} if "where" in show else show

    def _id(self, kind: str, show: Mapping[str, Any]) -> str:
        base = re.sub(r"\W+", "-", str(show.get("title") or kind).lower()).strip("-")
        id, number = base, 1
        while id in self._ids:
            number += 1
            id = f"{base}-{number}"
        self._ids.add(id)
        return id

    def comparison(self) -> list[str]:
        """Say why nothing published stands beside our numbers, where that is so."""
        there = self.beside.backbones()
        if there and not set(there) & set(self.backbones):
            told = (
                f"published numbers are for {', '.join(there)}: there are none to compare {', '.join(self.backbones)}"
            )
            return [f"{told} with"]
        if there and any(r["unofficial"] or r["own_split"] for r in self.records("accuracy")):
            return ["runs without the official split files are not compared with published numbers"]
        return []


def _own_datasets(study: Study) -> list[str]:
    """Return the datasets that the study's own file names: published averages are over these."""
    names: dict[str, None] = {}
    for grid in (study.grid, *(series.grid for series in study.series)):
        names |= dict.fromkeys(texts_of(grid.get("dataset", [])))
    return list(names)


def _main(study: Study, records: Sequence[Record]) -> str | None:
    """Return the series that the study is about: that of its bars or details, else the first of CoOp."""
    labels = list(dict.fromkeys(str(r["label"]) for r in records))
    named = [str(show[key]) for show in study.show for key in ("label", "baseline") if show.get(key) in labels]
    learned = [str(r["label"]) for r in records if r["method"] == "coop"]
    others = {str(r["label"]) for r in records if not is_baseline(r)}
    return next((label for label in [*named, *learned, *labels] if label in others), None)


def _reproduction(row: Mapping[Any, Any]) -> Reproduction:
    return Reproduction(**{key: str(row[key]) for key in ("what", "published", "reproduced", "source", "note")})
