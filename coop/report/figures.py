"""Figures: described once as Vega-Lite, drawn by vl-convert as SVG, PDF and PNG, and as the SVG inside the page.

A series has one colour, marker and dash in all figures of a report (`Styles`). Marks of the page carry in their
accessible name which series and which number they are (`inline_svg`), so that its script and keyboard find them.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import pandas as pd
import vl_convert

from coop.io import atomic_write
from coop.report.frame import (
    AVERAGE,
    OWN,
    TEST_WARNING,
    Cell,
    Published,
    Value,
    averages,
    cells_of,
    dividing,
    heading,
    metric_name,
    pairs,
    text_of,
    where,
)
from coop.report.published import Publications
from coop.report.tables import DAGGER, shown
from coop.runs.study import CurvesPart, GainsPart

if TYPE_CHECKING:
    from coop.report.detail import Detail

FORMATS = ("svg", "pdf", "png")
AXES = {"shots": "shots (training images per class)", "n_ctx": "context length M"}
COLOURS = (  # on light and on dark paper; told apart by colour-blind readers too, and by marker and dash
    ("#0072b2", "#58b0ea"), ("#d04f00", "#ff8c4a"), ("#008a64", "#2fc796"), ("#b5538a", "#e79cc6"),
    ("#a87200", "#e9b23c"), ("#6f5fc0", "#b0a5f0"), ("#3390c8", "#9ad4f7"),
)  # fmt: skip
INK, MUTED, RULE, GREY = "#1b1f24", "#59616b", "#dfe3e8", "#6b737c"
UP, DOWN = "#0b5ea0", "#ab4300"
MARKERS = (  # paths within -1..1
    "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z", "M-.9,-.9H.9V.9H-.9Z", "M0,-1.2L1.1,0L0,1.2L-1.1,0Z",
    "M0,-1.1L1.1,.9H-1.1Z", "M0,1.1L1.1,-.9H-1.1Z", "M0,-1.1L1.1,-.3L.7,1H-.7L-1.1,-.3Z",
)  # fmt: skip
STARS = (
    "M0,-1.4L.42,-.5L1.36,-.38L.66,.28L.84,1.22L0,.76L-.84,1.22L-.66,.28L-1.36,-.38L-.42,-.5Z",
    "M-.4,-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
    "M-1,-1.3L0,-.4L1,-1.3L1.3,-1L.4,0L1.3,1L1,1.3L0,.4L-1,1.3L-1.3,1L-.4,0L-1.3,-1Z",
)
DASHES = ((1.0, 0.0), (6.0, 3.0), (9.0, 2.0, 2.0, 2.0), (3.0, 2.0))  # dots are for published numbers
MINUS = "\u2212"
PER_ROW = 4  # panels side by side in a file
CONFIG: dict[str, Any] = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED, "titleColor": MUTED, "gridColor": RULE, "domainColor": GREY, "tickColor": GREY,
        "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "titlePadding": 6,
    },
    "title": {"color": INK, "fontSize": 12, "anchor": "start", "subtitleColor": MUTED, "subtitleFontSize": 11},
    "legend": {"labelColor": INK, "labelFontSize": 11, "labelLimit": 420, "symbolStrokeWidth": 1.7, "symbolOpacity": 1},
    "concat": {"spacing": 22},
}  # fmt: skip

Spec = dict[str, Any]
Source = Callable[[Value | Published], str]  # a name for the number behind a mark, or nothing


@dataclass(frozen=True)
class Line:
    """A series of a panel: its points (x, value), and published ones; `star` if all stand at x = 0 (not trained)."""

    label: str
    points: tuple[tuple[float, Value], ...]
    published: tuple[tuple[float, Published], ...] = ()
    star: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: tuple[Line, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """Return how many of our points are there, and how many are planned."""
        values = [value for line in self.lines for _, value in line.points]
        return sum(value.mean is not None for value in values), len(values)

    @property
    def empty(self) -> bool:
        """Return whether there is nothing to draw."""
        return self.counts[0] == 0 and not any(line.published for line in self.lines)


@dataclass(frozen=True)
class Curves:
    """Panels that share the names of their axes, and their series."""

    id: str
    title: str
    x: str
    y: str
    panels: tuple[Panel, ...]
    log2: bool = True  # x is spaced by doublings, and 0 stands a doubling before the first
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bars:
    """Sorted bars, one for each name; values are differences in points, missing ones last."""

    id: str
    title: str
    unit: str
    bars: tuple[tuple[str, Value], ...]
    published: tuple[tuple[str, Published], ...] = ()


# From the frame to curves and bars.


def make_curves(
    frame: pd.DataFrame, show: CurvesPart, published: Publications, study: Sequence[str], id: str
) -> Curves:
    """Return a panel for each value of `panel`, a line for each label, and, if asked for, a panel of averages."""
    metric, x, panel = show.value, show.x, show.panel
    chosen = where(frame, show.where)
    more = dividing(chosen, [panel, "label", x])
    titles = [panel, *(key for key in ("backbone", "target") if key in more)]
    names = ["label", *(key for key in more if key not in titles)]
    keys = [*titles, *names, x]
    cells = cells_of(chosen, keys, metric)
    means = averages(cells, keys, study) if show.average and panel == "dataset" else []

    def title_of(keys: Mapping[str, Any]) -> str:
        return ", ".join(dict.fromkeys(text_of(keys[key]) for key in titles if keys[key] != OWN))

    panels: dict[str, dict[str, tuple[dict[float, Value], dict[float, Published]]]] = {}
    for cell in [*means, *cells]:
        at = _number(cell.keys[x])
        if at is None:  # shots=all has no place on the axis
            continue
        name = ", ".join(heading(key, cell.keys[key]) for key in names if cell.keys[key] is not None)
        ours, theirs = panels.setdefault(title_of(cell.keys), {}).setdefault(name, ({}, {}))
        ours[at] = cell.value
        for number in published.of(cell, metric)[:1]:
            theirs[at] = number
    if x == "shots" and set(titles) <= {"dataset", "backbone", "target"}:
        for about, numbers in published.others(cells, keys, metric):
            title = title_of({"dataset": about["dataset"], "backbone": about["backbone"], "target": about["target"]})
            if title in panels and isinstance(about["shots"], int):
                panels[title].setdefault(about["label"], ({}, {}))[1][about["shots"]] = numbers[0]
                published.mark_shown(about)
    over = next((part for c in means for part in c.value.note.split("; ") if part.startswith("over ")), "")
    xs = {at for lines in panels.values() for ours, _ in lines.values() for at in ours if at > 0}
    on_test = any(cell.value.on_test for cell in cells)
    return Curves(
        id=id,
        title=show.title or f"{metric_name(metric).capitalize()} against {x.replace('_', ' ')}",
        x=AXES.get(x, x.replace("_", " ")),
        y=f"{metric_name(metric)} (%)",
        panels=tuple(
            Panel(f"{title} {over.split(':')[0]}".strip() if AVERAGE in title.split(", ") else title, _lines(lines))
            for title, lines in panels.items()
        ),
        log2=all(float(at).is_integer() and int(at) & (int(at) - 1) == 0 for at in xs),
        notes=(f"{DAGGER} {TEST_WARNING}",) if on_test else (),
    )


def _number(value: Any) -> float | None:
    if value is None:
        return 0.0
    return float(value) if isinstance(value, (int, float)) else None


def _lines(lines: Mapping[str, tuple[Mapping[float, Value], Mapping[float, Published]]]) -> tuple[Line, ...]:
    return tuple(
        Line(name, tuple(sorted(ours.items())), tuple(sorted(theirs.items())), all(at == 0 for at in (*ours, *theirs)))
        for name, (ours, theirs) in lines.items()
    )


def make_bars(frame: pd.DataFrame, show: GainsPart, published: Publications, id: str) -> Bars:
    """Return the differences of one series to another, sorted, one for each value of `over`."""
    metric, over = show.value, show.over
    more, found = pairs(where(frame, show.where), show.label, show.baseline, over, metric)
    bars, theirs = [], []
    for cell, baseline in found:
        rest = [heading(key, cell.keys[key]) for key in more if cell.keys[key] is not None]
        name = ", ".join([text_of(cell.keys[over]), *rest])
        bars.append((name, _gain(cell, baseline, metric, show.baseline)))
        numbers = zip(
            published.of(cell, metric)[:1], published.of(baseline, metric)[:1] if baseline else (), strict=False
        )
        theirs += [(name, _published_gain(ours, other)) for ours, other in numbers]
    bars.sort(key=lambda bar: (bar[1].mean is None, -(bar[1].mean or 0)))
    at = "".join(f", {heading(key, value)}" for key, value in show.where.items())
    title = f"{show.label} minus {show.baseline}: {metric_name(metric)}{at}"
    return Bars(id, show.title or title, "points", tuple(bars), tuple(theirs))


def _gain(cell: Cell, baseline: Cell | None, metric: str, name: str) -> Value:
    """Return the difference of two cells; its deviation is over the seeds that both have."""
    value, other = cell.value, baseline.value if baseline else None
    if value.mean is None or other is None or other.mean is None:
        note = f"{name} is missing" if value.mean is not None else ""
        state = "missing" if value.mean is not None else value.state
        return replace(value, state=state, mean=None, std=None, note="; ".join(filter(None, (value.note, note))))
    rows = baseline.rows if baseline else ()
    by_seed = {row["seed"]: row[metric] for row in rows if row.get("shots") != 0}
    both = [(row[metric], by_seed.get(row["seed"], other.mean / 100)) for row in cell.rows if row["state"] == "done"]
    gains = [100 * (float(a) - float(b)) for a, b in both if a == a and b == b]
    if not gains:
        note = "; ".join(filter(None, (value.note, f"{name} is missing with the same seeds")))
        return replace(value, state="missing", mean=None, std=None, note=note)
    runs = tuple(dict.fromkeys((*value.runs, *other.runs)))
    spread = pstdev(gains) if len(gains) > 1 else None
    return replace(
        value, mean=fmean(gains), std=spread, difference=None, runs=runs, on_test=value.on_test or other.on_test
    )


def _published_gain(learned: Published, baseline: Published) -> Published:
    sources = " and ".join(dict.fromkeys((learned.source, baseline.source)))
    return Published(learned.value - baseline.value, sources, learned.verified and baseline.verified)


# How a series looks, everywhere.


@dataclass(frozen=True)
class Style:
    """Look of a series: its number among all, its colour on light and dark paper, its marker (a path), its dash."""

    number: int
    label: str
    colour: str
    marker: str
    dash: tuple[float, ...]
    star: bool


def make_styles(labels: Iterable[str], stars: Iterable[str]) -> dict[str, Style]:
    """Return the styles of a report's series; `stars` are those that are not trained."""
    untrained, styles, counts = set(stars), {}, [0, 0]
    for number, label in enumerate(dict.fromkeys(labels)):
        star = label in untrained
        i = counts[star]
        counts[star] += 1
        colour = INK if star else COLOURS[i % len(COLOURS)][0]
        kinds = STARS if star else MARKERS
        marker, dash = kinds[(i + i // len(COLOURS)) % len(kinds)], DASHES[(i // len(COLOURS) + i) % len(DASHES)]
        styles[label] = Style(number, label, colour, marker, dash, star)
    return styles


def styles_of(parts: Iterable[Any]) -> dict[str, Style]:
    """Return the styles of all series that the parts of a report show."""
    labels: list[str] = []
    stars: dict[str, bool] = {}
    for part in parts:
        if isinstance(part, Curves):
            for line in (line for panel in part.panels for line in panel.lines):
                labels.append(line.label)
                stars[line.label] = line.star and stars.get(line.label, True)
        elif hasattr(part, "reliability"):
            labels += [series for series, _, _ in part.reliability]
            stars.setdefault(part.baseline, part.baseline.startswith("zero-shot"))
    return make_styles(labels, (label for label, star in stars.items() if star))


# Vega-Lite.


def _no_source(_: Value | Published) -> str:
    return ""


def _axis(field: str, title: str | None = None, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _layer(rows: Sequence[Mapping[str, Any]], mark: str, look: Spec, *encodings: Spec) -> list[Spec]:
    """Return a layer of marks, or nothing where there are no rows."""
    encoding = {key: value for one in encodings for key, value in one.items()}
    return [{"data": {"values": list(rows)}, "mark": {"type": mark, **look}, "encoding": encoding}] if rows else []


def _mark(number: int, source: str, words: str, kind: str = "o") -> str:
    """Return a mark's name: which series, ours (o) or published (t), the number behind it, and words."""
    return f"~{number}{kind}{source}~{words}"


def _series(styles: Iterable[Style], legend: bool) -> tuple[Spec, Spec, Spec]:
    """Return the encodings by colour, marker and dash; a legend is for files, the page has its own."""
    known = list(styles)

    def encoding(looks: Sequence[Any]) -> Spec:
        own: Spec = {"title": None, "orient": "bottom", "columns": 3, "symbolSize": 60} if legend else {}
        scale = {"domain": [style.label for style in known], "range": list(looks)}
        return {"field": "series", "type": "nominal", "scale": scale, "legend": own or None}

    return (
        {"color": encoding([style.colour for style in known])},
        {"shape": encoding([style.marker for style in known])},
        {"strokeDash": encoding([list(style.dash) for style in known])},
    )


FILLED: Spec = {"filled": True, "opacity": 1, "size": 60}
NAMED: Spec = {"description": {"field": "words"}}  # a mark that readers can reach
UNNAMED: Spec = {"description": {"field": "mark"}}


def panel_spec(
    panel: Panel,
    curves: Curves,
    styles: Mapping[str, Style],
    size: tuple[int, int],
    legend: bool = False,
    source: Source = _no_source,
) -> Spec:
    """Return one pair of axes: lines through our means with their deviation, published numbers hollow and dotted."""
    every = [line for one in curves.panels for line in one.lines]
    places = _places({x for line in every for x, _ in (*line.points, *line.published)}, curves.log2)
    ordered = sorted(places.values())
    step = min((b - a for a, b in zip(ordered, ordered[1:], strict=False)), default=1.0)
    stars = [line.label for line in panel.lines if line.star]
    ours, theirs = [], []
    for line in panel.lines:
        number = styles[line.label].number
        aside = (stars.index(line.label) - (len(stars) - 1) / 2) * 0.28 * step if line.star else 0.0
        for x, value in line.points:
            row = {"series": line.label, "x": places[x] + aside, "mean": value.mean, "star": line.star}
            if value.mean is not None:
                row |= {"low": value.mean - (value.std or 0.0), "high": value.mean + (value.std or 0.0)}
            words = f"{_place(panel, line, curves, x)}: {value.text}, n {value.n}"
            words += f" of {value.planned}" * (value.n < value.planned) + f", {TEST_WARNING}" * value.on_test
            ours.append(row | {"words": _mark(number, source(value), words), "mark": _mark(number, "", "")})
        for x, one in line.published:
            row = {"series": line.label, "x": places[x] + aside, "mean": one.value, "verified": one.verified}
            words = f"{_place(panel, line, curves, x)}, published: {one.value:.2f}"
            theirs.append(row | {"words": _mark(number, source(one), words, "t"), "mark": _mark(number, "", "", "t")})
    there = [row for row in ours if row["mean"] is not None]
    texts = json.dumps({f"{place:g}": f"{x:g}" for x, place in places.items()})
    ticks = {"values": ordered, "labelExpr": f"({texts})[datum.value]"}
    ends = [min(ordered, default=0) - step / 2, max(ordered, default=1) + step / 2]
    x_axis = _axis("x", curves.x if legend or size[0] > 400 else None, scale={"domain": ends, "nice": False})
    x_axis["axis"] = ticks | {"grid": False, "labelOverlap": False}
    y_axis = _axis("mean", curves.y if legend else None, scale={"zero": False}, axis={"tickCount": 5})
    at = {"x": x_axis, "y": y_axis}
    colour, shape, dash = _series((styles[label] for label in dict.fromkeys(line.label for line in every)), legend)
    faint = {"color": {"condition": {"test": "!datum.verified", "value": GREY}} | colour["color"]}
    span = {"x": x_axis, "y": y_axis | {"field": "low"}, "y2": {"field": "high"}}
    breaks = {"strokeWidth": 1.7, "invalid": "break-paths-show-domains"}
    level = {"opacity": 0.55, "strokeDash": [1, 3]}
    layers = [
        *_layer([row for row in there if row["star"]], "rule", level, {"y": y_axis}, colour, UNNAMED),
        *_layer(theirs, "line", {"strokeWidth": 1.1, "strokeDash": [1.5, 3]}, at, colour, UNNAMED),
        *_layer(ours, "line", breaks, at, colour, dash, UNNAMED),
        *_layer([r for r in there if r["low"] != r["high"]], "rule", {"strokeWidth": 1.4}, span, colour, UNNAMED),
        *_layer(theirs, "point", {"size": 55}, at, faint, shape, NAMED),
        *_layer(there, "point", FILLED, at, colour, shape, NAMED),
    ]
    return {"width": size[0], "height": size[1], "title": shown("dataset", panel.title), "layer": layers}


def _place(panel: Panel, line: Line, curves: Curves, x: float) -> str:
    return f"{shown('dataset', panel.title)}, {line.label}, {curves.x.split(' (')[0]} {x:g}"


def _places(xs: Iterable[float], log2: bool) -> dict[float, float]:
    """Return where each x stands: by doublings, 0 one doubling before the first; or where it is."""
    first = min((math.log2(x) for x in xs if x > 0), default=1.0)
    return {x: (math.log2(x) if x > 0 else first - 1) if log2 else x for x in sorted(xs)}


def curves_spec(curves: Curves, styles: Mapping[str, Style]) -> Spec:
    """Return all panels as one figure, for files."""
    drawn = [panel for panel in curves.panels if not panel.empty]
    gone = ", ".join(shown("dataset", panel.title) for panel in curves.panels if panel.empty)
    lines = [line for panel in drawn for line in panel.lines]
    notes = ["± one standard deviation over seeds"] * any(v.std for line in lines for _, v in line.points)
    notes += ["hollow, dotted: published"] * any(line.published for line in lines)
    notes += [f"missing: {gone}"] * bool(gone)
    size = (560, 360) if len(drawn) == 1 else (250, 180)
    panels = [panel_spec(panel, curves, styles, size, legend=True) for panel in drawn]
    return _figure(panels, curves.title, [*notes, *curves.notes])


def _figure(panels: Sequence[Spec], title: str, notes: Sequence[str]) -> Spec:
    columns = min((PER_ROW, PER_ROW - 1), key=lambda n: -len(panels) % n) if len(panels) > PER_ROW else len(panels)
    shared = {"scale": {"color": "shared", "shape": "shared", "strokeDash": "shared"}}
    head = {"text": title, "subtitle": list(notes), "anchor": "start", "offset": 12}
    return {"concat": list(panels), "columns": columns, "title": head, "resolve": shared}


def bars_spec(bars: Bars, width: int = 520, title: bool = True, source: Source = _no_source) -> Spec:
    """Return sorted bars with their deviation; diamonds are published numbers, grey where they are unverified."""
    ours: list[Spec] = []
    theirs: list[Spec] = []
    states = {key: f" ({value.state})" for key, value in bars.bars if value.mean is None}
    for key, value in bars.bars:
        name, gain, spread = shown("dataset", key), value.mean or 0.0, value.std or 0.0
        text = f"{gain:+.1f}".replace("-", MINUS) if value.mean is not None else value.state
        words = f"{bars.title}, {name}: {text} {bars.unit}, n {value.n}" + f", {TEST_WARNING}" * value.on_test
        row = {
            "name": name + states.get(key, ""),
            "gain": value.mean,
            "text": text,
            "low": gain - spread,
            "high": gain + spread,
        }
        row |= {"end": max(gain + spread, 0.0) if gain >= 0 else min(gain - spread, 0.0)}
        ours.append(row | {"words": _mark(0, source(value), words)})
    for key, one in bars.published:
        words = f"{bars.title}, {shown('dataset', key)}, published: {one.value:+.2f}"
        row = {"name": shown("dataset", key) + states.get(key, ""), "gain": one.value, "verified": one.verified}
        theirs.append(row | {"words": _mark(0, source(one), words, "t")})
    names = {"labelLimit": 170, "ticks": False, "domain": False}
    order = [row["name"] for row in ours]
    y = {"y": {"field": "name", "type": "nominal", "sort": order, "title": None, "axis": names}}
    gains = _axis("gain", bars.unit, axis={"tickCount": 3 if width < 300 else 6}, scale={"padding": 34})
    x, end = {"x": gains}, {"x": gains | {"field": "end"}}
    span = {"x": gains | {"field": "low"}, "x2": {"field": "high"}}
    there = [row for row in ours if row["gain"] is not None]
    sign = {"color": {"condition": {"test": "datum.gain < 0", "value": DOWN}, "value": UP}}
    known = {"stroke": {"condition": {"test": "!datum.verified", "value": GREY}, "value": INK}}
    label = {"text": {"field": "text"}}
    layers = [
        *_layer(ours, "bar", {"height": {"band": 0.62}}, x, y, sign, NAMED),
        *_layer([{}], "rule", {"color": GREY}, {"x": {"datum": 0}}),
        *_layer([row for row in there if row["low"] != row["high"]], "rule", {"color": INK}, span, y),
        *_layer(theirs, "point", {"shape": "diamond", "size": 70, "fill": "white"}, x, y, known, NAMED),
    ]
    for align, away, side in (("left", 5, True), ("right", -5, False)):
        some = [row for row in there if (row["end"] >= 0) is side]
        layers += _layer(some, "text", {"align": align, "dx": away, "color": INK}, label, end, y)
    out: Spec = {"width": width, "height": {"step": 24}, "layer": layers}
    return out | {"title": bars.title} if title else out


def reliability_spec(detail: "Detail", styles: Mapping[str, Style], size: int = 250, legend: bool = False) -> Spec:
    """Return how often predictions are right against how sure they are, and below how many images each bin has."""
    rows = []
    for label, _, bins in detail.reliability:
        number, total = styles[label].number, sum(one.n for one in bins)
        for one in bins:
            if one.n:
                words = (
                    f"{label}: of {one.n} predictions with a confidence of {one.low:.0f} to {one.high:.0f} %, "
                    f"{one.accuracy:.1f} % are right at a mean confidence of {one.confidence:.1f} %"
                )
                row = {"series": label, "x": one.confidence, "mean": one.accuracy, "low": one.low, "high": one.high}
                row |= {"share": 100 * one.n / total, "mark": _mark(number, "", "")}
                rows.append(row | {"words": _mark(number, "", words)})
    colour, shape, dash = _series((styles[label] for label, _, _ in detail.reliability), legend)
    percent: Spec = {"scale": {"domain": [0, 100], "nice": False}, "axis": {"tickCount": 5}}
    at = {"x": _axis("x", **percent), "y": _axis("mean", "accuracy (%)", **percent)}
    diagonal = [{"x": 0, "mean": 0}, {"x": 100, "mean": 100}]
    top = [
        *_layer(diagonal, "line", {"color": GREY, "strokeDash": [4, 3]}, at),
        *_layer(rows, "line", {"strokeWidth": 1.6}, at, colour, dash, UNNAMED),
        *_layer(rows, "point", FILLED, at, colour, shape, NAMED),
    ]
    share = _axis("share", "images (%)", stack=None, axis={"tickCount": 2}, scale={"zero": True})
    span = {"x": _axis("low", "confidence (%)", **percent), "x2": {"field": "high"}, "y": share, "y2": {"datum": 0}}
    outline = {"stroke": colour["color"]}
    bottom = _layer(rows, "bar", {"fillOpacity": 0.25, "strokeWidth": 1}, span, colour, outline, UNNAMED)
    title = {"title": shown("dataset", detail.dataset)} if legend else {}
    above = {"width": size, "height": size, "layer": top, **title}
    return {"vconcat": [above, {"width": size, "height": size // 5, "layer": bottom}], "spacing": 8}


def reliability_figure(details: Sequence["Detail"], styles: Mapping[str, Style]) -> Spec:
    """Return the reliability diagrams of several datasets as one figure, for files."""
    panels = [reliability_spec(detail, styles, 200, legend=True) for detail in details]
    errors = [
        f"{shown('dataset', detail.dataset)}: "
        + ", ".join(f"{series} {error:.1f} %" for series, error, _ in detail.reliability)
        for detail in details
    ]
    return _figure(panels, "Confidence against accuracy", ["expected calibration errors", *errors])


# Drawing.


def draw_svg(spec: Spec, background: str | None = "white") -> str:
    """Return a Vega-Lite description as SVG."""
    svg: str = vl_convert.vegalite_to_svg({**spec, "background": background, "config": CONFIG, "padding": 4})
    return svg


def write_figure(spec: Spec, paths: Iterable[Path]) -> None:
    """Write a description as files; each path's ending chooses its format."""
    svg = draw_svg(spec)
    for path in paths:
        with atomic_write(path) as temporary:
            if path.suffix == ".svg":
                temporary.write_text(svg, encoding="utf-8")
            else:
                convert = vl_convert.svg_to_pdf if path.suffix == ".pdf" else vl_convert.svg_to_png
                temporary.write_bytes(convert(svg, scale=1 if path.suffix == ".pdf" else 2))


def inline_svg(spec: Spec, name: str, classes: str = "") -> str:
    """Return a description as an element of the page: as wide as there is room, its numbers reachable by keyboard."""
    svg = draw_svg({key: value for key, value in spec.items() if key != "title"}, None)
    svg = re.sub(r' (role="graphics-[a-z]+"|aria-roledescription="[^"]*"|pointer-events="none")', "", svg)
    svg = re.sub(r' aria-label="(?!~)[^"]*"', "", svg)
    svg = re.sub(r'(<\w+) aria-label="~(\d+)([ot])([vp]?\d*)~([^"]*)"', lambda m: _named(*m.groups()), svg)
    svg = re.sub(r' (d|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)  # a third of the size
    head = re.match(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", svg)
    assert head, "vl-convert writes an svg element with a viewBox"
    opening = f'<svg viewBox="{head[1]}" class="chart {classes}" role="group" aria-label="{escape(name)}">'
    return opening + svg[head.end() :]


def _named(tag: str, series: str, kind: str, source: str, words: str) -> str:
    """Return the opening of a mark: a point where it has words, else a part of its series alone."""
    look = f'{tag} data-s="{series}"' + (' data-theirs=""' if kind == "t" else "")
    if not words:
        return f'{look} aria-hidden="true"'
    number = f' data-n="{source}"' if source else ""
    return f'{look} class="pt"{number} role="button" tabindex="-1" aria-label="{words}"'
