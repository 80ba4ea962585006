"""How a page is ordered: its sections, and the few numbers that stand first."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from coop.report.content import Bars, Curves, Detail, Grid, Report, Value, Words
from coop.report.page.numbers import direction, signed

Part = Grid | Curves | Bars | Words | Detail


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; neighbouring Words, and neighbouring Details, share one."""

    id: str
    title: str
    kind: str  # grid, curves, bars, words, detail
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Highlight:
    """A number that stands first: what it is, and whether it is good (up) or bad (down)."""

    number: str
    words: str
    direction: str = "same"


def sections(report: Report) -> list[Section]:
    """Return the sections in the report's order, with ids that no other has."""
    taken = {"top", "summary", "contents", "missing", "reproductions", "notes", "data"}
    made = []
    for kind, group in groupby(report.parts, key=lambda part: type(part).__name__.lower()):
        parts = tuple(group)
        if kind == "words":
            made.append(Section(_free("words", taken), "Nearest words", kind, parts))
        elif kind == "detail":
            made.append(Section(_free("classes", taken), "Class by class", kind, parts))
        else:
            titled = [part for part in parts if isinstance(part, Grid | Curves | Bars)]
            made += [Section(_free(part.id, taken), part.title, kind, (part,)) for part in titled]
    return made


def highlights(report: Report) -> list[Highlight]:
    """Return how much is done, the largest gain and loss, and how far our numbers are from verified published ones."""
    made = [Highlight(f"{report.done}\u202f/\u202f{report.planned}", "runs done")]
    if report.failed:
        made.append(Highlight(str(report.failed), "runs failed", "down"))
    made += _extremes(report)
    away = [ours - theirs for ours, theirs in _compared(report)]
    if away:
        words = f"median difference to the papers, over {len(away)} numbers"
        made.append(Highlight(signed(median(away)), words))
    return made


def _extremes(report: Report) -> list[Highlight]:
    """Return the first and the last bar of the first chart of bars."""
    bars = next((part for part in report.parts if isinstance(part, Bars)), None)
    known = [(value.mean, name) for name, value in bars.bars if value.mean is not None] if bars else []
    if not bars or not known:
        return []
    (best, gained), (worst, lost) = max(known), min(known)
    words = f"{bars.unit}, the {'smallest loss' if best < 0 else 'largest gain'}: {gained}"
    made = [Highlight(signed(best), words, direction(best))]
    if len(known) > 1:
        words = f"{bars.unit}, the {'largest loss' if worst < 0 else 'smallest gain'}: {lost}"
        made.append(Highlight(signed(worst), words, direction(worst)))
    return made


def _compared(report: Report) -> Iterator[tuple[float, float]]:
    """Yield (ours, theirs) of every value that stands beside a verified published number, each once."""
    values: dict[Value, None] = {}
    for part in report.parts:
        if isinstance(part, Grid):
            values.update((value, None) for _, row in part.rows for value in row if value is not None)
    for value in values:
        theirs = next((one.value for one in value.published if one.verified), None)
        if value.mean is not None and theirs is not None:
            yield value.mean, theirs


def _free(wanted: str, taken: set[str]) -> str:
    """Return an id made of `wanted` that is not taken, and take it."""
    base = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-") or "part"
    name = next(
        name for number in range(1, len(taken) + 2) if (name := base + f"-{number}" * (number > 1)) not in taken
    )
    taken.add(name)
    return name
