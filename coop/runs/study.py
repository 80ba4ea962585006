"""Named studies: what each runs, what it reproduces, and which of its runs are there.

A study is a file `experiments/studies/<name>.yaml`. Its `series` are grids of runs, each with the label that tables and
curves give it; a label's {key} is filled in from a run's configuration.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from coop.errors import CoopError, unknown
from coop.io import read_json, resource_folder
from coop.runs.store import FAILURE, RESULT, shelf

FOLDER = "experiments/studies"
MEASURED = ("accuracy", "macro_f1", "ece", "mean_confidence", "n")


@dataclass
class Series:
    """A grid: every combination of the values of `grid`, which are Hydra's keys and groups."""

    label: str
    grid: dict[str, Any]


@dataclass
class Study:
    """A study's file. `show` lists what its report has, in order (see coop/report)."""

    name: str
    title: str
    reproduces: str  # paper, table or figure
    about: str  # what is compared and what to expect, for people
    grid: dict[str, Any]  # what all series share; a series' own grid wins
    series: list[Series]
    show: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """A planned run: the series that it belongs to, what identifies it without its data, and how to ask for it."""

    label: str
    about: Mapping[str, Any]
    targets: tuple[str, ...]
    overrides: tuple[str, ...]


def study_names() -> list[str]:
    """Return the names of all studies."""
    return sorted(path.stem for path in resource_folder(FOLDER).glob("*.yaml"))


def load_study(name: str) -> Study:
    """Return the study called `name`. Raises CoopError for an unknown name, and for a file that is not a study."""
    if name not in study_names():
        raise unknown("study", name, study_names())
    return read_study(resource_folder(FOLDER) / f"{name}.yaml")


def read_study(path: Path) -> Study:
    """Return the study of a file. Raises CoopError with what is wrong with it."""
    try:
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, OSError) as error:
        raise CoopError(f"{path} is not a study: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(study, Study)
    for fault in _faults(study, path.stem):
        raise CoopError(f"{path} is not a study: {fault}")
    return study


def _faults(study: Study, stem: str) -> Iterator[str]:
    if study.name != stem:
        yield f"its name is '{study.name}', not that of the file"
    if not study.series:
        yield "it has no series"
    labels = [series.label for series in study.series]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"two series are labelled '{label}'"
    for series in study.series:
        for key, values in (study.grid | series.grid).items():
            if isinstance(values, Mapping) or values == []:
                yield f"series '{series.label}': {key} is {values}, not a value or a list of values"
    for part in study.show:
        if not isinstance(part.get("kind"), str):
            yield f"a part of `show` has no kind: {part}"


def command_of(study: str, overrides: Sequence[str]) -> str:
    """Return the command that runs a study, or a part of it, as a shell takes it."""
    return shlex.join(["coop", "run", "-m", f"+experiment={study}", *overrides])


def texts_of(values: Any) -> list[str]:
    """Return the values of a grid's key, one or a list, as the command line writes them."""
    return [_text(value) for value in (values if isinstance(values, list) else [values])]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_text(item) for item in value)}]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return str(value)
    return '"' + str(value).replace('"', '\\"') + '"'


def filled(label: str, about: Mapping[str, Any], study: str) -> str:
    """Return a series' label with each {key} replaced by the run's value."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in about:
            raise CoopError(f"study {study}: the label '{label}' asks for {match[0]}, which {about['method']} lacks")
        return str(about[match[1]])

    return re.sub(r"\{([\w.]+)\}", value, label)


def plan(cells: Sequence[Cell], results: Path) -> pd.DataFrame:
    """Return what is there of the planned runs: a row for each run and each target that it reports.

    Columns: `label`, everything in the runs' `about` but their targets, `target`, `state` (done, failed, missing),
    `error`, `run` (its folder below `results`), `seconds`, what was measured, `own_split`, `notes`, `overrides`.
    """
    there = _finished(cells, results)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        about = {key: value for key, value in cell.about.items() if key != "targets"}
        found = there.get(_key(cell.about), {"state": "missing"})
        common = {"label": cell.label, **about, "target": None, "state": found["state"], "error": found.get("error")}
        common |= {"run": found.get("run"), "seconds": found.get("seconds")} | dict.fromkeys(MEASURED)
        common |= {"own_split": found.get("own_split"), "notes": found.get("notes", ()), "overrides": cell.overrides}
        measured = found.get("measured", {})
        rows += [common | {"target": target} | measured.get(target, {}) for target in cell.targets]
    return pd.DataFrame(rows, dtype=object)  # whole numbers stay whole where others lack them


def _key(about: Mapping[str, Any]) -> str:
    """Return what a planned run and its result share."""
    shared = {key: value for key, value in about.items() if key != "data"}
    return json.dumps(shared | {"targets": sorted(about.get("targets", ()))}, sort_keys=True, default=str)


def _finished(cells: Iterable[Cell], results: Path) -> dict[str, dict[str, Any]]:
    """Return what lies on the shelves of `cells`, by identity: the newest result, else the newest failure."""
    out: dict[str, dict[str, Any]] = {}
    for folder in sorted({shelf(results, cell.about) for cell in cells}):
        for path in [*folder.glob(f"*/{FAILURE}"), *folder.glob(f"*/{RESULT}")]:
            try:
                read, file = (_result if path.name == RESULT else _failure), read_json(path)
                found = read(file) | {"run": path.parent.relative_to(results).as_posix()}
                key = _key(file["identity"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CoopError(f"{path} is not of this toolkit ({error!r}): remove it, run it again") from error
            out[key] = _newer(out.get(key), found)
    return out


def _result(file: Mapping[str, Any]) -> dict[str, Any]:
    measured = {name: {key: of[key] for key in MEASURED} for name, of in file["targets"].items()}
    measured |= {name: {"accuracy": file[name]} for name in ("harmonic_mean", "average") if name in file}
    seconds, notes = sum(file["seconds"].values()), tuple(file["notes"])
    common = {"finished": file["finished"], "own_split": file["own_split"], "notes": notes}
    return common | {"state": "done", "seconds": seconds, "measured": measured}


def _failure(file: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": "failed", "error": str(file["error"]), "finished": ""}


def _newer(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Return the result rather than the failure, and of two results the newer one, which says that there are two."""
    if one is None or one["state"] != "done" or other["state"] != "done":
        return other if one is None or other["state"] == "done" else one
    newest, older = (one, other) if one["finished"] >= other["finished"] else (other, one)
    note = f"made from other data as well: the older run is {older['run']}"
    return newest | {"notes": (*newest["notes"], note)}
