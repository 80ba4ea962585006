"""`coop report`: from a study's runs to its report, and the files of it: one page, tables and figures."""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

import coop
from coop.errors import CoopError, unknown
from coop.io import track, write_text
from coop.report.detail import Detail, Details, Runs
from coop.report.figures import (
    FORMATS,
    Bars,
    Curves,
    bars_spec,
    curves_spec,
    make_bars,
    make_curves,
    reliability_figure,
    styles_of,
    write_figure,
)
from coop.report.frame import (
    Plan,
    Published,
    Value,
    dividing,
    heading,
    measured,
    planned,
    select,
    text_of,
    where,
    with_difference,
)
from coop.report.page import Made, Report, write_page
from coop.report.published import Publications, published, published_words, reproductions
from coop.report.summary import facts, main_series, missing_runs, sentences, unique_runs
from coop.report.tables import Grid, shown, study_grid, to_csv, to_latex, to_markdown
from coop.report.words import ReportWords, Words
from coop.runs.store import StoredRun, stored_runs
from coop.runs.study import (
    CurvesPart,
    GainsPart,
    Part,
    Series,
    Study,
    TablePart,
    WordsPart,
    command_of,
    load_study,
    planned_runs,
    study_names,
)

MANIFEST = ".files.json"  # what the last report wrote: what this one does not write again is removed
PAGE = "index.html"


def report_command(name: str, overrides: Sequence[str], output: Path | None, unverified: bool = False) -> list[Path]:
    """Write the report of a study, or of a results folder, into `output` (reports/NAME); return its files, page first.

    Raises CoopError if there is no such study or folder, or if nothing is done; what is missing is shown as missing.
    """
    folder = Path(name)
    if name in study_names():
        study = load_study(name)
        asked = planned_runs(study, overrides)
        plan: Plan = [(run.label, run.key, run.reported) for run in asked]
        results = asked[0].config.results
        if not results.is_dir():
            raise CoopError(f"there is no results folder {results}: name it (results=FOLDER), or run something first")
        runs = stored_runs(results)
    elif folder.is_dir():
        results, runs = folder, stored_runs(folder)
        study, plan = own_study(folder, runs, overrides)
    else:
        raise CoopError(f"{unknown('study', name, study_names())}, or a folder of runs, and there is no folder {name}")
    command = shlex.join(["coop", "report", name, *overrides])
    report = make_report(study, plan, runs, results, overrides, command, unverified)
    if not report.done:
        run = command_of(study.name, overrides)
        raise CoopError(f"nothing of the study {name} is done in {results} yet: {run}")
    for place, reason in report.damaged:
        print(f"coop: left out as damaged: {place}: {reason}", file=sys.stderr)
    return write_report(report, output or Path("reports") / (name if name in study_names() else folder.resolve().name))


def own_study(folder: Path, runs: Sequence[StoredRun], conditions: Sequence[str]) -> tuple[Study, Plan]:
    """Return a study of whatever lies in a results folder, its runs labelled by method and what else differs.

    `conditions` choose runs, as `coop table --where` does. Raises CoopError if no run is finished.
    """
    frame = measured(runs, folder)
    kept = set(select(frame, conditions)["run"])
    frame = frame[frame["run"].isin(kept)]
    more = dividing(frame, ["dataset", "backbone", "precision", "protocol", "method", "shots", "target"])
    label_of = {}
    for row in frame.drop_duplicates("run").to_dict("records"):
        rest = [f"{key}={text_of(row[key], 'null')}" for key in more if row[key] is not None]
        label_of[row["run"]] = ", ".join([shown("method", str(row["method"])), *rest])
    plan = [
        (label_of[name], run.key, tuple(run.accuracies))
        for run in runs
        if (name := run.folder.relative_to(folder).as_posix()) in kept and run.key
    ]
    several = len(set(frame["target"]) - set(frame["dataset"])) > 0
    show: list[Part] = []
    for protocol, some in frame.groupby("protocol", sort=False):
        condition = {"protocol": protocol} if frame["protocol"].nunique() > 1 else {}
        if some["shots"].nunique() > 1 and protocol == "all_classes":
            show.append(CurvesPart(where=condition))
        columns = ["target"] if several and (some["target"] != some["dataset"]).any() else ["shots"]
        title = str(protocol).replace("_", " ") if condition else "Accuracy"
        show.append(TablePart(title, where=condition, rows=["dataset", "label"], columns=columns))
    labels = tuple(Series(label, {}) for label in dict.fromkeys(label_of.values()))
    name = folder.resolve().name
    return Study(name, f"Results in {name}", "", "", {}, labels, tuple(show)), plan


def make_report(
    study: Study,
    plan: Plan,
    runs: Sequence[StoredRun],
    results: Path,
    overrides: Sequence[str] = (),
    command: str = "",
    unverified: bool = False,
) -> Report:
    """Return what a study's report says, from whatever is there of its planned runs."""
    frame = planned(plan, runs, results)
    numbers = Publications(published(study.name), unverified)
    stored = Runs(results, runs)
    builder = _Parts(study, frame, numbers, stored, unverified)
    parts = [part for show in track(study.show, "reading runs", len(study.show)) for part in builder(show)]
    parts += rest_grids(numbers, map(str, frame["dataset"].unique()))
    counted = unique_runs(frame)
    done = counted[counted["state"] == "done"]
    named = [getattr(show, key, "") for show in study.show for key in ("label", "baseline")]
    versions: dict[str, dict[str, None]] = {}
    for run in dict.fromkeys(done["run"]):
        for name, version in stored[str(run)].versions.items():
            versions.setdefault(name, {})[str(version)] = None
    return Report(
        name=study.name,
        title=study.title,
        reproduces=study.reproduces,
        about=study.about,
        facts=tuple(facts(frame, command)),
        summary=tuple(sentences(with_difference(frame), main_series(frame, named))),
        planned=len(counted),
        done=len(done),
        failed=int((counted["state"] == "failed").sum()),
        made=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        versions=(("report", f"coop {coop.__version__}"), *((f"runs: {k}", ", ".join(v)) for k, v in versions.items())),
        parts=tuple(parts),
        reproductions=tuple(
            {str(k): str(v) for k, v in r.items()} for r in reproductions(study.name).to_dict("records")
        ),
        missing=tuple(missing_runs(frame, study.name, overrides)) if study.name in study_names() else (),
        damaged=tuple((run.folder.as_posix(), run.error or "") for run in runs if run.state == "damaged"),
        notes=tuple(dict.fromkeys([*_comparison(numbers, frame), *builder.notes])),
    )


class _Parts:
    """Makes the parts of one report; what several parts need is read once."""

    def __init__(self, study: Study, frame: pd.DataFrame, numbers: Publications, runs: Runs, unverified: bool) -> None:
        self._frame, self._numbers = frame, numbers
        self._frames: dict[str, pd.DataFrame] = {}
        self._ids: set[str] = set()
        grids = [study.grid, *(series.grid for series in study.series)]
        named = [grid["dataset"] for grid in grids if "dataset" in grid]
        self._datasets = list(dict.fromkeys(str(n) for v in named for n in (v if isinstance(v, list) else [v])))
        self._details = Details(runs)
        self._words = ReportWords(runs.results, published_words(), unverified=unverified)
        self.notes: list[str] = []

    def __call__(self, show: Part) -> list[Made]:
        """Return the parts that an entry of `show` asks for; what cannot be made becomes a note."""
        wanted = [label for key in ("label", "baseline") if (label := getattr(show, key, ""))]
        gone = [label for label in wanted if label not in set(self._frame["label"])]
        kind = type(show).__name__.removesuffix("Part").lower()
        if gone:
            self.notes.append(f"{kind}: the series {', '.join(map(repr, gone))} is not among those asked for")
            return []
        if show.value not in self._frames:
            self._frames[show.value] = with_difference(self._frame, show.value)
        frame = self._frames[show.value]
        show = self._asked(show, frame, kind)
        id = self._id(show.title or kind)
        if isinstance(show, CurvesPart):
            return [make_curves(frame, show, self._numbers, self._datasets, id)]
        if isinstance(show, GainsPart):
            return [make_bars(frame, show, self._numbers, id)]
        if isinstance(show, TablePart):
            return [study_grid(frame, show, self._numbers, self._datasets, id)]
        made: Sequence[Made]
        made, notes = self._words(frame, show) if isinstance(show, WordsPart) else self._details(frame, show)  # type: ignore[arg-type]
        self.notes += notes
        return list(made)

    def _asked(self, show: Part, frame: pd.DataFrame, kind: str) -> Part:
        """Return `show` with the most shots, or the first seed, in place of ones that nobody asked for."""
        conditions = dict(show.where)
        label = getattr(show, "label", "")
        trained = frame[frame["shots"].map(lambda shots: shots != 0)]
        trained = trained[trained["label"] == label] if label else trained
        for key in ("shots", "seed"):
            values = list(trained[key])
            if values and key in conditions and where(trained, {key: conditions[key]}).empty:
                most = max(values, key=lambda shots: float("inf") if shots == "all" else float(shots))
                was, conditions[key] = conditions[key], most if key == "shots" else min(values)
                self.notes.append(f"{kind}: {key}={conditions[key]}, since {key}={was} was not asked for")
        return replace(show, where=conditions)

    def _id(self, title: str) -> str:
        base = re.sub(r"\W+", "-", title.lower()).strip("-")[:60] or "part"
        id = next(name for i in range(1, 999) if (name := base + f"-{i}" * (i > 1)) not in self._ids)
        self._ids.add(id)
        return id


def _comparison(numbers: Publications, frame: pd.DataFrame) -> Iterator[str]:
    """Say why nothing published stands beside our numbers, where that is so."""
    there, ours = numbers.backbones(), list(dict.fromkeys(map(str, frame["backbone"])))
    if there and not set(there) & set(ours):
        theirs = ", ".join(shown("backbone", name) for name in there)
        yield f"published numbers are for {theirs}: there are none to compare {', '.join(ours)} with"
    elif there and (frame["own_split"].astype(bool) | frame["unofficial"].astype(bool)).any():
        yield "runs without the official split files are not compared with published numbers"


def rest_grids(numbers: Publications, datasets: Sequence[str] | Any) -> list[Grid]:
    """Return tables of the published numbers that no other part shows: other backbones', and other systems'."""
    grids = []
    for metric, places in numbers.rest(datasets).items():
        columns = sorted({place[3] for place in places}, key=lambda shots: float(shots) if shots.isdigit() else 1e9)
        rows: dict[tuple[str, ...], dict[str, Value]] = {}
        for (label, dataset, backbone, shots, target), found in places.items():
            key = (backbone, dataset if target == dataset else f"{dataset}, {target}", label)
            rows.setdefault(key, {})[shots] = Value("missing", published=found, note="published only")
        ordered = sorted(rows, key=lambda key: (key[0], key[1].startswith("average"), key[1]))
        words = "" if metric == "accuracy" else f": {metric}"
        grids.append(
            Grid(
                id=f"published-{metric}",
                title=f"Published, with nothing of ours to compare{words}",
                keys=("backbone", "dataset", "label"),
                columns=tuple(heading("shots", int(shots) if shots.isdigit() else shots) for shots in columns),
                rows=tuple((key, tuple(rows[key].get(shots) for shots in columns)) for key in ordered),
                notes=("numbers of other backbones, other systems, or cells that this report lacks; none is ours",),
            )
        )
    return grids


# Files.


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the page, `figures/` and `tables/`, each file atomically; return their paths, the page first.

    Files of an earlier report in the same folder are replaced or removed; others are left alone.
    """
    if folder.exists() and not folder.is_dir():
        raise CoopError(f"{folder} is a file: give a folder to write the report into (--output FOLDER)")
    write_page(report, folder / PAGE)
    written = [folder / PAGE]
    tables = list(_tables(report))
    for name, text in tables:
        write_text(folder / "tables" / name, text)
        written.append(folder / "tables" / name)
    figures = list(_figures(report))
    for name, spec in track(figures, "writing figures", len(figures)):
        paths = [folder / "figures" / f"{name}.{form}" for form in FORMATS]
        write_figure(spec, paths)
        written += paths
    _remove_older(folder, written)
    return written


def _tables(report: Report) -> Iterator[tuple[str, str]]:
    """Yield (file name, content) of every table."""
    for part in report.parts:
        if isinstance(part, Grid):
            yield f"{part.id}.md", to_markdown(part)
            yield f"{part.id}.tex", to_latex(part)
        if isinstance(part, Grid | Curves | Bars):
            yield f"{part.id}.csv", to_csv(pd.DataFrame(list(_rows(part)), dtype=object))
    words = [part for part in report.parts if isinstance(part, Words) and part.vectors]
    shared: dict[str, list[dict[str, Any]]] = {
        "words": [
            {"prompt": w.title, "vector": i, "rank": j, "word": text, "distance": distance, "run": w.run}
            for w in words
            for i, near in enumerate(w.vectors, start=1)
            for j, (text, _, distance) in enumerate(near, start=1)
        ]
    }
    for one in report.parts:
        if isinstance(one, Detail):
            name = _slug(one)
            shared.setdefault(f"classes-{name}", []).extend(
                {"dataset": one.dataset, "class": c.name, one.baseline: c.baseline, one.label: c.learned}
                | {"gain": c.learned - c.baseline, "images": c.n}
                for c in one.classes
            )
            shared.setdefault(f"confusions-{name}", []).extend(
                {"dataset": one.dataset, **vars(confusion)} for confusion in one.confusions
            )
    for name, rows in shared.items():
        if rows:
            yield f"{name}.csv", to_csv(pd.DataFrame(rows, dtype=object))


def _rows(part: Grid | Curves | Bars) -> Iterator[dict[str, Any]]:
    """Yield a row for each cell, point or bar, and for each published number beside it."""
    if isinstance(part, Grid):
        for headers, values in part.rows:
            for column, value in zip(part.columns, values, strict=True):
                for number in (value.published or (None,)) if value is not None else ():
                    yield {**dict(zip(part.keys, headers, strict=True)), "column": column, **_row(value, number)}
    elif isinstance(part, Curves):
        for panel in part.panels:
            for line in panel.lines:
                ours, theirs = dict(line.points), dict(line.published)
                for x in sorted({*ours, *theirs}):
                    about = {"panel": panel.title, "label": line.label, "x": f"{x:g}"}
                    yield about | _row(ours.get(x) or Value("missing"), theirs.get(x))
    else:
        numbers = dict(part.published)
        for name, value in part.bars:
            yield {"name": name, **_row(value, numbers.get(name))}


def _row(value: Value | None, number: Published | None) -> dict[str, Any]:
    value = value or Value("missing")
    return {
        "state": value.state if value.planned else "not ours",
        "mean": value.mean,
        "std": value.std,
        "n": value.n,
        "planned": value.planned,
        "difference": value.difference,
        "runs": " ".join(value.runs),
        "note": "; ".join(text for text in (value.note, value.error) if text),
        "published": number.value if number else None,
        "verified": number.verified if number else None,
        "source": number.source if number else None,
    }


def _figures(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file name, description) of every figure."""
    styles = styles_of(report.parts)
    details: dict[str, list[Detail]] = {}
    for part in report.parts:
        if isinstance(part, Curves) and not all(panel.empty for panel in part.panels):
            yield part.id, curves_spec(part, styles)
        elif isinstance(part, Bars) and part.bars:
            yield part.id, bars_spec(part)
        elif isinstance(part, Detail) and part.reliability:
            details.setdefault(_slug(part), []).append(part)
    for name, some in details.items():
        yield f"reliability-{name}", reliability_figure(some, styles)


def _slug(detail: Detail) -> str:
    return re.sub(r"\W+", "-", f"{detail.label} {detail.baseline}".lower()).strip("-")


def _remove_older(folder: Path, written: Sequence[Path]) -> None:
    """Remove what the report before wrote and this one did not, then note what this one wrote."""
    manifest = folder / MANIFEST
    now = sorted(path.relative_to(folder).as_posix() for path in written)
    try:
        before = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else []
    except ValueError:
        before = []
    for name in before if isinstance(before, list) else ():
        path = Path(str(name))
        if name not in now and ".." not in path.parts and not path.is_absolute():
            (folder / path).unlink(missing_ok=True)
    write_text(manifest, json.dumps(now, indent=1) + "\n")
