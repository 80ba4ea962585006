"""The numbers of a report's parts as rows: one for each cell, point, bar, word or class."""

from collections.abc import Iterator
from typing import Any

from coop.report.content import Bars, Curves, Detail, Grid, Published, Value, Words

Row = dict[str, Any]


def rows_of(part: Grid | Curves | Bars | Words | Detail) -> list[Row]:
    """Return everything that a part shows, flat."""
    if isinstance(part, Grid):
        return list(_grid(part))
    if isinstance(part, Curves):
        return list(_curves(part))
    if isinstance(part, Bars):
        published = dict(part.published)
        return [{"name": name, **_value(value), **_published(published.get(name))} for name, value in part.bars]
    return list(_words(part) if isinstance(part, Words) else _classes(part))


def _grid(part: Grid) -> Iterator[Row]:
    for row, values in part.rows:
        for column, value in zip(part.columns, values, strict=True):
            if value is not None:
                numbers = value.published or (None,)
                for number in numbers:
                    about = dict(zip(part.keys, row, strict=True))
                    yield {**about, "column": column, **_value(value), **_published(number)}


def _curves(part: Curves) -> Iterator[Row]:
    for panel in part.panels:
        for line in panel.lines:
            ours, theirs = dict(line.points), dict(line.published)
            for x in sorted({*ours, *theirs}):
                value = _value(ours.get(x) or Value("missing"))
                yield {"panel": panel.title, "label": line.label, "x": x, **value, **_published(theirs.get(x))}


def _value(value: Value) -> Row:
    return {
        "state": value.state if value.planned else "not ours",
        "mean": value.mean,
        "std": value.std,
        "n": value.n,
        "planned": value.planned,
        "difference": value.difference,
        "runs": " ".join(value.runs),
        "note": "; ".join(text for text in (value.note, value.error) if text),
    }


def _published(number: Published | None) -> Row:
    if number is None:
        return {"published": None, "verified": None, "source": None}
    return {"published": number.value, "verified": number.verified, "source": number.source}


def _words(part: Words) -> Iterator[Row]:
    for vector, near in enumerate(part.vectors, start=1):
        for rank, word in enumerate(near, start=1):
            yield {
                "prompt": part.title,
                "vector": vector,
                "rank": rank,
                "word": word.text,
                "distance": word.distance,
                "run": part.run,
            }


def _classes(part: Detail) -> Iterator[Row]:
    for gain in part.classes:
        yield {
            "dataset": part.dataset,
            "class": gain.name,
            part.baseline: gain.baseline,
            part.label: gain.learned,
            "gain": gain.learned - gain.baseline,
            "images": gain.n,
        }
