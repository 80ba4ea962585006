"""Named studies: what each runs, what it reproduces, and which of its runs are there.

A study is a file `experiments/studies/<name>.yaml`. Its `series` are grids of runs, each with the label that tables and
curves give it; a label's {key} is filled in from a run's configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FOLDER = "experiments/studies"


@dataclass
class Series:
    """A grid: every combination of the values of `grid`, which are Hydra's keys and groups."""

    label: str
    grid: dict[str, Any]


@dataclass
class Study:
    """A study's file. `show` lists what its report has, in order (see coop/report)."""

    name: str
    title: str
    reproduces: str  # paper, table or figure
    about: str  # what is compared and what to expect, for people
    grid: dict[str, Any]  # what all series share; a series' own grid wins
    series: list[Series]
    show: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """A planned run: the series that it belongs to, what identifies it without its data, and how to ask for it."""

    label: str
    about: Mapping[str, Any]
    targets: tuple[str, ...]
    overrides: tuple[str, ...]
