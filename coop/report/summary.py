"""What a report says in words: what was run, what was found, and what is missing with the command that does it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from coop.report.frame import (
    TEST_WARNING,
    Cell,
    Value,
    averages,
    cells_of,
    dividing,
    heading,
    is_baseline,
    listed,
    text_of,
)
from coop.report.tables import shown
from coop.runs.store import SUMMARIES
from coop.runs.study import command_of

FACTS = {"epochs": "epochs", "lr": "learning rate", "batch_size": "batch size", "augment.views": "image views"}
NARROWING = ("method", "shots", "seed")  # a command for these alone redoes nothing: what is done is skipped


@dataclass(frozen=True)
class Missing:
    """Planned runs without a result: how many, of what, and the command that does them."""

    what: str
    count: int
    failed: int
    error: str
    command: str


def unique_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each planned run: not for each of its targets, nor for each series that shares it."""
    return frame.drop_duplicates("run_id")


# What was run.


def facts(frame: pd.DataFrame, command: str) -> list[tuple[str, str]]:
    """Return what was run, as (name, text): coverage, backbone, training, validation, seeds, and the command."""
    runs = unique_runs(frame)
    done = runs[runs["state"] == "done"]
    datasets = dict.fromkeys(map(str, runs["dataset"]))
    there = [shown("dataset", name) for name in datasets if (done["dataset"] == name).any()]
    covered = f"{len(there)} of {len(datasets)}: " if len(there) < len(datasets) else ""
    out = [("datasets", covered + ", ".join(there))]
    backbones = (
        " ".join(filter(None, (shown("backbone", str(r["backbone"])), _weights(r)))) for r in runs.to_dict("records")
    )
    out.append(("backbone", "; ".join(dict.fromkeys(backbones))))
    if set(runs["precision"]) != {"fp32"}:
        out.append(("precision", ", ".join(dict.fromkeys(map(str, runs["precision"])))))
    if set(runs["protocol"]) != {"all_classes"}:
        out.append(("protocol", ", ".join(dict.fromkeys(str(name).replace("_", " ") for name in runs["protocol"]))))
    trained = frame[frame["shots"].map(lambda shots: shots != 0)].drop_duplicates(["label", "run_id"])
    out.append(("shots", _values(trained["shots"])))
    if "augment.views" in trained:
        views = trained["augment.views"].map(lambda number: "the test view" if number == 0 else number)
        trained = trained.assign(**{"augment.views": views})
    out += [(name, _by_series(trained, key)) for key, name in FACTS.items() if key in trained]
    out.append(("validation", _by_series(frame, "validation") or "nothing is chosen on validation images"))
    seeds = done.loc[done["shots"].map(lambda shots: shots != 0), "seed"]
    out.append(("seeds", _values(seeds)))
    return [(name, text) for name, text in [*out, ("command", command)] if text]


def _weights(row: Mapping[Any, Any]) -> str:
    names = (str(row["backbone"]), shown("backbone", str(row["backbone"])))
    found = [str(row[key]) for key in ("architecture", "pretrained") if row.get(key) and row[key] not in names]
    words = [word for word in found if not re.fullmatch("[0-9a-f]{16}", word)]  # the digest of a file
    return f"({', '.join(words)})" if words else ""


def _values(column: "pd.Series[Any]") -> str:
    found = list(dict.fromkeys(column.dropna()))
    numbers = [value for value in found if isinstance(value, int | float)]
    words = [str(value) for value in found if not isinstance(value, int | float)]
    return ", ".join([*(text_of(value) for value in sorted(numbers)), *words])


def _by_series(frame: pd.DataFrame, key: str) -> str:
    """Return the values of a setting, for each group of series that share them."""
    groups: dict[str, list[str]] = {}
    for label, some in frame.groupby("label", sort=False):
        if text := _values(some[key]):
            groups.setdefault(text, []).append(str(label))
    labels = {label for some in groups.values() for label in some}
    if len(groups) == 1 and (len(labels) == frame["label"].nunique() or key != "validation"):
        return next(iter(groups))
    return "; ".join(f"{text} ({'; '.join(some)})" for text, some in groups.items())


# What was found.


def sentences(frame: pd.DataFrame, main: str | None) -> list[str]:
    """Return what the numbers say, the most important first; `main` is the series that the study is about."""
    summed = frame["target"].isin(SUMMARIES)
    with_summary = set(frame.loc[summed, "run_id"])
    own = frame["target"] == frame["dataset"]
    chosen = frame[summed | (own & ~frame["run_id"].isin(with_summary))]
    out = [_completeness(frame)]
    several = chosen["backbone"].nunique() > 1
    for backbone, some in chosen.groupby("backbone", sort=False):
        if (some["state"] == "done").any():
            found = (_best(some, main), *_places(some, main), _calibration(some, main))
            out += [f"{shown('backbone', str(backbone))}: {text}" if several else text for text in found if text]
    if "validation" in frame:
        labels = frame.loc[(frame["validation"] == "test") & (frame["state"] == "done"), "label"]
        out += [f"{listed(labels, 'series')}: {TEST_WARNING}."] if len(labels) else []
    return [*out, *_failures(frame)]


def _completeness(frame: pd.DataFrame) -> str:
    runs = unique_runs(frame)
    done, failed = runs[runs["state"] == "done"], int((runs["state"] == "failed").sum())
    if len(done) == len(runs):
        return f"Complete: all {len(runs)} runs are done."
    text = f"{len(done)} of {len(runs)} runs are done" + (f", {failed} failed" if failed else "")
    datasets = list(dict.fromkeys(map(str, runs["dataset"])))
    there = [name for name in datasets if (done["dataset"] == name).any()]
    if len(datasets) > 1 and there:
        none = [shown("dataset", name) for name in datasets if name not in there]
        text += f"; there are results on {len(there)} of {len(datasets)} datasets"
        text += f", none yet on {', '.join(none)}" if none else ""
    return f"{text}."


def _most_shots(frame: pd.DataFrame) -> Any:
    """Return the most shots that are done, `all` counting most; 0 where nothing is trained."""
    found = [0, *frame.loc[frame["state"] == "done", "shots"]]
    return max(found, key=lambda shots: float("inf") if shots == "all" else float(shots))


def _cells(frame: pd.DataFrame) -> list[Cell]:
    keys = ["dataset", "label", "shots"]
    return cells_of(frame, [*keys, *(key for key in dividing(frame, keys) if key != "target")])


def _name(cell: Cell) -> str:
    more = {key: value for key, value in cell.keys.items() if key not in ("dataset", "label", "shots", "target")}
    return ", ".join([str(cell.keys["label"]), *(heading(k, v) for k, v in more.items() if v is not None)])


def _best(frame: pd.DataFrame, main: str | None) -> str | None:
    """Say which series is best on average at the most shots, against what is not trained."""
    shots = _most_shots(frame)
    some = frame[frame["shots"].isin([0, shots])]
    there = some.loc[some["state"] == "done", "dataset"].unique()
    cells = _cells(some[some["dataset"].isin(there)] if len(there) == 1 else some)
    means = averages(cells, list(cells[0].keys)) if cells else []
    over = {id(cell): f"on average {cell.value.note.split('; ')[-1]}" for cell in means}
    values: dict[str, tuple[Value, str]] = {}
    for cell in means or cells:
        if cell.value.mean is not None and not cell.value.on_test:
            dataset = shown("dataset", text_of(cell.keys["dataset"]))
            values[_name(cell)] = (cell.value, over.get(id(cell), f"on {dataset}"))
    if not values:
        return None
    best = max(values, key=lambda name: values[name][0].mean or 0)
    value, where = values[best]
    at = f"With {heading('shots', shots)}, {best}" if shots else best
    text = f"{at} {'is the best series:' if len(values) > 1 else 'reaches'} {value.mean:.1f} % {where}, n {value.n}"
    if value.difference is not None and abs(value.difference) >= 0.05:
        side = "above" if value.difference > 0 else "below"
        text += f", {abs(value.difference):.1f} points {side} zero-shot with the dataset's template"
    if main in values and main != best:
        own = values[str(main)][0]
        text += f"; {main} reaches {own.mean:.1f} %"
        text += f" ({own.difference:+.1f})" if own.difference is not None else ""
    return f"{text}."


def _places(frame: pd.DataFrame, main: str | None) -> Iterable[str]:
    """Say where the main series is below zero-shot, and where it gains most and least at the most shots."""
    own = frame[(frame["label"] == main) & ~_is_baseline(frame)]
    found = [(cell.value.difference, cell) for cell in _cells(own) if cell.value.difference is not None]
    found.sort(key=lambda pair: -pair[0])
    lost = [(difference, cell) for difference, cell in found if difference < 0]

    def place(cell: Cell) -> str:
        dataset, shots = shown("dataset", text_of(cell.get("dataset"))), cell.get("shots")
        return f"{dataset}, {heading('shots', shots)}" if shots else dataset

    if found and not lost:
        yield f"{main} is nowhere below zero-shot ({len(found)} {'place' if len(found) == 1 else 'places'} measured)."
    elif lost:
        worst = "; ".join(f"{place(cell)} ({difference:+.1f})" for difference, cell in reversed(lost[-3:]))
        yield f"{main} is below zero-shot in {len(lost)} of {len(found)} measured places: worst {worst}."
    shots = _most_shots(own)
    top = [(difference, cell) for difference, cell in found if cell.get("shots") == shots]
    if len(top) > 1:
        (high, first), (low, last) = top[0], top[-1]
        datasets = [shown("dataset", text_of(cell.get("dataset"))) for cell in (first, last)]
        at = f"With {heading('shots', shots)}, " if shots else ""
        yield f"{at}{main} gains most on {datasets[0]} ({high:+.1f} points) and least on {datasets[1]} ({low:+.1f})."


def _calibration(frame: pd.DataFrame, main: str | None) -> str | None:
    """Compare calibration errors of the main series and of zero-shot on the datasets that both have."""
    own = frame[(frame["label"] == main) & (frame["state"] == "done")]
    shots = _most_shots(own)
    errors = [
        (100 * some.groupby("dataset", sort=False)["ece"].mean()).dropna().to_dict()
        for some in (own[own["shots"] == shots], frame[_is_baseline(frame)])
    ]
    both = [dataset for dataset in errors[0] if dataset in errors[1]]
    if not both or not shots:
        return None
    ours, theirs = (fmean(some[dataset] for dataset in both) for some in errors)
    over = f"mean over {len(both)} datasets" if len(both) > 1 else f"on {shown('dataset', str(both[0]))}"
    return (
        f"The expected calibration error {'rises' if ours > theirs else 'falls'} from {theirs:.1f} % (zero-shot) "
        f"to {ours:.1f} % ({main}, {heading('shots', shots)}; {over})."
    )


def _is_baseline(frame: pd.DataFrame) -> "pd.Series[bool]":
    return (frame["method"] == "zero_shot") & frame["template"].isna()


def _failures(frame: pd.DataFrame) -> list[str]:
    runs = unique_runs(frame)
    errors = list(dict.fromkeys(str(error or "unknown") for error in runs.loc[runs["state"] == "failed", "error"]))
    count = int((runs["state"] == "failed").sum())
    more = f" and {len(errors) - 1} other reasons" if len(errors) > 1 else ""
    return [f"{count} {'run' if count == 1 else 'runs'} failed: {errors[0]}{more}."] if errors else []


def main_series(frame: pd.DataFrame, named: Iterable[str]) -> str | None:
    """Return the series that a study is about: the first `named` one, else the first of CoOp, else any other."""
    rows: list[Mapping[Any, Any]] = [*frame.drop_duplicates("label").to_dict("records")]
    labels = [str(row["label"]) for row in rows]
    learned = [str(row["label"]) for row in rows if row["method"] == "coop"]
    others = {str(row["label"]) for row in rows if not is_baseline(row)}
    wanted = [*(label for label in named if label in labels), *learned, *labels]
    return next((label for label in wanted if label in others), None)


# What is missing.


def missing_runs(frame: pd.DataFrame, study: str, overrides: Sequence[str]) -> list[Missing]:
    """Return what is missing, datasets that lack the same things together; `overrides` are those of the report."""
    runs: list[Mapping[Any, Any]] = [*unique_runs(frame).to_dict("records")]
    lacking: dict[tuple[str, ...], list[Mapping[Any, Any]]] = {}
    for dataset, backbone in dict.fromkeys((row["dataset"], row["backbone"]) for row in runs):
        gone = [r for r in runs if (r["dataset"], r["backbone"]) == (dataset, backbone) and r["state"] != "done"]
        if gone:
            pattern = sorted(f"{r['label']} {text_of(r['shots'])} {text_of(r['seed'])} {r['state']}" for r in gone)
            lacking.setdefault((str(backbone), *pattern), []).extend(gone)
    asked = {override.split("=", 1)[0] for override in overrides}
    every = {key: {text_of(row[key]) for row in runs} for key in ("dataset", "backbone") if key not in asked}
    out = []
    for gone in lacking.values():
        datasets = list(dict.fromkeys(text_of(row["dataset"]) for row in gone))
        planned = [r for r in runs if r["backbone"] == gone[0]["backbone"] and text_of(r["dataset"]) in datasets]
        failed = [row for row in gone if row["state"] == "failed"]
        labels = list(dict.fromkeys(str(row["label"]) for row in gone))
        series = "; ".join(labels) if len(labels) <= 3 else f"{len(labels)} series"
        names = ", ".join(shown("dataset", name) for name in datasets)
        out.append(
            Missing(
                what=f"{names}: {'everything' if len(gone) == len(planned) else series}",
                count=len(gone),
                failed=len(failed),
                error=str(failed[0].get("error") or "") if failed else "",
                command=_command(study, overrides, gone, planned, every),
            )
        )
    return out


def _command(
    study: str,
    overrides: Sequence[str],
    gone: Sequence[Mapping[Any, Any]],
    planned: Sequence[Mapping[Any, Any]],
    every: Mapping[str, set[str]],
) -> str:
    """Return the narrowest command that surely does these runs; `every` are values that the study has by itself."""
    narrowed = {}
    for key in ("dataset", "backbone"):
        values = list(dict.fromkeys(text_of(row[key]) for row in gone))
        if set(values) != every.get(key):
            narrowed[key] = ",".join(values)
    for key in NARROWING:
        wanted, all_of = (list(dict.fromkeys(text_of(r[key]) for r in some)) for some in (gone, planned))
        if key != "method":  # what is not trained has none, whatever is asked for
            wanted, all_of = ([value for value in values if value != "0"] for values in (wanted, all_of))
        if wanted and len(wanted) < len(all_of):
            narrowed[key] = ",".join(sorted(wanted, key=lambda text: (not text.isdigit(), text.zfill(9))))
    kept = [override for override in overrides if override.split("=", 1)[0] not in narrowed]
    return command_of(study, [*(f"{key}={value}" for key, value in narrowed.items()), *kept])
