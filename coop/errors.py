"""The one kind of error that a user can cause, and what a command says and returns for any error."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

MANY = 60  # more choices than this are not all listed
LONGEST = 300  # characters of a value or a library's message that an error shows
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}


class CoopError(Exception):
    """A user's mistake: what was asked, what was found, what to do. The command line prints it and exits with 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> CoopError:
    """Return the error for a `name` that is none of `choices`, with the closest match first.

    >>> unknown("dataset", "eurosta", ["dtd", "eurosat"]).args[0]
    "unknown dataset 'eurosta': did you mean 'eurosat'? Known: dtd, eurosat"
    """
    choices = sorted(choices)
    close = get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    if len(choices) > MANY:
        near = get_close_matches(name, choices, n=MANY // 2, cutoff=0.3) or choices[: MANY // 2]
        return CoopError(f"unknown {kind} '{name}': {hint}There are {len(choices)}, among them {', '.join(near)}")
    return CoopError(f"unknown {kind} '{name}': {hint}Known: {', '.join(choices)}")


def first_line(error: BaseException) -> str:
    """Return what an error of the system or of a library says, on one line and not longer than an error may be.

    What torch's restricted unpickler refuses comes without its advice to execute the file.
    """
    text = getattr(error, "strerror", None) or str(error).strip()
    for advice in ("from a trusted source.", "WeightsUnpickler error: "):
        text = text.rpartition(advice)[2].partition("Check the documentation")[0]
    lines = text.strip().splitlines() or [""]
    return one_line(" ".join(lines[: 1 + lines[0].endswith(":")]), LONGEST) or type(error).__name__


WANTED = {
    "to Integer": "a whole number",
    "to Float": "a number",
    "valid bool": "true or false",
    "type hint": "a whole number or a word",
    "to string": "a text",
}  # what OmegaConf says of a value of a wrong type


def wrong_value(error: Any, where: str = "") -> str:
    """Return what is wrong with the value that OmegaConf refuses for a key, whose first part is `where`."""
    key = ".".join(part for part in (where, str(error.full_key or "")) if part)
    if "value 'None'" in str(error):
        return f"{key}=null: it must have a value"
    wanted = next((wish for said, wish in WANTED.items() if said in str(error)), None)
    if wanted:
        return f"{key}={short(error.value)}: give {wanted}"
    return f"{key}: {first_line(error)}" if key else first_line(error)


def one_line(value: object, length: int = 200) -> str:
    """Return a value as an error shows it: printable, on one line, at most `length` characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def short(value: object, length: int = 100) -> str:
    """Return a value that a user gave as an error repeats it."""
    return one_line(value, length)


def raise_interruption(error: BaseException) -> None:
    """Raise KeyboardInterrupt if one is what led to `error`.

    A library whose clean-up fails when it is interrupted raises that failure instead (OmegaConf does).
    """
    chain: list[BaseException | None] = [error]
    for one in chain:
        if isinstance(one, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if one is not None:
            chain += [other for other in (one.__cause__, one.__context__) if other not in chain]


def explanation(error: BaseException) -> tuple[int, str]:
    """Return a command's exit code for an error and its sentence, which is empty for an error of our own code.

    2 is a user's mistake, 1 what the system refuses (room, permission, memory), 130 an interruption.
    """
    try:
        raise_interruption(error)
    except KeyboardInterrupt:
        return 130, "interrupted; what is finished is kept, and the same command goes on with the rest"
    cause = error.__cause__
    if isinstance(error, CoopError):
        return (1 if isinstance(cause, OSError) and cause.errno in REFUSALS else 2), str(error)
    if isinstance(error, FileExistsError):  # of mkdir
        return 1, f"{error.filename} is in the way: it is no folder, or a link that leads nowhere"
    if isinstance(error, OSError):
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        return 1, f"{first_line(error)}{': ' if places else ''}{' -> '.join(places)}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # numpy's, torch's
        return 1, "there is not enough memory"
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return 1, f"there is not enough memory on the GPU: {first_line(error)}"
    return 1, ""
