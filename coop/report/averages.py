"""Averages over datasets that can be compared: every one of them is over the same datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean
from typing import Any

from coop.report.cells import Cell, value_of
from coop.report.content import Value
from coop.report.table import AVERAGE

MANY = 6  # more datasets than this are counted, not named


@dataclass(frozen=True)
class Average:
    """An average's place, its value, and whether it is over all datasets of the study, as the published ones are."""

    keys: Mapping[str, Any]
    value: Value
    complete: bool
    cells: tuple[Cell, ...]


def averages(
    cells: Sequence[Cell], keys: Sequence[str], metric: str = "accuracy", whole: Sequence[str] = ()
) -> list[Average]:
    """Return the means over datasets of the cells that agree in all `keys` but the dataset; `whole` is the study's.

    Where some datasets are missing, all averages are over the same ones: those on which most of the cells are there.
    There is none of what is planned on some of the datasets only, nor over a single dataset. Of harmonic means, it is
    the harmonic mean of the averaged base and new accuracies, as in CoCoOp's Table 3.
    """
    datasets = list(dict.fromkeys(str(cell.keys["dataset"]) for cell in cells))
    others = [key for key in keys if key != "dataset"]
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(repr(cell.keys[key]) for key in others), []).append(cell)
    if len(datasets) < 2:
        return []
    groups = {place: group for place, group in groups.items() if len(group) == len(datasets)}
    values = {place: {str(c.keys["dataset"]): value_of(c, metric) for c in group} for place, group in groups.items()}
    there = {place: {d for d, value in by.items() if value.mean is not None} for place, by in values.items()}
    common = _common(list(there.values()), datasets)
    out = []
    for place, group in groups.items():
        about = {key: group[0].keys[key] for key in others} | {"dataset": AVERAGE}
        used = common if common <= there[place] and len(common) > 1 else set()
        value = _average(values[place], used, common, datasets)
        complete = value.state == "done" and set(whole) <= set(datasets)
        out.append(Average(about, value, complete, tuple(group)))
    return _with_harmonic_means(out, others)


def _common(there: Sequence[set[str]], datasets: Sequence[str]) -> set[str]:
    """Return the datasets that all averages are over: all of them if complete, else what most cells have.

    An average more counts for more than a dataset more, so that a series that is half done is there at all.
    """
    own = {frozenset(some) for some in there if some}
    candidates = own | {a & b for a in own for b in own if a & b}
    if not candidates:
        return set()

    def covered(some: frozenset[str]) -> tuple[int, int]:
        return sum(some <= other for other in there) ** 2 * len(some), len(some)

    best = max(covered(some) for some in candidates)
    chosen = [some for some in candidates if covered(some) == best]
    return set(min(chosen, key=lambda some: [d not in some for d in datasets]))


def _average(by: Mapping[str, Value], used: set[str], common: set[str], datasets: Sequence[str]) -> Value:
    parts = [by[name] for name in datasets if name in used]
    planned = sum(value.planned for value in by.values())
    if not parts:
        there = {name for name, value in by.items() if value.mean is not None}
        why = f"not on all of {_list(common, datasets)}" if len(common) > 1 else f"only on {_list(there, datasets)}"
        failed = any(value.state == "failed" for value in by.values())
        return Value("failed" if failed and not there else "missing", planned=planned, note=why if there else "")
    differences = [value.difference for value in parts if value.difference is not None]
    full = len(used) == len(datasets) and all(value.state == "done" for value in parts)
    over = f"over {len(used)} of {len(datasets)} datasets"
    if len(used) < len(datasets):
        over += f": {_list(used, datasets)}" if len(used) <= MANY else ""
    elif not full:
        over = f"over {len(datasets)} datasets, some runs missing"
    else:
        over = f"over {len(datasets)} datasets"
    return Value(
        "done" if full else "partial",
        mean=fmean(value.mean for value in parts if value.mean is not None),
        n=sum(value.n for value in parts),
        planned=planned,
        difference=fmean(differences) if len(differences) == len(parts) else None,
        runs=tuple(run for value in parts for run in value.runs),
        note=over,
    )


def _list(some: set[str], datasets: Sequence[str]) -> str:
    """Return the datasets' names in the study's order."""
    return ", ".join(name for name in datasets if name in some)


def _with_harmonic_means(out: Sequence[Average], others: Sequence[str]) -> list[Average]:
    if "target" not in others:
        return list(out)
    rest = [key for key in others if key != "target"]
    means: dict[tuple[Any, ...], float | None] = {}
    for one in out:
        means[*(repr(one.keys[key]) for key in rest), one.keys["target"]] = one.value.mean
    fixed = []
    for one in out:
        place = tuple(repr(one.keys[key]) for key in rest)
        base, new = means.get((*place, "base")), means.get((*place, "new"))
        if one.keys["target"] == "harmonic_mean" and one.value.mean is not None and base and new:
            value = _replaced(one.value, harmonic_mean([base, new]))
            fixed.append(Average(one.keys, value, one.complete, one.cells))
        else:
            fixed.append(one)
    return fixed


def _replaced(value: Value, mean: float) -> Value:
    """Return the value with the harmonic mean of averages; a difference of harmonic means is not one of averages."""
    note = f"harmonic mean of the averages of base and new; {value.note}"
    return Value(value.state, mean, None, value.n, value.planned, None, value.runs, note=note)
