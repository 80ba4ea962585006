"""Numbers as a page prints them: a true minus sign, and as many decimals as the papers that they stand beside."""

from collections.abc import Iterable

from coop.report.content import Grid, Published, Value

MINUS = "\u2212"


def number(value: float, decimals: int = 1) -> str:
    """Return the number with a fixed number of decimals.

    >>> number(-0.04), number(-1.25, 2)
    ('0.0', '\u22121.25')
    """
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


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


def decimals_of(published: Iterable[Published]) -> int:
    """Return 2 where a paper prints hundredths, else 1."""
    return 2 if any(abs(one.value * 10 - round(one.value * 10)) > 1e-6 for one in published) else 1


def decimals_of_grid(grid: Grid) -> int:
    """Return the decimals of a table's numbers."""
    return decimals_of(one for _, values in grid.rows for value in values if value for one in value.published)


def spoken(value: Value, decimals: int = 1) -> str:
    """Return a value in words, for those who hear the page."""
    if value.mean is None:
        return f"failed: {value.error}" if value.state == "failed" else value.state
    spread = f" ± {number(value.std, decimals)}" if value.std is not None and value.n > 1 else ""
    return f"{number(value.mean, decimals)}{spread}"
