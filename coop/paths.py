"""Where files lie that are not code - descriptions that come with the toolkit, its cache - and how to write one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coop.errors import CoopError


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
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write, which takes its place if nothing fails, and goes if something does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
