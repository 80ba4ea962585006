"""From the words of a command line to keys and values, and from grids of them to runs."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from coop.config import GROUPS, check_keys, chosen_method, group_choices, unused_keys
from coop.errors import CoopError, first_line, short

if TYPE_CHECKING:  # where no words are parsed, a command does not wait for Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

Values = dict[str, Any]  # of one run: what its keys are given


@dataclass(frozen=True)
class Assignment:
    """A key of the command line and the values that it takes, one after the other."""

    key: str
    values: tuple[Any, ...]
    text: str


def parse(words: Sequence[str]) -> list[Assignment]:
    """Return what KEY=VALUE words ask for, by Hydra's grammar: commas, range(1,4) and glob(*) give several values.

    A value with `{}` and a space is one text, commas included, as is a value that the grammar cannot read. Raises
    CoopError for an unknown key and for words that add to the configuration or take from it.
    """
    return [_assignment(word) for word in words]


def _assignment(word: str) -> Assignment:
    from hydra.core.override_parser.types import Glob, OverrideType

    key, equals, value = word.partition("=")
    plain = key.lstrip("+~").strip()
    if not equals and not word.startswith("~"):
        raise CoopError(f"'{short(word)}' is no KEY=VALUE")
    if plain.split(".")[0].split("/")[0] == "hydra":
        raise CoopError(
            f"{short(word)}: nothing reads it; results=FOLDER says where runs go, and "
            "hydra/launcher=slurm or local_gpus starts a sweep elsewhere"
        )
    check_keys([plain])
    if key != plain:
        raise CoopError(f"{short(word)}: keys are given values, not added or taken away: {plain}=VALUE")
    override = _parsed(key, value)
    if override.type != OverrideType.CHANGE or override.package is not None:
        raise CoopError(f"{short(word)}: give KEY=VALUE")
    if not override.is_sweep_override():
        return Assignment(key, (override.value(),), word)
    found: Any = override.value()
    if isinstance(found, Glob):
        if key not in GROUPS:
            raise CoopError(f"{short(word)}: glob(...) chooses from the names of {', '.join(GROUPS)}")
        return Assignment(key, tuple(found.filter(list(group_choices(key)))), word)
    if not override.is_discrete_sweep():
        raise CoopError(f"{short(word)}: give a list of values: {key}=A,B or {key}=range(1,4)")
    texts = list(override.sweep_string_iterator())
    return Assignment(key, tuple(_parsed(key, text).value() for text in texts), word)


@cache
def _parser() -> "OverridesParser":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parsed(key: str, value: str) -> "Override":
    """Parse KEY=VALUE; `key` is known to be a plain one."""
    from hydra.errors import HydraException

    if "{}" in value and value.strip()[:1] not in ("'", '"', "["):
        pieces = [value] if " " in value else value.split(",")
        value = ",".join(_quoted(piece) if "{}" in piece else piece for piece in pieces)
    try:
        return _parser().parse_override(f"{key}={value}")
    except HydraException as error:
        if value.strip()[:1] in ("'", '"', "[", "{"):
            raise CoopError(f"{short(f'{key}={value}')}: {first_line(error)}") from error
    try:
        return _parser().parse_override(f"{key}={_quoted(value)}")
    except HydraException as error:
        raise CoopError(f"{short(f'{key}={value}')}: {first_line(error)}") from error


def parsed_value(key: str, value: str) -> Any:
    """Return one value as the grammar reads it. Raises CoopError for several values."""
    override = _parsed("value", value)
    if override.is_sweep_override():
        raise CoopError(f"{short(f'{key}={value}')}: give one value")
    return override.value()


def single(words: Sequence[str]) -> Values:
    """Return the keys and values of one run. Raises CoopError where a key has several values."""
    values: Values = {}
    for assignment in parse(words):
        if len(assignment.values) != 1:
            raise CoopError(f"{short(assignment.text)}: several values are a sweep: coop run -m ...")
        values[assignment.key] = assignment.values[0]
    return values


def combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[Values]:
    """Yield every combination of the values of a grid, the last key changing fastest."""
    for combination in product(*grid.values()):
        yield dict(zip(grid, combination, strict=True))


def applied(jobs: Iterable[Values], must: Iterable[str] = ()) -> tuple[list[Values], str]:
    """Return the jobs, each once, without keys that their methods do not use, and a line on those keys.

    Raises CoopError, with the reason, for a key in `must` that no job uses.
    """
    kept: dict[str, Values] = {}
    unused: dict[str, dict[str, str]] = {}
    used: set[str] = set()
    for job in jobs:
        idle = unused_keys(job)
        for key, reason in idle.items():
            unused.setdefault(key, {}).setdefault(chosen_method(job), reason)
        job = {key: value for key, value in job.items() if key not in idle}
        used.update(job)
        kept.setdefault(json.dumps(job, sort_keys=True, default=str), job)
    for key in must:
        if key in unused and key not in used:
            raise CoopError(f"{key}: {'; '.join(dict.fromkeys(unused[key].values()))}")
    by_methods: dict[str, list[str]] = {}
    for key, methods in unused.items():
        by_methods.setdefault(", ".join(methods), []).append(key)
    parts = [f"{', '.join(keys)} do{'es' * (len(keys) == 1)} not apply to {of}" for of, keys in by_methods.items()]
    return list(kept.values()), "; ".join(parts)


def sweep(words: Sequence[str]) -> tuple[list[Values], str]:
    """Return the keys and values of every run of a grid, and a line on the keys that not all methods use."""
    grid = {assignment.key: assignment.values for assignment in parse(words)}
    return applied(combinations(grid), grid)


def split_launch_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words on how a sweep is launched (hydra/launcher, hydra.launcher.*, jobs), and the other words."""
    ours = [text for text in words if re.match(r"[+~]*(hydra[./](launcher|sweeper)\b|jobs=)", text)]
    return ours, [text for text in words if text not in ours]


def word(key: str, value: Any) -> str:
    """Return KEY=VALUE as the command line takes it."""
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(item) for item in value)}]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_/.~][\w./~-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return str(value)
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """Return `text` in double quotes, by the grammar's rules: backslashes count only before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'
