"""Progress bars: on a terminal only, on standard error, gone when done."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_shown: list[Progress] = []  # at most one: bars within bars are lines of the same display


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Open the display, or join the one that is open; silent when standard error is not a terminal."""
    if _shown:
        yield _shown[0]
        return
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with display:
        _shown.append(display)
        try:
            yield display
        finally:
            _shown.pop()


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done."""
    with progress_display() as display:
        task = display.add_task(description, total=total)
        try:
            for item in items:
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)
