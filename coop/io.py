"""Where files lie that are not code - descriptions that come with the toolkit, its cache - and how to write one."""

import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from coop.errors import CoopError

ASSETS = Path(__file__).resolve().parent / "assets"


def resource_folder(name: str) -> Path:
    """Return the folder `name` (conf, datasets, experiments/studies) that came with this toolkit.

    An installed wheel has it inside the package; a checkout has it beside the package, which the project file tells
    apart from a library called `datasets` that happens to be installed there.
    """
    package = Path(__file__).resolve().parent
    inside, beside = package / name, package.parent / name
    if inside.is_dir():
        return inside
    if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
        return beside
    raise CoopError(f"this installation has no folder '{name}' (looked in {inside} and {beside}): install it again")


def cache_folder() -> Path:
    """Return the folder for what can be computed again: COOP_CACHE, or ~/.cache/coop."""
    return Path(os.environ.get("COOP_CACHE") or Path.home() / ".cache" / "coop").expanduser()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which takes its place if nothing fails, and goes if something does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
