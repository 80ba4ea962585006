"""The one kind of error that a user can cause."""

from collections.abc import Iterable
from difflib import get_close_matches

MANY = 60  # more choices than this are not all listed
LONGEST = 300  # characters of a value or a library's message that an error shows


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
    """Return what an error of a library says, on one line and not longer than an error may be."""
    text = " ".join(str(error).strip().split("\n", 1)[0].split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


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
