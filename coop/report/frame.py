"""The frame of a report: planned runs x measured results x published numbers, and its cells and averages.

A row of the frame is a run on one of its targets: the columns of its key, `label` (in a study), `target`, `state`
(done, missing, failed), `run` (its folder), `error`, METRICS (fractions), `own_split`, `unofficial`, `notes`. A cell is
the rows that differ in their seed alone. Cells hold percent; `n` is always the number of runs.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, Literal

import numpy as np
import pandas as pd

from coop.errors import CoopError, unknown
from coop.options import METHOD_NAMES
from coop.runs.key import RunKey
from coop.runs.store import METRICS, StoredRun

NAMES = {  # what people call what the command line names; the others stay as they are
    "imagenet": "ImageNet", "caltech101": "Caltech101", "oxford_pets": "Oxford Pets", "stanford_cars": "Stanford Cars",
    "oxford_flowers": "Oxford Flowers", "food101": "Food101", "fgvc_aircraft": "FGVC Aircraft", "sun397": "SUN397",
    "dtd": "DTD", "eurosat": "EuroSAT", "ucf101": "UCF101", "imagenetv2": "ImageNetV2", "imagenet_a": "ImageNet-A",
    "imagenet_sketch": "ImageNet-Sketch", "imagenet_r": "ImageNet-R", "fashion_mnist": "Fashion-MNIST",
    "rn50": "RN50", "rn101": "RN101", "rn50x4": "RN50x4", "rn50x16": "RN50x16", "vit_b32": "ViT-B/32",
    "vit_b16": "ViT-B/16", "vit_l14": "ViT-L/14", "vit_b16_laion2b": "ViT-B/16 (LAION-2B)",
    "vit_b16_datacomp": "ViT-B/16 (DataComp)", "vit_b16_siglip": "ViT-B/16 (SigLIP)",
    "harmonic_mean": "harmonic mean", **METHOD_NAMES,
}  # fmt: skip
NAMED_KEYS = ("dataset", "target", "method", "backbone", "column")
Plan = Sequence[tuple[str, RunKey, Sequence[str]]]  # planned runs: label, key, the columns that they report
State = Literal["done", "partial", "missing", "failed"]
METRIC_NAMES = {
    "mean_per_class_accuracy": "mean per-class accuracy", "macro_f1": "macro F1", "ece": "expected calibration error",
    "mean_confidence": "mean confidence",
}  # fmt: skip
AVERAGE, OWN = "average", "own test set"  # of an average: in place of a dataset's name, and of the target of that name
SETTINGS_LAST = ("label", "dataset", "backbone", "precision", "protocol", "method", "shots", "target")
SEEDS = ("seed", "descriptor_seed")  # a cell is the mean over them
NOT_SETTINGS = {
    *METRICS, *SEEDS, "difference", "baseline", "run", "n", "own_split", "unofficial", "notes", "overrides", "seconds",
    "state", "error", "architecture", "pretrained", "dataset_template", "run_id",
}  # fmt: skip
NAMED = 6  # more datasets than this are counted, not named
TEST_WARNING = "settings chosen on the test images (validation=test): optimistic, not comparable with the others"


@dataclass(frozen=True)
class Published:
    """A published number (percent) and where it was read; `verified` is False if it was recalled, never checked."""

    value: float
    source: str
    verified: bool
    note: str = ""


@dataclass(frozen=True)
class Value:
    """A cell: mean, deviation and difference to zero-shot in percent, over the `n` runs that are there."""

    state: State  # partial: some of the planned runs are there
    mean: float | None = None
    std: float | None = None  # over the population of runs; None for a single one
    n: int = 0
    planned: int = 0
    difference: float | None = None  # to zero-shot with the dataset's template, on the same target and backbone
    runs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    error: str = ""
    published: tuple[Published, ...] = ()
    note: str = ""
    on_test: bool = False  # some setting was chosen on the test images

    @property
    def text(self) -> str:
        """Return mean and deviation as text, or the state."""
        if self.mean is None:
            return f"failed: {self.error}" if self.state == "failed" and self.error else self.state
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


@dataclass(frozen=True)
class Cell:
    """What a cell is (`keys`), its rows of the frame, and its value; `datasets` is what an average is over."""

    keys: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    value: Value
    datasets: tuple[str, ...] = ()
    complete: bool = False  # an average over all datasets that the study itself names

    def get(self, key: str) -> Any:
        """Return the value of `key`, or None where the cell's rows differ in it."""
        if key in self.keys:
            return self.keys[key]
        values = {repr(row.get(key)): row.get(key) for row in self.rows}
        return next(iter(values.values())) if len(values) == 1 else None

    @property
    def comparable(self) -> bool:
        """Return whether all runs used the official splits, as published numbers did."""
        return not any(row.get("own_split") or row.get("unofficial") for row in self.rows)

    @property
    def baseline(self) -> bool:
        """Return whether this is zero-shot with the dataset's template: what differences are to."""
        return all(is_baseline(row) for row in self.rows)


def is_baseline(row: Mapping[Any, Any]) -> bool:
    """Return whether a row is of zero-shot with the dataset's template."""
    return row.get("method") == "zero_shot" and row.get("template") is None


def shown(key: str, text: str) -> str:
    """Return a dataset, method or backbone as people call it."""
    return ", ".join(NAMES.get(part, part) for part in text.split(", ")) if key in NAMED_KEYS else text


def key_name(key: str) -> str:
    """Return a column of the frame as tables name it."""
    return "series" if key == "label" else key


def text_of(value: Any, missing: str = "-") -> str:
    """Return a key's value as the command line writes it."""
    if value is None or value != value:
        return missing
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def heading(key: str, value: Any) -> str:
    """Return a key with its value: '16 shots', 'n_ctx=4'; names stand alone."""
    if key == "shots":
        return "all training images" if value == "all" else f"{text_of(value)} {'shot' if value == 1 else 'shots'}"
    alone = key in ("label", "dataset", "backbone", "target", "method") or value == AVERAGE
    return text_of(value) if alone else f"{key}={text_of(value)}"


def metric_name(value: str) -> str:
    """Return a metric in words."""
    return METRIC_NAMES.get(value, value.replace("_", " "))


def listed(names: Iterable[Any], of: str) -> str:
    """Return a few names, or how many there are `of` them: "7 series"."""
    found = [str(name) for name in dict.fromkeys(names)]
    return ", ".join(found) if len(found) <= NAMED else f"{len(found)} {of}"


def measured(runs: Sequence[StoredRun], results: Path) -> pd.DataFrame:
    """Return the frame of what lies in a results folder: the finished runs, on each of their targets.

    Of runs that differ in their data alone the newest counts. Raises CoopError if no run is finished.
    """
    rows: list[dict[str, Any]] = []
    for run in newest((run for run in runs if run.state == "done"), _place).values():
        columns = run.key.columns() if run.key else {}
        if run.key:  # no cell may average over them; zero-shot on other data is no baseline
            columns["targets"] = ",".join(name for name, _ in run.key.targets)
            columns["data"] = _data(run.key)
        if run.fit.get("n_ctx") is not None:  # of a context that began as words
            columns["n_ctx"] = run.fit["n_ctx"]
        rows += _rows(columns, tuple(run.accuracies), run, results)
    if not rows:
        raise CoopError(f"there are no finished runs under {results}: run something first (coop run)")
    return _frame(rows)


def planned(plan: Plan, runs: Sequence[StoredRun], results: Path) -> pd.DataFrame:
    """Return the frame of a study: its planned runs with `label`, and what is there of them."""
    found = newest(runs)
    rows: list[dict[str, Any]] = []
    numbers: dict[RunKey, int] = {}  # series may share a run
    for label, key, reported in plan:
        number = numbers.setdefault(key.planned(), len(numbers))
        columns = {"label": label, **key.columns(), "run_id": number}
        rows += _rows(columns, reported, found.get(key.planned()), results)
    return _frame(rows)


def _data(key: RunKey) -> str:
    """Return a few digits for the digests of all data of a run."""
    return hashlib.sha256(repr((key.data, key.targets)).encode()).hexdigest()[:8]


def _place(key: RunKey) -> str:
    """Return what `key.planned()` tells apart, without its hash."""
    return repr((key.columns(), [name for name, _ in key.targets]))


def newest(runs: Iterable[StoredRun], place: Callable[[RunKey], Any] = RunKey.planned) -> dict[Any, StoredRun]:
    """Return the runs by what was planned: of several, from other data, the newest result, else a failure."""
    out: dict[Any, StoredRun] = {}
    for run in runs:
        if run.key is None or run.state == "damaged":
            continue
        key = place(run.key)
        other = out.get(key)
        if other is None or (run.state == "done", run.finished) >= (other.state == "done", other.finished):
            out[key] = run
        if other and run.state == other.state == "done":
            kept, older = out[key], other if out[key] is run else run
            note = f"made from other data as well: the older run is {older.folder.name}"
            out[key] = replace(kept, result={**kept.result, "notes": [*kept.notes, note]})
    return out


def _rows(
    columns: Mapping[str, Any], targets: Sequence[str], run: StoredRun | None, results: Path
) -> list[dict[str, Any]]:
    common: dict[str, Any] = {**columns, "state": "missing", **dict.fromkeys(METRICS), "notes": ()}
    measured: dict[str, dict[str, Any]] = {}
    if run is not None:
        common |= {"state": run.state, "error": run.error, "run": _relative(run.folder, results)}
    if run is not None and run.state == "done":
        official = "not the official" not in run.split_source
        common |= {"own_split": run.own_split, "unofficial": not official, "notes": run.notes}
        common["seconds"] = sum(run.seconds.values())
        measured = {name: {key: of[key] for key in METRICS} for name, of in run.targets.items()}
        measured |= {name: {"accuracy": value} for name, value in run.summary.items()}
    return [{**common, "target": target, **measured.get(target, {})} for target in targets]


def _relative(folder: Path, results: Path) -> str:
    return folder.relative_to(results).as_posix() if folder.is_relative_to(results) else str(folder)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a frame of objects: what a row lacks is None, lists are text, metrics are numbers."""
    frame = pd.DataFrame(rows, dtype=object)
    for name in ("run", "error", "own_split", "unofficial", "validation", "template"):
        frame[name] = frame.get(name)
    lists = [name for name in frame.columns if name != "notes" and frame[name].map(type).isin((list, tuple)).any()]
    for name in lists:
        frame[name] = frame[name].map(lambda one: ",".join(map(str, one)) if isinstance(one, list | tuple) else one)
    frame = frame.astype(object).where(frame.notna(), None)
    return frame.astype(dict.fromkeys(METRICS, float))


def with_difference(frame: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Return the frame with a column `difference`: `value` minus that of zero-shot with the dataset's template."""
    if value not in METRICS:
        raise unknown("value", value, METRICS)
    same = ["dataset", "backbone", "precision", "protocol", "target", *(name for name in ("data",) if name in frame)]
    zero = frame[(frame["method"] == "zero_shot") & frame["template"].isna()]
    baseline = zero.groupby(same, dropna=False)[value].mean().rename("baseline").reset_index()
    baseline = baseline.astype(dict.fromkeys(same, object))
    out = frame.astype(dict.fromkeys(same, object)).merge(baseline, on=same, how="left")
    out["difference"] = out[value].astype(float) - out["baseline"].astype(float)
    return out


def select(frame: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the rows that fulfil every `KEY=VALUE` or `KEY=A,B` (`--where`); `null` is a key without a value.

    Raises CoopError if a key is unknown or nothing is left.
    """
    for condition in conditions:
        key, found, values = condition.partition("=")
        if not found:
            raise CoopError(f"--where {condition}: give KEY=VALUE, or KEY=A,B")
        if key not in frame.columns:
            raise unknown("table key", key, frame.columns)
        texts = frame[key].map(lambda one: text_of(one, "null"))
        wanted = {values} if values in set(texts) else {value.strip() for value in values.split(",")}
        wanted |= {"null"} if wanted & {"None", "none", "-"} else set()
        if not texts.isin(wanted).any():
            raise CoopError(f"--where {condition}: no run has it; there are {key}={', '.join(sorted(set(texts)))}")
        frame = frame[texts.isin(wanted)]
    return frame


def where(frame: pd.DataFrame, conditions: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows that fulfil a study's conditions; what is not trained passes those on shots and seed."""
    kept = pd.Series(True, index=frame.index)
    for key, value in conditions.items():
        wanted = {text_of(one) for one in (value if isinstance(value, (list, tuple)) else [value])}
        column = frame[key] if key in frame else pd.Series(None, index=frame.index, dtype=object)
        passes = column.map(text_of).isin(wanted)
        if key in ("shots", "seed") and conditions.get("shots") != 0:
            passes |= frame["shots"].map(lambda shots: shots == 0)
        kept &= passes
    return frame[kept]


def dividing(frame: pd.DataFrame, keys: Sequence[str], candidates: Sequence[str] | None = None) -> list[str]:
    """Return the settings beyond `keys` that tell rows apart, so that no cell averages over more than seeds."""
    names = candidates
    if names is None:
        others = (name for name in frame.columns if name not in SETTINGS_LAST and name not in NOT_SETTINGS)
        names = [*(name for name in SETTINGS_LAST if name in frame), *others]
    codes = {name: pd.factorize(frame[name].map(repr))[0] for name in dict.fromkeys([*keys, *names])}
    groups = np.zeros(len(frame), dtype=np.int64)
    found: list[str] = []
    for name in [*keys, *names]:
        pairs = pd.factorize(groups * (codes[name].max(initial=0) + 1) + codes[name])[0]
        if name in keys or pairs.max(initial=0) > groups.max(initial=0):  # it splits a group
            groups = pairs
            found += [] if name in keys else [name]
    return found


def cells_of(frame: pd.DataFrame, keys: Sequence[str], value: str = "accuracy") -> list[Cell]:
    """Return the cells, sorted by each key in turn: numbers by size, words in the frame's order."""
    if frame.empty:
        return []
    keys = list(keys)
    numbers = 100 * frame[value].astype(float).where(frame["state"] == "done")
    differences = 100 * frame["difference"].where(numbers.notna())
    order = {key: pd.factorize(frame[key].map(repr))[0] for key in keys}
    codes = pd.DataFrame(order).groupby(keys, sort=False).ngroup().to_numpy()
    measured = pd.DataFrame({"value": numbers.to_numpy(), "difference": differences.to_numpy(), "cell": codes})
    groups = measured.groupby("cell", sort=True)
    about = groups["value"].agg(["mean", "count", "size"])
    about["std"] = groups["value"].std(ddof=0)
    about[["difference", "differences"]] = groups["difference"].agg(["mean", "count"])
    members: list[list[Mapping[Any, Any]]] = [[] for _ in range(len(about))]
    for code, row in zip(codes, frame.to_dict("records"), strict=True):
        members[code].append(row)
    found = []
    for rows, numbers_of in zip(members, about.itertuples(index=False), strict=True):
        cell = {key: rows[0].get(key) for key in keys}
        found.append(Cell(cell, tuple(rows), _value(rows, value, *numbers_of)))
    return in_order(found, keys)


def in_order(cells: Iterable[Cell], keys: Sequence[str]) -> list[Cell]:
    """Return cells sorted by each key in turn: numbers by size, words in the order in which they appear."""
    cells = list(cells)
    first = {
        key: {text: i for i, text in enumerate(dict.fromkeys(repr(cell.keys[key]) for cell in cells))} for key in keys
    }
    return sorted(cells, key=lambda cell: [_order(cell.keys[key], first[key]) for key in keys])


def _value(
    rows: Sequence[Mapping[Any, Any]],
    value: str,
    mean: float,
    n: int,
    planned: int,
    std: float,
    away: float,
    aways: int,
) -> Value:
    done = [row for row in rows if row["state"] == "done" and row[value] == row[value]]
    failed = [row for row in rows if row["state"] == "failed"]
    state: State = "done" if n == planned else "partial" if n else "failed" if failed else "missing"
    baseline = all(is_baseline(row) for row in rows)
    return Value(
        state,
        float(mean) if n else None,
        float(std) if n > 1 else None,
        int(n),
        int(planned),
        float(away) if n and aways == n and not baseline else None,
        tuple(dict.fromkeys(str(row["run"]) for row in done)),
        tuple(int(row["seed"]) for row in done if row.get("shots") != 0),
        str(failed[0].get("error") or "") if failed else "",
        note="; ".join(_notes(done)),
        on_test=any(row.get("validation") == "test" for row in done),
    )


def _notes(rows: Iterable[Mapping[Any, Any]]) -> list[str]:
    notes: dict[str, None] = {}
    for row in rows:
        if row.get("own_split") or row.get("unofficial"):
            notes["own split, not the official one" if row.get("own_split") else "not the official split file"] = None
        if row.get("validation") == "test":
            notes[TEST_WARNING] = None
        found = row.get("notes") or ()
        notes |= dict.fromkeys([found] if isinstance(found, str) else map(str, found))
    return list(notes)


def _order(value: Any, first: Mapping[str, int]) -> tuple[int, float]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return (1, float(value)) if number else (0 if value is None else 2, float(first[repr(value)]))


def averages(cells: Sequence[Cell], keys: Sequence[str], study: Sequence[str] = ()) -> list[Cell]:
    """Return the means over datasets of cells that agree in all `keys` but the dataset; `study` names its datasets.

    All averages of a protocol are over the same datasets, the complete cases: those on which most cells are there.
    There is none of what is planned on some of the datasets only, nor over a single dataset. A harmonic mean is that of
    the averaged base and new accuracies, as in CoCoOp's Table 3.
    """
    others = [key for key in keys if key != "dataset"]
    protocols: dict[str, list[Cell]] = {}
    for cell in cells:
        protocols.setdefault(text_of(cell.get("protocol")), []).append(cell)
    out: list[Cell] = []
    for some in protocols.values():
        out += _averages(some, others, study)
    return _with_harmonic_means(out, others)


def _averages(cells: Sequence[Cell], others: Sequence[str], study: Sequence[str]) -> list[Cell]:
    datasets = list(dict.fromkeys(str(cell.keys["dataset"]) for cell in cells))
    groups: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in cells:
        own = {"target": OWN} if cell.keys.get("target") == cell.keys["dataset"] else {}
        place = tuple(repr(own.get(key, cell.keys[key])) for key in others)
        groups.setdefault(place, {})[str(cell.keys["dataset"])] = cell
    groups = {place: group for place, group in groups.items() if len(group) == len(datasets)}
    if len(datasets) < 2:
        return []
    there = [{name for name, cell in group.items() if cell.value.mean is not None} for group in groups.values()]
    common = _complete_cases(there, datasets)
    out = []
    for group, known in zip(groups.values(), there, strict=True):
        used = [name for name in datasets if name in common] if common <= known and len(common) > 1 else []
        one = next(iter(group.values()))
        own = {"target": OWN} if one.keys.get("target") == one.keys["dataset"] else {}
        value = _average(group, used, common, datasets)
        complete = value.state == "done" and set(study) <= set(datasets)
        rows = tuple(row for cell in group.values() for row in cell.rows)
        keys = {key: own.get(key, one.keys[key]) for key in others} | {"dataset": AVERAGE}
        out.append(Cell(keys, rows, value, tuple(used), complete))
    return out


def _complete_cases(there: Sequence[set[str]], datasets: Sequence[str]) -> set[str]:
    """Return the datasets that all averages are over: all of them, or the set that most cells cover.

    A cell more counts for more than a dataset more, so that one series that is half done does not end all averages.
    """
    own = {frozenset(some) for some in there if some}
    candidates = own | {a & b for a in own for b in own if a & b}
    if not candidates:
        return set()
    covered = {some: (sum(some <= other for other in there) ** 2 * len(some), len(some)) for some in candidates}
    best = [some for some in candidates if covered[some] == max(covered.values())]
    return set(min(best, key=lambda some: [name not in some for name in datasets]))


def _average(group: Mapping[str, Cell], used: Sequence[str], common: set[str], datasets: Sequence[str]) -> Value:
    planned = sum(cell.value.planned for cell in group.values())
    values = [group[name].value for name in used]
    if not values:
        known = [name for name in datasets if group[name].value.mean is not None]
        names = [shown("dataset", name) for name in datasets if name in common]
        why = f"only on {listed((shown('dataset', name) for name in known), 'datasets')}"
        why = f"not on all of {listed(names, 'datasets')}" if len(common) > 1 else why
        failed = not known and any(cell.value.state == "failed" for cell in group.values())
        return Value("failed" if failed else "missing", planned=planned, note=why if known else "")
    full = len(used) == len(datasets) and all(value.state == "done" for value in values)
    note = f"over {len(used)} of {len(datasets)} datasets"
    if len(used) == len(datasets):
        note = f"over {len(used)} datasets" + ("" if full else ", some runs missing")
    elif len(used) <= NAMED:
        note += f": {', '.join(shown('dataset', name) for name in used)}"
    differences = [value.difference for value in values if value.difference is not None]
    return Value(
        "done" if full else "partial",
        sum(value.mean or 0.0 for value in values) / len(values),
        n=sum(value.n for value in values),
        planned=planned,
        difference=sum(differences) / len(values) if len(differences) == len(values) else None,
        runs=tuple(run for value in values for run in value.runs),
        note="; ".join([note, *([TEST_WARNING] if any(value.on_test for value in values) else [])]),
        on_test=any(value.on_test for value in values),
    )


def _with_harmonic_means(cells: Sequence[Cell], others: Sequence[str]) -> list[Cell]:
    """Return averages with those of `harmonic_mean` replaced by the harmonic mean of averaged base and new."""
    if "target" not in others:
        return list(cells)
    rest = [key for key in others if key != "target"]
    means = {(*(repr(c.keys[key]) for key in rest), c.keys["target"]): c.value.mean for c in cells}
    out = []
    for cell in cells:
        place = tuple(repr(cell.keys[key]) for key in rest)
        base, new = means.get((*place, "base")), means.get((*place, "new"))
        if cell.keys["target"] == "harmonic_mean" and cell.value.mean is not None and base and new:
            note = f"harmonic mean of the averages of base and new; {cell.value.note}"
            value = replace(cell.value, mean=harmonic_mean([base, new]), difference=None, note=note)
            cell = replace(cell, value=value)
        out.append(cell)
    return out


def pairs(
    frame: pd.DataFrame, label: str, baseline: str, over: str, value: str = "accuracy"
) -> tuple[list[str], list[tuple[Cell, Cell | None]]]:
    """Return the keys beyond `over` that tell the cells of series `label` apart, and each with its cell of `baseline`.

    A baseline has the same dataset, backbone and target; where it has several settings (shots), the same ones. It is
    None where there is none, or no single one.
    """
    own, other = frame[frame["label"] == label], frame[frame["label"] == baseline]
    more = dividing(own, [over])
    shared = [over, *(key for key in more if key in ("dataset", "backbone", "precision", "protocol", "target"))]
    settings = dividing(other, shared) if len(other) else []
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells_of(other, [*shared, *settings], value):
        found.setdefault(tuple(repr(cell.keys[key]) for key in shared), []).append(cell)
    out: list[tuple[Cell, Cell | None]] = []
    for cell in cells_of(own, [over, *more], value):
        candidates = found.get(tuple(repr(cell.keys[key]) for key in shared), [])
        for key in settings:
            candidates = [one for one in candidates if repr(one.keys[key]) == repr(cell.get(key))] or candidates
        out.append((cell, candidates[0] if len(candidates) == 1 else None))
    return more, out
