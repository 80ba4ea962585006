"""CoOp's `split_zhou_*.json`: train, val and test lists of [path, label, class name]."""

import hashlib
import json
from pathlib import Path
from typing import Any

from coop.data.content import PARTS, Content, Row, check_rows, names_of, split_of
from coop.data.description import Description, OfficialSplit
from coop.errors import CoopError


def load_json(path: Path) -> Any:
    """Return what a JSON file holds; CoopError if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CoopError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CoopError(f"{path} is not a JSON file: {error}") from error


def load_split_file(path: Path) -> dict[str, list[Row]]:
    """Return the rows of a split file by part, in the file's order; raises CoopError for any other shape."""
    content = load_json(path)
    if not isinstance(content, dict) or not {"train", "test"} <= set(content) <= set(PARTS):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CoopError(f"{path} is not a split file: expected the lists train, val and test, found {found[:100]}")
    parts: dict[str, list[Row]] = {}
    for part in PARTS:
        rows = content.get(part, [])
        if not isinstance(rows, list):
            raise CoopError(f"{path}: '{part}' must be a list of [path, label, class name], not {type(rows).__name__}")
        check_rows(rows, f"{path}: '{part}'")
        parts[part] = [(row[0], row[1], row[2]) for row in rows]
    return parts


def read_split_file(description: Description, path: Path) -> Content:
    """Read the split from `path` and say whether it is the official file."""
    parts = load_split_file(path)
    names = names_of(parts, str(path), description.same_names)
    splits = {part: split_of(rows) for part, rows in parts.items()}
    return Content(names, splits, describe_source(description.official_split, path))


def describe_source(official: OfficialSplit | None, path: Path) -> str:
    """Return the split file's name, marked where it is known not to be the official one.

    >>> describe_source(None, Path("mine.json"))
    'mine.json'
    """
    if official is None or official.sha256 is None:
        return path.name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.name if digest == official.sha256 else f"{path.name} (not the official file: sha256 {digest[:12]})"


def find_split_file(description: Description, folder: Path) -> Path | None:
    """Return the user's split file, else the official one if it lies in `folder`, else None."""
    if description.split_file:
        path = Path(description.split_file).expanduser()
        for candidate in (path, folder / path):
            if candidate.is_file():
                return candidate
        raise CoopError(f"dataset.split_file={description.split_file}: no such file, here or in {folder}")
    if description.official_split is None:
        return None
    official = folder / description.official_split.file
    return official if official.is_file() else None
