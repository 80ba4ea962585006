"""The cells of a report: planned runs that differ in their seed alone, and what they come to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

import pandas as pd

from coop.report.content import State, Value
from coop.report.table import METRICS, with_difference

Record = Mapping[str, Any]  # a row of a study's plan: a planned run on one test set
_DIVIDING = ("label", "dataset", "backbone", "precision", "protocol", "method", "shots", "target")  # in this order
NO_KEYS = {
    *METRICS, "difference", "baseline", "seed", "run", "n", "own_split", "unofficial", "notes", "overrides", "seconds",
    "state", "error", "architecture", "pretrained", "dataset_template", "data",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What it is - the values of the keys that tell it apart - and the planned runs that it is made of."""

    keys: Mapping[str, Any]
    records: tuple[Record, ...]

    def the(self, key: str) -> Any:
        """Return the value of `key`, or None where its runs differ in it."""
        if key in self.keys:
            return self.keys[key]
        values = {repr(record.get(key)): record.get(key) for record in self.records}
        return next(iter(values.values())) if len(values) == 1 else None

    @property
    def comparable(self) -> bool:
        """Whether its runs used the official splits, as published numbers did."""
        return not any(record.get("own_split") or record.get("unofficial") for record in self.records)


def records_of(plan: pd.DataFrame, value: str = "accuracy") -> list[Record]:
    """Return the plan's rows with the `difference` of `value` to zero-shot; what is not known is None."""
    frame = plan.reset_index(drop=True).astype(dict.fromkeys(METRICS, float))
    for key in ("dataset", "backbone", "precision", "protocol", "method", "target"):
        frame[key] = frame[key].astype(object)
    frame = with_difference(frame, value).astype(object)
    records: list[Record] = frame.where(frame.notna(), None).to_dict("records")  # type: ignore[assignment]
    return records


def where(records: Iterable[Record], conditions: Mapping[str, Any]) -> list[Record]:
    """Return the records that fulfil all conditions; a list means any of its values.

    What is not trained has no shots and no seed: it passes conditions on them.
    """
    kept = []
    for record in records:
        free = ("shots", "seed") if record.get("shots") == 0 and conditions.get("shots") != 0 else ()
        if all(key in free or said(record.get(key)) in _wanted(value) for key, value in conditions.items()):
            kept.append(record)
    return kept


def _wanted(value: Any) -> set[str]:
    return {said(one) for one in (value if isinstance(value, (list, tuple)) else [value])}


def dividing(records: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """Return the keys beyond `keys` that cells need, so that none averages over more than seeds."""
    names = list(dict.fromkeys(name for record in records[:1] for name in record))
    candidates = [*_DIVIDING, *(name for name in names if name not in _DIVIDING and name not in NO_KEYS)]
    found: list[str] = []
    for name in candidates:
        if name in keys:
            continue
        seen: dict[tuple[str, ...], str] = {}
        for record in records:
            place = tuple(repr(record.get(key)) for key in [*keys, *found])
            if seen.setdefault(place, repr(record.get(name))) != repr(record.get(name)):
                found.append(name)
                break
    return found


def cells_of(records: Iterable[Record], keys: Sequence[str]) -> list[Cell]:
    """Return the cells, sorted by each key in turn: numbers by size, words as the study names them."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    seen: dict[str, dict[str, int]] = {key: {} for key in keys}
    for record in records:
        place = tuple(repr(record.get(key)) for key in keys)
        groups.setdefault(place, []).append(record)
        for key, value in zip(keys, place, strict=True):
            seen[key].setdefault(value, len(seen[key]))
    cells = [Cell({key: group[0].get(key) for key in keys}, tuple(group)) for group in groups.values()]
    return sorted(cells, key=lambda cell: [_order(cell.keys[key], seen[key]) for key in keys])


def _order(value: Any, seen: Mapping[str, int]) -> tuple[int, float]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (1, float(value)) if number else (0 if value is None else 2, float(seen[repr(value)]))


def value_of(cell: Cell, value: str = "accuracy") -> Value:
    """Return the cell's mean and spread over its finished runs, in percent, and where they are."""
    done = [r for r in cell.records if r["state"] == "done" and r.get(value) is not None]
    failed = [r for r in cell.records if r["state"] == "failed"]
    numbers = [100 * float(r[value]) for r in done]
    differences = [100 * float(r["difference"]) for r in done if r.get("difference") is not None]
    state: State = "partial" if done else "failed" if failed else "missing"
    state = "done" if len(done) == len(cell.records) else state
    return Value(
        state,
        mean=fmean(numbers) if numbers else None,
        std=pstdev(numbers) if len(numbers) > 1 else None,
        n=len(done),
        planned=len(cell.records),
        difference=fmean(differences) if differences and len(differences) == len(done) else None,
        runs=tuple(dict.fromkeys(str(r["run"]) for r in done)),
        seeds=tuple(int(r["seed"]) for r in done if r.get("shots") != 0),
        error=str(failed[0].get("error") or "") if failed else "",
        note="; ".join(_notes(done)),
    )


def _notes(records: Iterable[Record]) -> list[str]:
    """Return what readers must know of the runs, once each."""
    notes: dict[str, None] = {}
    for record in records:
        if record.get("own_split"):
            notes["own split, not the official one"] = None
        elif record.get("unofficial"):
            notes["not the official split file"] = None
        told = record.get("notes") or ()
        for note in [told] if isinstance(told, str) else told:
            notes[str(note)] = None
    return list(notes)


def noted(value: Value, note: str) -> Value:
    """Return the value with one more note."""
    return replace(value, note="; ".join(part for part in (value.note, note) if part))


def said(value: Any) -> str:
    """Return a key's value as the command line has it."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def is_baseline(record: Record) -> bool:
    """Whether it is zero-shot with the dataset's template, which differences are to."""
    return record.get("method") == "zero_shot" and record.get("template") is None


def most(shots: Iterable[Any]) -> Any:
    """Return the most shots; `all` is more than any number."""
    return max(shots, key=lambda count: float("inf") if count == "all" else float(count))


def with_key(key: str, value: Any) -> str:
    """Return a key and its value as a heading: '16 shots', 'n_ctx=4'; names speak for themselves."""
    if key == "shots":
        if value == "all":
            return "all training images"
        return f"{said(value)} {'shot' if value == 1 else 'shots'}"
    return said(value) if key in ("label", "dataset", "backbone", "target", "method") else f"{key}={said(value)}"


def named(keys: Mapping[str, Any]) -> list[str]:
    """Return what is known of keys, as headings: a probe has no context length to name."""
    return [with_key(key, value) for key, value in keys.items() if value is not None]


def metric_name(value: str) -> str:
    """Return a metric in words."""
    return {"ece": "expected calibration error", "macro_f1": "macro F1"}.get(value, value.replace("_", " "))
