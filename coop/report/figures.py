"""Figures as files: curves, sorted bars and reliability diagrams, by matplotlib."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coop.io import atomic_write
from coop.report.content import Bars, Curves, Detail, Line, Value

FORMATS = ("svg", "pdf", "png")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7A5195")  # told apart by colour-blind
MARKERS = "osD^vPX"  # readers too, and by their markers
STARS = "*PXd"
GREY = "#999999"  # what was never checked
MISSING = " (missing)"
ACROSS = 4  # panels side by side
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "svg.hashsalt": "coop", "legend.frameon": False, "pdf.fonttype": 42,
}  # fmt: skip


def draw_curves(curves: Curves, paths: Iterable[Path]) -> None:
    """Draw the panels of `curves`: ours filled, published points hollow and grey if unverified, zero-shot as stars.

    Each path's ending chooses its format: .svg, .pdf or .png.
    """
    with plt.rc_context(STYLE):
        columns = _across(len(curves.panels))
        rows = -(-len(curves.panels) // columns)
        size = (3.1 * columns + 0.4, 2.5 * rows + 1.1) if columns > 1 else (5.6, 4.6)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=True)
        styles = _styles(curves)
        places = _places(curves)
        for axis, panel in zip(axes.flat, curves.panels, strict=False):
            axis.set_title(panel.title)
            for line in panel.lines:
                _line(axis, line, places, *styles[line.label])
            values = [value.mean for line in panel.lines for _, value in line.points]
            if not any(value is not None for value in values):
                _say_missing(axis, any(line.published for line in panel.lines))
        for number, axis in enumerate(axes.flat):
            axis.set_visible(number < len(curves.panels))
            axis.set_xticks(list(places.values()), [f"{x:g}" for x in places])
            below = number + columns >= len(curves.panels)
            axis.tick_params(labelbottom=below)
            axis.set_xlabel(curves.x if below and (number % columns == 0 or columns <= 2) else "")
            axis.set_ylabel(curves.y if number % columns == 0 else "")
        _legend(figure, axes.flat, list(styles), 3 if columns > 2 else 2)
        _save(figure, paths)


def draw_bars(bars: Bars, paths: Iterable[Path]) -> None:
    """Draw sorted bars, spreads and published values beside them; what is missing says so."""
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axis = plt.subplots(figsize=(6.2, 0.32 * len(bars.bars) + 1.3), layout="constrained")
        names = [name for name, _ in bars.bars]
        for place, (_, value) in enumerate(bars.bars):
            _bar(axis, place, value)
        for verified, edge, label in ((True, COLOURS[1], "published"), (False, GREY, "published, unverified")):
            theirs = [(one.value, names.index(name)) for name, one in bars.published if one.verified is verified]
            if theirs:
                xs, ys = zip(*theirs, strict=True)
                axis.plot(xs, ys, "D", markerfacecolor="white", markeredgecolor=edge, zorder=4, label=label)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.margins(x=0.14)
        axis.set(title=bars.title, xlabel=bars.unit)
        axis.title.set_wrap(True)
        _legend(figure, [axis], ["published"], 2)
        _save(figure, paths)


def _bar(axis: Axes, place: int, value: Value) -> None:
    if value.mean is None:
        across = axis.get_yaxis_transform()
        axis.text(0.99, place, "missing", transform=across, ha="right", va="center", color=GREY, style="italic")
        return
    axis.barh(place, value.mean, xerr=value.std, color=COLOURS[0 if value.mean >= 0 else 1], capsize=3, zorder=3)
    edge = value.mean + math.copysign(value.std or 0, value.mean)
    right = value.mean >= 0
    axis.annotate(
        f"{value.mean:+.1f}", (edge, place), (4 if right else -4, 0), textcoords="offset points",
        ha="left" if right else "right", va="center",
    )  # fmt: skip


def draw_reliability(details: Sequence[Detail], paths: Iterable[Path]) -> None:
    """Draw how often predictions are right against how sure they are, a panel for each dataset."""
    with plt.rc_context(STYLE):
        columns = _across(len(details))
        rows = -(-len(details) // columns)
        size = (3.0 * columns, 3.0 * rows + 0.6)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, detail in zip(axes.flat, details, strict=False):
            axis.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle="--")
            for i, (name, ece, bins) in enumerate(detail.reliability):
                there = [(one.confidence, one.accuracy) for one in bins if one.n]
                axis.plot(*zip(*there, strict=True), color=COLOURS[i], marker=MARKERS[i], markersize=4, label=name)
                axis.text(4, 97 - 8 * i, f"ECE {ece:.1f} %", va="top", color=COLOURS[i], fontsize=8)
            axis.set(xlim=(0, 100), ylim=(0, 100), title=detail.dataset, aspect="equal")
        for number, axis in enumerate(axes.flat):
            axis.set_visible(number < len(details))
            axis.set_xlabel("confidence (%)" if number + columns >= len(details) else "")
            axis.set_ylabel("accuracy (%)" if number % columns == 0 else "")
        names = list(dict.fromkeys(name for detail in details for name, _, _ in detail.reliability))
        _legend(figure, axes.flat, names, 2 if columns > 1 else 1)
        _save(figure, paths)


def _across(panels: int) -> int:
    """Return how many panels stand side by side: three or four, whichever leaves fewer places empty."""
    return panels if panels <= ACROSS else min((ACROSS, ACROSS - 1), key=lambda columns: -panels % columns)


def _styles(curves: Curves) -> dict[str, tuple[str, str]]:
    """Return each label's colour and marker, the same in all panels."""
    lines: dict[str, Line] = {}
    for panel in curves.panels:
        for line in panel.lines:
            lines.setdefault(line.label, line)
    stars = [label for label, line in lines.items() if line.star]
    others = [label for label in lines if label not in stars]
    styles = {label: ("black", STARS[i % len(STARS)]) for i, label in enumerate(stars)}
    styles |= {
        label: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, label in enumerate(others)
    }
    return {label: styles[label] for label in lines}


def _places(curves: Curves) -> dict[float, float]:
    """Return where each x stands: by doublings, 0 one doubling before the first; or where it is."""
    xs = {x for panel in curves.panels for line in panel.lines for x, _ in (*line.points, *line.published)}
    if not curves.log2:
        return {x: x for x in sorted(xs)}
    first = min((math.log2(x) for x in xs if x > 0), default=1.0)
    return {x: math.log2(x) if x > 0 else first - 1 for x in sorted(xs)}


def _line(axis: Axes, line: Line, places: dict[float, float], colour: str, marker: str) -> None:
    size = 11 if line.star else 5
    nan = float("nan")
    ours = [(places[x], nan if value.mean is None else value.mean, value.std or 0) for x, value in line.points]
    if ours:
        xs, means, stds = zip(*ours, strict=True)
        there = any(mean == mean for mean in means)
        axis.errorbar(
            xs, means, stds, color=colour, marker=marker, markersize=size, capsize=2,
            linestyle="" if line.star else "-", alpha=1 if there else 0.3,
            label=line.label if there else f"{line.label}{MISSING}",
        )  # fmt: skip
    for verified in (True, False):
        theirs = [(places[x], published.value) for x, published in line.published if published.verified is verified]
        if theirs:
            colour = colour if verified else GREY
            axis.plot(
                *zip(*theirs, strict=True), color=colour, marker=marker, markersize=size, markerfacecolor="none",
                linestyle="" if line.star else ":", linewidth=1, label=_published_label(line, verified),
            )  # fmt: skip


def _published_label(line: Line, verified: bool) -> str:
    return f"{line.label} (published{'' if verified else ', unverified'})"


def _say_missing(axis: Axes, published: bool) -> None:
    place, words = ((0.98, 0.03), "ours missing") if published else ((0.5, 0.5), "missing")
    align = ("right", "bottom") if published else ("center", "center")
    axis.text(*place, words, transform=axis.transAxes, ha=align[0], va=align[1], color=GREY, style="italic")
    if not published:
        axis.set_yticks([])
        axis.grid(False)


def _legend(figure: Figure, axes: Iterable[Axes], names: Sequence[str], columns: int) -> None:
    """Put one legend below all panels, ours before theirs."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    kept = [
        label for label in found if label.removesuffix(MISSING) == label or label.removesuffix(MISSING) not in found
    ]
    order = {name: i for i, name in enumerate(names)}
    ordered = sorted(kept, key=lambda label: order.get(label.removesuffix(MISSING), len(order)))
    if ordered:
        handles = [found[label] for label in ordered]
        figure.legend(handles, ordered, loc="outside lower center", ncols=min(columns, len(ordered)), fontsize=9)


def _save(figure: Figure, paths: Iterable[Path]) -> None:
    figure.draw_without_rendering()  # lays the panels out, once for all formats
    figure.set_layout_engine("none")
    for path in paths:
        undated = {"CreationDate": None} if path.suffix == ".pdf" else {"Date": None} if path.suffix == ".svg" else None
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=undated)
    plt.close(figure)
