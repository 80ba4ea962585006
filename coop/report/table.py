"""The table of results: means over seeds, their spread, and the difference to zero-shot."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from coop.errors import CoopError, unknown

METRICS = ("accuracy", "macro_f1", "ece", "mean_confidence")
FORMATS = ("text", "markdown", "csv", "latex")
_NOT_KEYS = {
    *METRICS,
    "difference",
    "baseline",
    "seed",
    "run",
    "n",
    "own_split",
    "architecture",
    "pretrained",
    "dataset_template",
}
AVERAGE = "average"


@dataclass(frozen=True)
class Table:
    """A row for each cell: its keys, and `mean`, `std` (over the population of seeds), `n`, `difference`, in percent.

    `difference` is the mean minus that of zero-shot with the dataset's template, on the same test set and backbone.
    """

    cells: pd.DataFrame
    rows: list[str]
    columns: list[str]
    value: str
    notes: list[str]


def make_table(
    frame: pd.DataFrame,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    value: str = "accuracy",
) -> Table:
    """Return the table of `value`, from runs with their `difference`.

    Unless given, columns are the shots, or the test sets where a run has several; rows are all else that differs.
    Raises CoopError for unknown keys, and where runs that differ in more than their seed would be averaged.
    """
    keys = [key for key in frame.columns if key not in _NOT_KEYS]
    for key in [*(rows or ()), *(columns or ())]:
        if key not in keys and key != "seed":
            raise unknown("table key", key, keys)
    frame = frame.astype(dict.fromkeys(keys, object)).where(frame.notna(), None)
    if columns is None:
        moved = "target" not in (rows or ()) and _tells_apart(frame, ["run"], "target")
        columns = ["target"] if moved else ["shots"]
    varying = [key for key in keys if frame[key].map(repr).nunique() > 1 and key not in columns]
    if rows is None:
        basic = ["dataset", "backbone", *(["protocol"] if "protocol" in varying else []), "method"]
        rows = [key for key in [*basic, *(["shots"] if "target" in columns else [])] if key not in columns]
        rows += [key for key in varying if key not in rows and _tells_apart(frame, [*rows, *columns], key)]
    rows = list(rows)
    _refuse_pooling(frame, [*rows, *columns], varying)
    cells = _cells(frame, [*rows, *columns], value)
    if "dataset" in rows and cells["dataset"].nunique() > 1:
        cells = pd.concat([cells, _average(cells, rows, list(columns))], ignore_index=True)
    own = sorted(frame.loc[frame["own_split"].astype(bool), "dataset"].unique())
    notes = [f"{', '.join(own)}: own split, not the official one"] if own else []
    return Table(cells, rows, list(columns), value, notes)


def _tells_apart(frame: pd.DataFrame, keys: list[str], key: str) -> bool:
    """Whether `key` still differs between runs that agree in `keys`."""
    groups = frame.groupby([frame[k].map(repr) for k in keys])[key]
    return bool((groups.agg(lambda column: column.map(repr).nunique()) > 1).any())


def _refuse_pooling(frame: pd.DataFrame, keys: list[str], varying: list[str]) -> None:
    mixed = [key for key in varying if key not in keys and _tells_apart(frame, keys, key)]
    if mixed:
        values = {key: sorted(str(value) for value in frame[key].unique() if value is not None) for key in mixed}
        shown = "; ".join(f"{key} ({', '.join(some)})" for key, some in values.items())
        raise CoopError(
            f"a cell would average over more than seeds, over {shown}: add it to --rows or --columns, "
            f"or choose one (--where {mixed[0]}={values[mixed[0]][0]})"
        )


def with_difference(frame: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Return the runs with a column `difference`: `value` minus that of zero-shot with the dataset's template."""
    if value not in METRICS:
        raise unknown("value", value, METRICS)
    same = ["dataset", "backbone", "precision", "protocol", "target"]
    zero = frame[frame["method"] == "zero_shot"]
    if "template" in zero:
        zero = zero[zero["template"].isna()]
    baseline = zero.groupby(same, dropna=False)[value].mean().rename("baseline").reset_index()
    out = frame.merge(baseline, on=same, how="left")
    out["difference"] = out[value].astype(float) - out["baseline"].astype(float)
    return out


def _cells(frame: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    frame = frame.assign(**{value: frame[value].astype(float) * 100, "difference": frame["difference"] * 100})
    grouped = frame.groupby(keys, dropna=False, sort=False)
    cells = grouped.agg(
        mean=(value, "mean"),
        std=(value, lambda column: column.std(ddof=0)),
        n=(value, "size"),
        difference=("difference", "mean"),
    ).reset_index()
    by = [key for key in keys if key != "target"]  # test sets stay in the order in which a run has them
    return cells.sort_values(by, key=lambda column: column.map(_order), kind="stable", ignore_index=True)


def _order(value: object) -> tuple[int, float, str]:
    """Sort numbers by size, before words."""
    if isinstance(value, bool) or value is None or value != value:
        return (0, 0.0, str(value))
    return (1, float(value), "") if isinstance(value, (int, float)) else (2, 0.0, str(value))


def _average(cells: pd.DataFrame, rows: list[str], columns: list[str]) -> pd.DataFrame:
    """Return the means over datasets, where every dataset has the cell; `n` is the number of datasets."""
    others = [key for key in [*rows, *columns] if key != "dataset"]
    grouped = cells.groupby(others, dropna=False, sort=False) if others else cells.groupby(lambda _: 0)
    mean = grouped.agg(mean=("mean", "mean"), n=("dataset", "nunique"), difference=("difference", "mean")).reset_index()
    complete = mean[mean["n"] == cells["dataset"].nunique()]
    return complete.assign(dataset=AVERAGE, std=float("nan"))[cells.columns]


def select(frame: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the rows that fulfil every `key=value,value`. Raises CoopError if a key is unknown or nothing is left."""
    for condition in conditions:
        key, found, values = condition.partition("=")
        if not found:
            raise CoopError(f"--where {condition}: give KEY=VALUE, or KEY=A,B")
        if key not in frame.columns:
            raise unknown("table key", key, frame.columns)
        wanted = set(values.split(","))
        kept = frame[frame[key].map(str).isin(wanted)]
        if kept.empty:
            there = ", ".join(sorted(map(str, frame[key].unique())))
            raise CoopError(f"--where {condition}: no run has it; there are {key}={there}")
        frame = kept
    return frame
