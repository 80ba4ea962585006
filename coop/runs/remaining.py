"""How long the runs that are missing will take, from the seconds of those that are done."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from coop.runs.study import Cell

SAMPLE = ("seed", "shots", "epochs")


@dataclass(frozen=True)
class Remaining:
    """Seconds of one process for the runs that are not done, as far as they can be estimated."""

    seconds: float
    estimated: int
    unknown: int  # runs without a finished one of their kind


def remaining(runs: Iterable[tuple[Cell, str, float | None]]) -> Remaining:
    """Estimate from (run, state, seconds): by runs that differ in their seed alone, else scaled by other shots.

    A run on another dataset, backbone or method, or with another option, says nothing about this one.
    """
    runs = list(runs)
    same: dict[str, list[float]] = {}
    near: dict[str, list[tuple[float, float]]] = {}
    for cell, state, seconds in runs:
        if state == "done" and seconds is not None:
            same.setdefault(_kind(cell.about, "seed"), []).append(seconds)
            near.setdefault(_kind(cell.about, *SAMPLE), []).append((_work(cell.about), seconds))
    times = [_estimate(cell, same, near) for cell, state, _ in runs if state != "done"]
    known = [seconds for seconds in times if seconds is not None]
    return Remaining(float(sum(known)), len(known), len(times) - len(known))


def _estimate(
    cell: Cell, same: Mapping[str, list[float]], near: Mapping[str, list[tuple[float, float]]]
) -> float | None:
    if found := same.get(_kind(cell.about, "seed")):
        return fmean(found)
    work = _work(cell.about)
    measured = [(other, seconds) for other, seconds in near.get(_kind(cell.about, *SAMPLE), []) if other and work]
    if not measured:
        return None
    other, seconds = min(measured, key=lambda pair: abs(pair[0] - work))
    return seconds * work / other


def _work(about: Mapping[str, Any]) -> float:
    """Return what a run's time grows with, on one dataset: images seen; 0 where that is not known (shots=all)."""
    shots = about["shots"]
    return float(shots * (about.get("epochs") or 1)) if isinstance(shots, int) else 0.0


def _kind(about: Mapping[str, Any], *but: str) -> str:
    return json.dumps({key: value for key, value in about.items() if key not in but}, sort_keys=True, default=str)
