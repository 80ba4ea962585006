"""Progress bars: on a terminal only, on standard error, gone when done."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """Return a rich progress display that is silent when standard error is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done."""
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)
