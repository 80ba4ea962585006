"""Class names: from folder names, from a file of names, or from ImageNet's `classnames.txt`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from coop.data.paths import ODD, shortened
from coop.data.split_file import load_json
from coop.errors import CoopError

NUMBERED = re.compile(r"^\d+\s*[._\- ]\s*(?=\S)")


def cleaned(folders: Sequence[str]) -> list[str]:
    """Return readable names: underscores become spaces; a number in front goes if every folder has one.

    >>> cleaned(["001.Black_footed_Albatross", "002.Laysan_Albatross"])
    ['Black footed Albatross', 'Laysan Albatross']
    """
    names = list(folders)
    if names and all(NUMBERED.match(name) for name in names):
        names = [NUMBERED.sub("", name) for name in names]
    names = [re.sub(r"[_\s]+", " ", name).strip() for name in names]
    return [name or folder for name, folder in zip(names, folders, strict=True)]


def read_keyed_names(path: Path) -> dict[str, str]:
    """Return {WordNet id: class name} from lines of `id name`, in the file's order."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        key, _, name = line.partition(" ")
        if not name.strip():
            raise CoopError(f"{path}, line {number}: expected 'id name', found '{line}'")
        names[key] = name.strip()
    return names


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CoopError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def renamed(names: Sequence[str], file: Path) -> list[str]:
    """Return the class names that `file` gives: a text file or JSON list of all, in label order, or JSON {old: new}.

    An old name that does not exist and a number of names other than that of the classes are errors.
    """
    if file.suffix.lower() != ".json":
        return _all_names(names, read_lines(file), file)
    content = load_json(file)
    if isinstance(content, list):
        return _all_names(names, content, file)
    if isinstance(content, Mapping):
        strange = sorted(set(content) - set(names))
        if strange:
            raise CoopError(f"{file} renames '{strange[0]}', which is no class of {', '.join(names[:5])}, ...")
        return _all_names(names, [content.get(name, name) for name in names], file)
    raise CoopError(f"{file} must hold a list of class names or {{old name: new name}}, not {type(content).__name__}")


def _all_names(old: Sequence[str], new: Sequence[object], file: Path) -> list[str]:
    if len(new) != len(old):
        raise CoopError(f"{file} gives {len(new)} names for {len(old)} classes: give one per class, in label order")
    names = []
    for name in new:
        if not isinstance(name, str) or not name.strip() or ODD.search(name):
            raise CoopError(f"{file}: {shortened(name)} is not a class name")
        names.append(name.strip())
    return names
