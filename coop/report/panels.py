"""Curves and sorted bars of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

from coop.report.averages import averages
from coop.report.beside import Beside
from coop.report.cells import (
    Cell,
    Record,
    cells_of,
    dividing,
    metric_name,
    named,
    noted,
    said,
    value_of,
    where,
    with_key,
)
from coop.report.content import Bars, Curves, Line, Panel, Published, Value
from coop.report.pairs import pairs
from coop.report.table import AVERAGE

AXES = {"shots": "shots (training images per class)", "n_ctx": "context length M"}
Points = dict[str, list[tuple[float, Value]]]  # by a line's label


def make_curves(
    records: Sequence[Record], show: Mapping[str, Any], beside: Beside, whole: Sequence[str], id: str
) -> Curves:
    """Return a panel for each value of `panel`, a line for each label, and, if asked for, a panel of averages."""
    metric = str(show.get("value", "accuracy"))
    x, panel = str(show.get("x", "shots")), str(show.get("panel", "dataset"))
    chosen = where(records, show.get("where", {}))
    more = dividing(chosen, [panel, "label", x])
    titles = [panel, *(key for key in ("backbone", "target") if key in more)]
    names = ["label", *(key for key in more if key not in titles)]
    cells = cells_of(chosen, [*titles, *names, x])
    panels: dict[str, Points] = {}
    over = ""
    published: dict[tuple[str, str], dict[float, Published]] = {}
    for cell in cells:
        title, name, at = _title(cell.keys, titles), _name(cell.keys, names), _at(cell.keys[x])
        _put(panels, published, title, name, at, value_of(cell, metric), beside.of(cell, metric))
    if show.get("average") and panel == "dataset":
        for average in averages(cells, [*titles, *names, x], metric, whole):
            title, name, at = _title(average.keys, titles), _name(average.keys, names), _at(average.keys[x])
            _put(panels, published, title, name, at, average.value, beside.of_average(average, metric))
            over = over or next((part for part in average.value.note.split("; ") if part.startswith("over ")), "")
    _add_published_lines(panels, published, cells, titles, x, beside, metric)
    labels = list(dict.fromkeys(_name(cell.keys, names) for cell in cells))
    averaged = [title for title in panels if AVERAGE in title.split(", ")]
    ordered = [*averaged, *(title for title in panels if title not in averaged)]
    shown = {title: f"{title} {over.split(':')[0]}".strip() if title in averaged else title for title in ordered}
    xs = {at for points in panels.values() for line in points.values() for at, _ in line if at > 0}
    return Curves(
        id=id,
        title=str(show.get("title") or f"{metric_name(metric).capitalize()} against {x.replace('_', ' ')}"),
        x=AXES.get(x, x.replace("_", " ")),
        y=f"{metric_name(metric)} (%)",
        panels=tuple(Panel(shown[title], tuple(_lines(panels[title], published, title, labels))) for title in ordered),
        log2=all(float(at).is_integer() and int(at) & (int(at) - 1) == 0 for at in xs),
    )


def _title(keys: Mapping[str, Any], titles: Sequence[str]) -> str:
    return ", ".join(said(keys[key]) for key in titles)


def _name(keys: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(named({key: keys[key] for key in names}))


def _at(value: Any) -> float | None:
    """Return where a point stands: 0 for what has no such value, None for a word (shots=all)."""
    if value is None:
        return 0.0
    return float(value) if isinstance(value, (int, float)) else None


def _put(
    panels: dict[str, Points],
    published: dict[tuple[str, str], dict[float, Published]],
    title: str,
    name: str,
    at: float | None,
    value: Value,
    numbers: Sequence[Published],
) -> None:
    if at is None:
        return
    panels.setdefault(title, {}).setdefault(name, []).append((at, value))
    for number in numbers[:1]:
        published.setdefault((title, name), {})[at] = number


def _add_published_lines(
    panels: Mapping[str, Points],
    published: dict[tuple[str, str], dict[float, Published]],
    cells: Sequence[Cell],
    titles: Sequence[str],
    x: str,
    beside: Beside,
    metric: str,
) -> None:
    """Add the lines of systems that only others measured, in the panels that there are."""
    if x != "shots" or not set(titles) <= {"dataset", "backbone", "target"}:
        return
    labels, backbones = ({said(cell.the(key)) for cell in cells} for key in ("label", "backbone"))
    for (label, dataset, backbone, shots, target), numbers in beside.others(labels, backbones, metric).items():
        title = _title({"dataset": dataset, "backbone": backbone, "target": target}, titles)
        if title in panels and shots.isdigit():
            published.setdefault((title, label), {})[float(shots)] = numbers[0]
            beside.shown((label, dataset, backbone, shots, target))


def _lines(
    points: Points, published: Mapping[tuple[str, str], Mapping[float, Published]], title: str, labels: Sequence[str]
) -> list[Line]:
    names = [label for label in labels if label in points]
    names += [name for place, name in published if place == title and name not in names]
    lines = []
    for name in names:
        ours = tuple(sorted(points.get(name, []), key=lambda point: point[0]))
        theirs = tuple(sorted(published.get((title, name), {}).items()))
        lines.append(Line(name, ours, theirs, star=all(at == 0 for at, _ in [*ours, *theirs])))
    return lines


def make_bars(records: Sequence[Record], show: Mapping[str, Any], beside: Beside, id: str) -> Bars:
    """Return the differences of one series to another, sorted, one for each value of `over`."""
    metric, over = str(show.get("value", "accuracy")), str(show.get("over", "dataset"))
    conditions = show.get("where", {})
    chosen = where(records, conditions)
    learned = [record for record in chosen if record["label"] == show["label"]]
    base = [record for record in chosen if record["label"] == show["baseline"]]
    more, found = pairs(learned, base, over)
    bars, theirs = [], []
    for cell, baseline in found:
        name = ", ".join([said(cell.keys[over]), *named({key: cell.keys[key] for key in more})])
        bars.append((name, _gain(cell, baseline, metric, str(show["baseline"]))))
        if baseline is not None:
            both = zip(beside.of(cell, metric)[:1], beside.of(baseline, metric)[:1], strict=False)
            theirs += [(name, _published_gain(a, b)) for a, b in both]
    bars.sort(key=lambda bar: (bar[1].mean is None, -(bar[1].mean or 0)))
    at = "".join(f", {with_key(key, value)}" for key, value in conditions.items())
    title = f"{show['label']} minus {show['baseline']}: {metric_name(metric)}{at}"
    return Bars(id, str(show.get("title") or title), "points", tuple(bars), tuple(theirs))


def _gain(cell: Cell, baseline: Cell | None, metric: str, name: str) -> Value:
    """Return the difference of two cells, its spread over the seeds that both have."""
    value = value_of(cell, metric)
    other = value_of(baseline, metric) if baseline else None
    if other is None or other.mean is None or value.mean is None:
        missing = noted(replace(value, mean=None, std=None), "" if value.mean is None else f"{name} is missing")
        return replace(missing, state="missing" if value.mean is not None else value.state)
    by_seed = {r["seed"]: r[metric] for r in (baseline.records if baseline else ()) if r.get("shots") != 0}
    pairs = [(r[metric], by_seed.get(r["seed"], other.mean / 100)) for r in cell.records if r[metric] is not None]
    gains = [100 * (float(a) - float(b)) for a, b in pairs if b is not None]
    both = (*value.runs, *(run for run in other.runs if run not in value.runs))
    if not gains:
        return noted(replace(value, state="missing", mean=None, std=None), f"{name} is missing with the same seeds")
    return replace(value, mean=fmean(gains), std=pstdev(gains) if len(gains) > 1 else None, difference=None, runs=both)


def _published_gain(learned: Published, baseline: Published) -> Published:
    sources = dict.fromkeys((learned.source, baseline.source))
    verified = learned.verified and baseline.verified
    return Published(learned.value - baseline.value, " and ".join(sources), verified)
