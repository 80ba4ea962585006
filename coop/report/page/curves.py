"""Curves as shapes in a picture of 340 x 230 units, which a page scales to the room it has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from coop.report.content import Curves, Line, Panel, Published, Value
from coop.report.page.numbers import number, spoken
from coop.report.page.sources import Sources

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 36, 330, 8, 204
COLOURS = 7  # of style.css; the first series of a star has the colour of the text
MARKERS = ("circle", "square", "diamond", "up", "down", "pentagon")
Scale = Callable[[float], float]
DASHES = ("none", "9 3", "3 2.5", "9 3 2.5 3", "14 3", "6 2 2 2 2 2")


@dataclass(frozen=True)
class Style:
    """How a series looks wherever it is drawn: a colour, a marker and a dash, each enough to tell it apart."""

    label: str
    number: int
    colour: int  # 0: the colour of the text
    marker: str
    dash: str
    only_published: bool


@dataclass(frozen=True)
class Mark:
    """A point: where it stands, what stands behind it (`kind` v: a value, p: published), and the same in words."""

    x: float
    y: float
    at: str
    kind: str
    source: int
    words: str
    low: float | None = None
    high: float | None = None
    faint: bool = False


@dataclass(frozen=True)
class Drawn:
    """A series in a panel."""

    style: Style
    marks: tuple[Mark, ...]
    path: str
    theirs: tuple[Mark, ...]
    their_path: str
    star: bool
    faint: bool  # all that is published is unverified


@dataclass(frozen=True)
class Axes:
    """A panel: its ticks (position, text), what is drawn in it, and how much is missing."""

    title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Drawn, ...]
    there: int
    planned: int
    empty: bool  # nothing at all, not even published points


def styles(curves: Curves) -> list[Style]:
    """Return a style for each label, in the order in which panels name them."""
    lines: dict[str, Line] = {}
    ours: set[str] = set()
    for panel in curves.panels:
        for line in panel.lines:
            lines.setdefault(line.label, line)
            if line.points:
                ours.add(line.label)
    first = next((line.label for line in lines.values() if line.star), None)
    coloured = [label for label in lines if label != first]
    return [
        Style(
            label,
            index,
            0 if label == first else coloured.index(label) % COLOURS + 1,
            "star" if line.star else MARKERS[coloured.index(label) % len(MARKERS)],
            "none" if label == first else DASHES[coloured.index(label) // 2 % len(DASHES)],
            label not in ours,
        )
        for index, (label, line) in enumerate(lines.items())
    ]


def draw_panels(curves: Curves, looks: list[Style], sources: Sources) -> list[Axes]:
    """Return the panels of `curves`, drawn in their styles."""
    by_label = {style.label: style for style in looks}
    xs = sorted({x for panel in curves.panels for line in panel.lines for x, _ in _all(line)})
    return [_draw(panel, curves, xs, by_label, sources) for panel in curves.panels]


def _draw(panel: Panel, curves: Curves, xs: list[float], looks: dict[str, Style], sources: Sources) -> Axes:
    values = [value for line in panel.lines for _, value in line.points]
    heights = [height for line in panel.lines for height in _heights(line)]
    planned, there = len(values), sum(value.mean is not None for value in values)
    if not heights:
        return Axes(panel.title, (), (), (), there, planned, True)
    low, high = min(heights), max(heights)
    room = max((high - low) * 0.06, 0.5)
    low, high = low - room, high + room
    ticks = [float(tick) for tick in MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    decimals = 0 if all(tick.is_integer() for tick in ticks) else 1
    across = {x: LEFT + 12 + place * (RIGHT - LEFT - 24) for x, place in _places(xs, curves.log2).items()}

    def up(height: float) -> float:
        return round(BOTTOM - (height - low) / (high - low) * (BOTTOM - TOP), 1)

    x_name = curves.x.split(" (")[0]
    lines = tuple(
        _line(line, looks[line.label], across, up, f"{panel.title}, {line.label}, {x_name}", sources)
        for line in panel.lines
    )
    return Axes(
        panel.title,
        tuple((round(across[x], 1), f"{x:g}") for x in xs),
        tuple((up(tick), number(tick, decimals)) for tick in ticks),
        lines,
        there,
        planned,
        False,
    )


def _line(line: Line, style: Style, across: dict[float, float], up: Scale, words: str, sources: Sources) -> Drawn:
    marks = []
    for x, value in line.points:
        if value.mean is None:
            continue
        spread = value.std if value.n > 1 else None
        low, high = (None, None) if not spread else (up(value.mean - spread), up(value.mean + spread))
        said = f"{words} {x:g}: {spoken(value)}" + (f", {value.n} of {value.planned} runs" * (value.state == "partial"))
        marks.append(Mark(round(across[x], 1), up(value.mean), f"{x:g}", "v", sources.value(value), said, low, high))
    theirs = []
    for x, one in line.published:
        said = f"{words} {x:g}, published{'' if one.verified else ', unverified'}: {number(one.value, 2)}"
        mark = Mark(
            round(across[x], 1), up(one.value), f"{x:g}", "p", sources.published(one), said, faint=not one.verified
        )
        theirs.append(mark)
    faint = bool(theirs) and all(mark.faint for mark in theirs)
    there = [(across[x], None if value.mean is None else up(value.mean)) for x, value in line.points]
    their_path = _path([(mark.x, mark.y) for mark in theirs])
    return Drawn(style, tuple(marks), _path(there), tuple(theirs), their_path, line.star, faint)


def _path(points: list[tuple[float, float | None]]) -> str:
    """Return a path through the points; it is broken where one is missing."""
    steps, pen = [], "M"
    for x, y in sorted(points, key=lambda point: point[0]):
        if y is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(steps) if "L" in "".join(steps) else ""


def _places(xs: list[float], log2: bool) -> dict[float, float]:
    """Return where each x stands, from 0 to 1: by doublings, 0 a doubling before the first; or by size."""
    if log2 and all(x >= 0 for x in xs):
        positive = [math.log2(x) for x in xs if x > 0]
        before = (min(positive) if positive else 0.0) - 1
        raw = {x: math.log2(x) if x > 0 else before for x in xs}
    else:
        raw = {x: x for x in xs}
    low, high = min(raw.values()), max(raw.values())
    return {x: (place - low) / (high - low) if high > low else 0.5 for x, place in raw.items()}


def _all(line: Line) -> Iterator[tuple[float, Value | Published]]:
    yield from line.points
    yield from line.published


def _heights(line: Line) -> Iterator[float]:
    for _, value in line.points:
        if value.mean is not None:
            spread = (value.std or 0) if value.n > 1 else 0
            yield from (value.mean - spread, value.mean + spread)
    yield from (one.value for _, one in line.published)
