"""Bars around zero, and a reliability diagram, as lengths that a page can draw."""

from collections.abc import Sequence
from dataclasses import dataclass

from coop.report.content import Bars, Bin, Detail

SIDE = 200  # units of a reliability diagram's square
FEW = 10  # classes shown at either end of a long list; those between are folded away


@dataclass(frozen=True)
class Span:
    """A bar's left edge and width in percent of its track."""

    left: float
    width: float


def spans(values: Sequence[float | None]) -> tuple[list[Span | None], float]:
    """Return a bar for each value, None where it is missing, on one scale with zero; and where zero is, in percent."""
    known = [value for value in values if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    size = (high - low) or 1.0
    zero = -low / size * 100

    def span(value: float) -> Span:
        left, right = sorted((zero, (value - low) / size * 100))
        return Span(round(left, 2), round(right - left, 2))

    return [None if value is None else span(value) for value in values], round(zero, 2)


def bar_spans(bars: Bars) -> tuple[list[Span | None], dict[str, Span], float]:
    """Return our bars, by name the published ones (whose tips the page marks), and where zero is."""
    both, zero = spans([*(value.mean for _, value in bars.bars), *(one.value for _, one in bars.published)])
    theirs = both[len(bars.bars) :]
    marks = {name: span for (name, _), span in zip(bars.published, theirs, strict=True) if span}
    return both[: len(bars.bars)], marks, zero


def class_spans(detail: Detail) -> tuple[list[Span | None], float]:
    """Return a bar for the gain of each class, and where zero is."""
    return spans([one.learned - one.baseline for one in detail.classes])


def split_classes(detail: Detail) -> tuple[int, int]:
    """Return where the classes that are folded away begin and end: between the most gained and the most lost."""
    count = len(detail.classes)
    return (count, count) if count <= 2 * FEW + 4 else (FEW, count - FEW)


@dataclass(frozen=True)
class BinShape:
    """A bin of a reliability diagram in SIDE units: its bar, its confidence, the height of its count, and words."""

    x: float
    width: float
    y: float | None
    confidence: float | None
    count: float  # 0 to 1, of the fullest bin
    words: str


def bin_shapes(bins: Sequence[Bin]) -> list[BinShape]:
    """Return the bins' shapes. `low`, `high`, confidence and accuracy are in percent."""
    most = max((one.n for one in bins), default=0) or 1
    shapes = []
    for one in bins:
        words = f"confidence {one.low:g} to {one.high:g} %: {one.n} images"
        if one.accuracy is not None and one.confidence is not None:
            words += f", {one.accuracy:.1f} % right at a mean confidence of {one.confidence:.1f} %"
        shapes.append(
            BinShape(
                x=one.low / 100 * SIDE,
                width=(one.high - one.low) / 100 * SIDE,
                y=None if one.accuracy is None else SIDE - one.accuracy / 100 * SIDE,
                confidence=None if one.confidence is None else SIDE - one.confidence / 100 * SIDE,
                count=one.n / most,
                words=words,
            )
        )
    return shapes
