"""The page of a report: one HTML file that loads nothing and runs no script but its own."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coop.io import write_text
from coop.report.detail import ClassGain, Detail
from coop.report.figures import (
    COLOURS,
    DOWN,
    GREY,
    INK,
    MINUS,
    MUTED,
    RULE,
    UP,
    Bars,
    Curves,
    Style,
    bars_spec,
    inline_svg,
    panel_spec,
    reliability_spec,
    styles_of,
)
from coop.report.frame import Published, Value
from coop.report.summary import Missing
from coop.report.tables import DAGGER, Grid, key_name, shown
from coop.report.words import Words, word_text

HERE = Path(__file__).resolve().parent
WIDE, NARROW = {1: (900, 330), 2: (460, 260)}, (300, 210)  # panels: by how many there are; on small screens
MANY_CLASSES, ENDS = 28, 12  # more classes than these are folded, but for those at both ends
PLAIN = {INK: "ink", MUTED: "muted", RULE: "rule", GREY: "grey", UP: "up", DOWN: "down"}  # a figure's colours, a page's


Made = Grid | Curves | Bars | Words | Detail


@dataclass(frozen=True)
class Report:
    """Everything that a page shows, in its order."""

    name: str
    title: str
    reproduces: str
    about: str
    facts: tuple[tuple[str, str], ...]  # what was run
    summary: tuple[str, ...]  # sentences, the most important first
    planned: int
    done: int
    failed: int
    made: str  # date and time
    versions: tuple[tuple[str, str], ...]
    parts: tuple[Made, ...]
    reproductions: tuple[dict[str, str], ...] = ()
    missing: tuple[Missing, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()  # folders and reasons
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; neighbouring words, and neighbouring details, share one."""

    id: str
    title: str
    kind: str
    parts: tuple[Made, ...]


@dataclass(frozen=True)
class Highlight:
    """A number that stands first: what it is, and whether it is good (up) or bad (down)."""

    number: str
    words: str
    direction: str = "same"


class Sources:
    """Where each number of the page comes from, once: cells and marks refer to it by a number.

    A table and a curve often show the same value, and many values share a run: each is written down once.
    """

    def __init__(self) -> None:
        self._numbers: dict[Value | Published, int] = {}
        self._counts = {Value: 0, Published: 0}
        self._runs: dict[str, int] = {}

    def __call__(self, number: Value | Published) -> str:
        """Return the name of a number: v12 of ours, p3 of a published one."""
        if number not in self._numbers:
            self._numbers[number] = self._counts[type(number)]
            self._counts[type(number)] += 1
        return f"{'v' if isinstance(number, Value) else 'p'}{self._numbers[number]}"

    def data(self) -> dict[str, Any]:
        """Return what the script needs; ask when everything has been drawn."""
        values = [self._record(number) for number in list(self._numbers) if isinstance(number, Value)]
        published = [vars(number) for number in self._numbers if isinstance(number, Published)]
        return {"values": values, "published": published, "runs": list(self._runs)}

    def _record(self, value: Value) -> dict[str, Any]:
        record = vars(value) | {
            "runs": [self._runs.setdefault(run, len(self._runs)) for run in value.runs],
            "published": [int(self(one)[1:]) for one in value.published],
        }
        rounded = {key: round(v, 4) if isinstance(v, float) else v for key, v in record.items()}
        return {key: entry for key, entry in rounded.items() if entry not in (None, "", [], ()) and entry is not False}


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """Return the page. Its policy allows no request, and no script but its own, whatever a report's texts say."""
    script = "(() => {\n'use strict';\n" + (HERE / "page.js").read_text(encoding="utf-8") + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "direction": direction, "word": word_text}
    charts = _Charts(styles_of(report.parts))
    made = sections(report)
    return environment.get_template("page.html").render(
        report=report, sections=made, highlights=highlights(report), charts=charts, sources=charts.sources, shown=shown,
        key_name=key_name, split_classes=split_classes, class_spans=class_spans, decimals_of=decimals_of, dagger=DAGGER,
        policy=policy, script=Markup(script), style=Markup((HERE / "page.css").read_text(encoding="utf-8") + colours()),
    )  # fmt: skip


class _Charts:
    """The charts of a page, and the numbers behind their marks."""

    def __init__(self, styles: dict[str, Style]) -> None:
        self.styles, self.sources = styles, Sources()

    def panel(self, panel: Any, curves: Curves, count: int) -> Markup:
        """Return a panel, for the width that it has beside others, and for a small screen."""
        name = f"{shown('dataset', panel.title)}: {curves.y} against {curves.x}. Arrow keys move between points."
        sizes = [(WIDE[count], "wide"), (NARROW, "narrow")] if count in WIDE else [(NARROW, "")]
        specs = [(panel_spec(panel, curves, self.styles, size, source=self.sources), kind) for size, kind in sizes]
        return Markup("".join(inline_svg(spec, name, kind) for spec, kind in specs))

    def bars(self, bars: Bars) -> Markup:
        """Return sorted bars, wide and narrow."""
        name = f"{bars.title}. Arrow keys move between bars."
        sizes = ((760, "wide"), (240, "narrow"))
        return Markup("".join(inline_svg(bars_spec(bars, n, False, self.sources), name, f"list {k}") for n, k in sizes))

    def reliability(self, detail: Detail) -> Markup:
        """Return a reliability diagram."""
        name = f"{shown('dataset', detail.dataset)}: confidence against accuracy. Arrow keys move between bins."
        return Markup(inline_svg(reliability_spec(detail, self.styles), name))

    def series(self, part: Curves) -> list[Style]:
        """Return how the series of a chart look, for its legend."""
        labels = dict.fromkeys(line.label for panel in part.panels for line in panel.lines)
        return [self.styles[label] for label in labels]


def colours() -> str:
    """Return the style rules that give the marks of figures the page's colours, light and dark."""
    rules = [
        f".chart [{kind}='{own}']{{{kind}:var(--{name})}}" for own, name in PLAIN.items() for kind in ("fill", "stroke")
    ]
    for light, dark in COLOURS:
        pair = f"light-dark({light},{dark})"
        rules += [f".chart [{kind}='{light}']{{{kind}:{pair}}}" for kind in ("fill", "stroke")]
    return "\n".join(rules) + "\n"


# What stands on the page, and in which order.


def sections(report: Report) -> list[Section]:
    """Return the sections in the report's order, with ids that no other has."""
    taken = {"top", "summary", "contents", "missing", "reproductions", "notes", "data", "facts"}
    made = []
    for kind, group in groupby(report.parts, key=lambda part: type(part).__name__.lower()):
        parts = tuple(group)
        if kind in ("words", "detail"):
            id, title = ("words", "Nearest words") if kind == "words" else ("classes", "Class by class")
            made.append(Section(_free(id, taken), title, kind, parts))
        else:
            made += [
                Section(_free(p.id, taken), p.title, kind, (p,)) for p in parts if not isinstance(p, Words | Detail)
            ]
    return made


def _free(wanted: str, taken: set[str]) -> str:
    base = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-") or "part"
    name = next(name for i in range(1, len(taken) + 2) if (name := base + f"-{i}" * (i > 1)) not in taken)
    taken.add(name)
    return name


def highlights(report: Report) -> list[Highlight]:
    """Return how much is done, the largest gain and loss, and how far our numbers are from verified published ones."""
    made = [Highlight(f"{report.done}\u202f/\u202f{report.planned}", "runs done")]
    if report.failed:
        made.append(Highlight(str(report.failed), "runs failed", "down"))
    bars = next((part for part in report.parts if isinstance(part, Bars)), None)
    known = [(value.mean, name) for name, value in bars.bars if value.mean is not None] if bars else []
    if bars and known:
        (best, gained), (worst, lost) = max(known), min(known)
        words = "smallest loss" if best < 0 else "largest gain"
        made.append(Highlight(signed(best), f"{bars.unit}, the {words}: {shown('dataset', gained)}", direction(best)))
        if len(known) > 1:
            words = "largest loss" if worst < 0 else "smallest gain"
            made.append(
                Highlight(signed(worst), f"{bars.unit}, the {words}: {shown('dataset', lost)}", direction(worst))
            )
    away = [ours - theirs for ours, theirs in _compared(report)]
    if away:
        made.append(Highlight(signed(median(away)), f"median difference to the papers, over {len(away)} numbers"))
    return made


def _compared(report: Report) -> Iterator[tuple[float, float]]:
    """Yield (ours, theirs) of every value that stands beside a verified published number, each once."""
    grids = [part for part in report.parts if isinstance(part, Grid)]
    for value in dict.fromkeys(v for grid in grids for _, row in grid.rows for v in row if v is not None):
        theirs = next((one.value for one in value.published if one.verified), None)
        if value.mean is not None and theirs is not None:
            yield value.mean, theirs


def split_classes(detail: Detail) -> tuple[int, int]:
    """Return where the folded middle of the classes begins and ends; nothing is folded where there are few."""
    count = len(detail.classes)
    return (ENDS, count - ENDS) if count > MANY_CLASSES else (count, count)


def class_spans(classes: tuple[ClassGain, ...]) -> tuple[list[tuple[float, float]], float]:
    """Return where the bar of each class begins and how long it is, and where zero is, in percent of the room."""
    gains = [one.learned - one.baseline for one in classes]
    low, high = min([0.0, *gains]), max([0.0, *gains])
    scale = 100 / ((high - low) or 1.0)
    return [(round((min(g, 0) - low) * scale, 2), round(abs(g) * scale, 2)) for g in gains], round(-low * scale, 2)


# Numbers as a page prints them: a true minus sign, and as many decimals as the papers beside them.


def number(value: float, decimals: int = 1) -> str:
    """Return the number with a fixed number of decimals.

    >>> number(-0.04), number(-1.25, 2)
    ('0.0', '\u22121.25')
    """
    text = f"{value:.{decimals}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", MINUS)


def signed(value: float, decimals: int = 1) -> str:
    """Return a difference: a plus where it is above zero.

    >>> signed(3.14), signed(0.01)
    ('+3.1', '0.0')
    """
    text = number(value, decimals)
    return f"+{text}" if float(f"{value:.{decimals}f}") > 0 else text


def direction(value: float, decimals: int = 1) -> str:
    """Return the class that colours a difference: up, down or same, as it is printed."""
    rounded = float(f"{value:.{decimals}f}")
    return "up" if rounded > 0 else "down" if rounded < 0 else "same"


def decimals_of(grid: Grid) -> int:
    """Return the decimals of a table's numbers: 2 where a paper prints hundredths, else 1."""
    numbers = [one.value * 10 for _, values in grid.rows for v in values if v for one in v.published]
    return 2 if any(abs(value - round(value)) > 1e-6 for value in numbers) else 1
