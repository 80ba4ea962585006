"""Named studies: what each runs, what it reproduces, and what its report shows.

A study is a file `experiments/studies/<name>.yaml`. Its `series` are grids of runs, each with the label that tables and
curves give it; a label's {key} is replaced by a run's value. All of a file is checked when it is read.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from coop.config import RunConfig, check_keys, run_config
from coop.errors import CoopError, first_line, unknown
from coop.io import read_yaml, resource_folder
from coop.options import METHOD_NAMES, OPTIONS, flat, from_mapping
from coop.runs.grid import applied, combinations, parse, word
from coop.runs.key import RunKey
from coop.runs.protocol import protocol_named
from coop.runs.store import METRICS, StoredRun

FOLDER = "experiments/studies"


@dataclass(frozen=True)
class Part:
    """A part of a study's report. `where` keeps rows of these values, one or a list for each column."""

    title: str | None = None
    value: str = "accuracy"
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TablePart(Part):
    """A table: a row for each combination of `rows`, a column for each of `columns`."""

    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CurvesPart(Part):
    """A curve for each series against `x`, a panel for each value of `panel`; `average` adds one over all panels."""

    x: str = "shots"
    panel: str = "dataset"
    average: bool = True


@dataclass(frozen=True)
class GainsPart(Part):
    """Sorted bars: the differences of series `label` to series `baseline`, one for each value of `over`."""

    label: str = ""
    baseline: str = ""
    over: str = "dataset"


@dataclass(frozen=True)
class WordsPart(Part):
    """The words nearest to the context vectors that series `label` learned."""

    label: str = ""


@dataclass(frozen=True)
class DetailPart(Part):
    """Series `label`, class by class, against series `baseline`: gains, examples, calibration, confusions."""

    label: str = ""
    baseline: str = ""


KINDS: dict[str, type[Part]] = {
    "table": TablePart,
    "curves": CurvesPart,
    "gains": GainsPart,
    "words": WordsPart,
    "detail": DetailPart,
}


@dataclass(frozen=True)
class Series:
    """A grid: every combination of the values of `grid`, under one label."""

    label: str
    grid: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study. `grid` is what all series share; a series' own grid wins. `show` is what the report has, in order."""

    name: str
    title: str
    reproduces: str  # paper, table or figure
    about: str  # what is compared and what to expect, for people
    grid: dict[str, Any]
    series: tuple[Series, ...]
    show: tuple[Part, ...]

    def grid_of(self, series: Series) -> dict[str, list[Any]]:
        """Return the values of each key of a series."""
        return {k: v if isinstance(v, list) else [v] for k, v in (self.grid | series.grid).items()}

    def size(self) -> int:
        """Return the number of its runs, each once per label."""
        return sum(len(applied(combinations(self.grid_of(series)))[0]) for series in self.series)


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: its series, its key without digests of data, the columns that it reports, how to ask for it."""

    label: str
    key: RunKey
    reported: tuple[str, ...]
    job: Mapping[str, Any]
    config: RunConfig

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the words of the command line that ask for it."""
        return tuple(word(key, value) for key, value in self.job.items())


def study_names() -> list[str]:
    """Return the names of all studies."""
    return sorted(path.stem for path in resource_folder(FOLDER).glob("*.yaml"))


def load_study(name: str) -> Study:
    """Return the study called `name`. Raises CoopError for an unknown name, and for a file that is not a study."""
    if name not in study_names():
        raise unknown("study", name, study_names())
    return read_study(resource_folder(FOLDER) / f"{name}.yaml")


@dataclass
class _Series:
    label: str
    grid: dict[str, Any]


@dataclass
class _File:
    name: str
    title: str
    reproduces: str
    about: str
    grid: dict[str, Any]
    series: list[_Series]
    show: list[dict[str, Any]] = field(default_factory=list)


def read_study(path: Path) -> Study:
    """Return the study of a file. Raises CoopError with what is wrong with it."""
    try:
        file = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_File), read_yaml(path)))
        assert isinstance(file, _File)
        series = tuple(Series(one.label, one.grid) for one in file.series)
        parts = tuple(_part(part) for part in file.show)
        study = Study(file.name, file.title, file.reproduces, file.about, file.grid, series, parts)
        for fault in _faults(study, path.stem):
            raise CoopError(fault)
    except CoopError as error:
        raise CoopError(f"{path} is not a study: {error}") from error
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, OSError) as error:
        raise CoopError(f"{path} is not a study: {first_line(error)}") from error
    return study


def _part(keys: Mapping[str, Any]) -> Part:
    kind = str(keys.get("kind"))
    if kind not in KINDS:
        raise unknown("kind in `show`", kind, KINDS)
    names = [f.name for f in dataclasses.fields(KINDS[kind])]
    for key in keys:
        if key != "kind" and key not in names:
            raise unknown(f"key of kind {kind} in `show`", key, names)
    return from_mapping(KINDS[kind], {key: value for key, value in keys.items() if key != "kind"}, kind)


def _faults(study: Study, stem: str) -> Iterator[str]:
    """Yield what is wrong with a study."""
    if study.name != stem:
        yield f"its name is '{study.name}', not that of the file"
    if not study.series:
        yield "it has no series"
    labels = [series.label for series in study.series]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"two series are labelled '{label}'"
    for series in study.series:
        for key, values in (study.grid | series.grid).items():
            check_keys([key])
            if isinstance(values, Mapping) or values == []:
                yield f"series '{series.label}': {key} is {values}, not a value or a list of values"
        for method in study.grid_of(series).get("method", []):
            if method not in OPTIONS:
                raise unknown("method", str(method), OPTIONS)
    for part in study.show:
        yield from _part_faults(part, labels)


def _part_faults(part: Part, labels: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a part of `show`: labels of no series, columns that no run has."""
    if part.value not in METRICS:
        raise unknown("value in `show`", part.value, METRICS)
    named = [getattr(part, name) for name in ("label", "baseline") if hasattr(part, name)]
    wanted = part.where.get("label", [])
    for label in [*named, *(wanted if isinstance(wanted, list) else [wanted])]:
        if not any(re.fullmatch(_label_pattern(template), str(label)) for template in labels):
            raise unknown("label in `show`", str(label), labels)
    columns = list(part.where)
    if isinstance(part, TablePart):
        columns += [*part.rows, *part.columns]
        if not part.rows or not part.columns:
            yield "a table in `show` needs rows and columns"
    if isinstance(part, CurvesPart):
        columns += [part.x, part.panel]
    if isinstance(part, GainsPart):
        columns += [part.over]
    for column in columns:
        if column not in study_columns():
            raise unknown("column in `show`", column, study_columns())


@cache
def study_columns() -> tuple[str, ...]:
    """Return the columns that a study's rows may have: label, target, and what tells runs apart."""
    key = [f.name for f in dataclasses.fields(RunKey) if f.name not in ("options", "targets", "data")]
    options = {name for kind in OPTIONS.values() for name in flat(vars(kind()))}
    return ("label", "target", *key, *sorted(options))


def _label_pattern(label: str) -> str:
    """Return the regular expression of the labels that a series' label becomes."""
    return ".+".join(re.escape(text) for text in re.split(r"\{[\w.]+\}", label))


def planned_runs(study: Study, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Return the runs of a study, each once per label.

    A key in `overrides` takes the place of the grids' own values in every series that uses it; `method` selects from
    the series' methods instead. Raises CoopError for an override that no series can use.
    """
    given = {assignment.key: list(assignment.values) for assignment in parse(overrides)}
    wanted = given.pop("method", None)
    jobs: list[tuple[str, dict[str, Any]]] = []
    used: set[str] = set()
    for series in study.series:
        grid = study.grid_of(series)
        methods = [m for m in grid.get("method", ["coop"]) if wanted is None or m in wanted]
        if not methods:
            continue
        kept, _ = applied(combinations({**grid, **given, "method": methods}), series.grid)
        jobs += [(series.label, job) for job in kept]
        used.update(*kept)
    if not jobs:
        names = {str(m) for series in study.series for m in study.grid_of(series).get("method", ["coop"])}
        raise unknown(f"method of study {study.name}", ",".join(map(str, wanted or ())), names)
    for name in given:
        if name not in used:
            raise CoopError(f"{name}: no method of study {study.name} that is asked for uses it")
    planned: dict[tuple[str, RunKey], PlannedRun] = {}
    for label, job in jobs:
        config = run_config(job)
        if config.sample_file:
            raise CoopError("sample_file=... belongs to one run: a study draws its samples by shots and seed")
        key = RunKey.of(config)
        label = _fill(label, key, study.name)
        targets = [target.name for target in config.protocol.targets]
        reported = protocol_named(key.protocol).reported(key.dataset, targets)
        planned.setdefault((label, key), PlannedRun(label, key, reported, job, config))
    return list(planned.values())


def _fill(label: str, key: RunKey, study: str) -> str:
    """Return a series' label with each {key} replaced by the run's value, a method by its papers' name."""
    if "{" not in label:
        return label
    values = key.columns()

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise CoopError(f"study {study}: the label '{label}' asks for {match[0]}, which {key.method} lacks")
        text = str(values[match[1]])
        return METHOD_NAMES.get(text, text) if match[1] == "method" else text

    return re.sub(r"\{([\w.]+)\}", value, label)


def split_experiment(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the study that `+experiment=NAME` names, if there is one, and the other words."""
    chosen = [text for text in words if re.match(r"\+{0,2}experiment=", text)]
    names = [text.split("=", 1)[1] for text in chosen]
    if len(names) > 1 or any("," in name or not name for name in names):
        raise CoopError(f"{' '.join(chosen)}: a sweep runs one study; name one, and start the others after it")
    return (names[0] if names else None), [text for text in words if text not in chosen]


def match_runs(planned: Sequence[PlannedRun], stored: Sequence[StoredRun]) -> list[StoredRun | None]:
    """Return what is stored of each planned run: the newest that is done, else the failed one, else None."""
    found: dict[RunKey, StoredRun] = {}
    for run in stored:
        if run.key is not None and run.state != "damaged":
            key = run.key.planned()
            other = found.get(key)
            if other is None or (run.state == "done", run.finished) >= (other.state == "done", other.finished):
                found[key] = run
    return [found.get(run.key) for run in planned]


@dataclass(frozen=True)
class TimeLeft:
    """Seconds of one process for the runs that are not done, as far as they can be estimated."""

    seconds: float
    estimated: int
    unknown: int  # runs without a finished one of their kind


def time_left(runs: Iterable[tuple[RunKey, float | None]]) -> TimeLeft:
    """Estimate from the seconds of runs that are done (None: not done) how long the others take.

    By runs that differ in their seed alone, else scaled by shots and epochs. A run on another dataset, backbone or
    method, or with another option, says nothing about this one.
    """
    runs = list(runs)
    same: dict[str, list[float]] = {}
    near: dict[str, list[tuple[float, float]]] = {}
    for key, seconds in runs:
        if seconds is not None:
            same.setdefault(_without(key, "seed"), []).append(seconds)
            near.setdefault(_without(key, "seed", "shots", "epochs"), []).append((_work(key), seconds))
    times = [_estimate(key, same, near) for key, seconds in runs if seconds is None]
    known = [seconds for seconds in times if seconds is not None]
    return TimeLeft(float(sum(known)), len(known), len(times) - len(known))


def _estimate(
    key: RunKey, same: Mapping[str, list[float]], near: Mapping[str, list[tuple[float, float]]]
) -> float | None:
    if found := same.get(_without(key, "seed")):
        return fmean(found)
    work = _work(key)
    measured = [pair for pair in near.get(_without(key, "seed", "shots", "epochs"), []) if pair[0] and work]
    if not measured:
        return None
    other, seconds = min(measured, key=lambda pair: abs(pair[0] - work))
    return seconds * work / other


def _work(key: RunKey) -> float:
    """Return what a run's time grows with, on one dataset: images seen; 0 where that is not known (shots=all)."""
    return float(key.shots * (getattr(key.options, "epochs", None) or 1)) if isinstance(key.shots, int) else 0.0


def _without(key: RunKey, *names: str) -> str:
    return json.dumps({name: value for name, value in key.as_dict().items() if name not in names}, sort_keys=True)


def command_of(study: str, overrides: Sequence[str]) -> str:
    """Return the command that runs a study, or a part of it, as a shell takes it."""
    return shlex.join(["coop", "run", "-m", f"+experiment={study}", *overrides])
