"""Published numbers to stand beside ours, a file for each study, and what others report of reproducing them.

Where they come from:

- Every row names its paper, table and `source`: where the number was read, which often is a paper or a repository that
  repeats it. A number that two sources give has two rows. All are in percent; `gain` is a difference in points.
- A source that says UNVERIFIED was recalled and never checked: `verified` is false, and it is no target.
- `label` is a series of the study where the row has its settings. Any other label is another system, or one whose
  settings are not known to be ours: it is shown beside ours, never subtracted from it.
- No value is changed, averaged or rounded (open_clip's fractions became percent); an `average` is one that was
  published. Left out are numbers that were read from a picture, of which two versions are remembered, or that are known
  to be copied wrongly (there the corrected value stands, unverified).
"""

import csv
from collections.abc import Callable
from typing import Any

import pandas as pd

from coop.errors import CoopError
from coop.io import resource_folder

FOLDER = "experiments/published"
ORIGIN = ("paper", "table", "source", "verified", "note")
COLUMNS = ("label", "dataset", "backbone", "shots", "target", "metric", "value", *ORIGIN)
WORDS = ("label", "dataset", "backbone", "shots", "position", "word", "distance", *ORIGIN)
REPRODUCTIONS = ("study", "what", "published", "reproduced", "source", "note")
METRICS = ("accuracy", "gain")


def published(study: str) -> pd.DataFrame:
    """Return the study's published numbers: COLUMNS, a row each; empty if there are none.

    `shots` is 0 where nothing is trained, or `all`; `target` names a test set as results do. `backbone` is empty where
    the source does not say it. Raises CoopError for a damaged file.
    """
    return _read(study, COLUMNS, {"shots": _shots, "metric": _metric, "value": float, "verified": _truth})


def published_words() -> pd.DataFrame:
    """Return the published words nearest to learned contexts: WORDS, a row for each vector, `position` from 1.

    `distance` is Euclidean, NaN where none was printed. Raises CoopError for a damaged file.
    """
    return _read("words", WORDS, {"shots": _shots, "position": int, "distance": _maybe, "verified": _truth})


def reproductions(study: str) -> pd.DataFrame:
    """Return what others report of reproducing the study's published numbers: REPRODUCTIONS, all text."""
    rows = _read("reproductions", REPRODUCTIONS, {})
    return rows[rows["study"] == study].reset_index(drop=True)


def _read(name: str, columns: tuple[str, ...], kinds: dict[str, Callable[[str], Any]]) -> pd.DataFrame:
    path = resource_folder(FOLDER) / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file, strict=True)
    except (ValueError, OSError, csv.Error) as error:
        raise CoopError(f"{path} cannot be read ({error}): install the toolkit again") from error
    if tuple(header) != columns:
        raise CoopError(f"{path} has the columns {', '.join(header)}: it must have {', '.join(columns)}")
    for line, values in enumerate(lines, start=2):
        if len(values) != len(columns):
            raise CoopError(f"{path}, line {line}: {len(values)} values for {len(columns)} columns")
    rows = pd.DataFrame(lines, columns=header, dtype=str)
    for column, kind in kinds.items():
        converted = []
        for line, text in enumerate(rows[column], start=2):
            try:
                converted.append(kind(text))
            except ValueError as error:
                raise CoopError(f"{path}, line {line}: {column} is {text!r} ({error})") from error
        rows[column] = pd.Series(converted, dtype=object if column == "shots" else None)
    for line, row in enumerate(rows.to_dict("records"), start=2):
        if not row["source"] or row.get("verified") is ("UNVERIFIED" in row["source"]):
            raise CoopError(
                f"{path}, line {line}: source {row['source']!r} does not go with verified={row.get('verified')}"
            )
    return rows


def _shots(text: str) -> int | str:
    return text if text == "all" else int(text)


def _maybe(text: str) -> float:
    return float(text or "nan")


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text == "true"


def _metric(text: str) -> str:
    if text not in METRICS:
        raise ValueError(f"none of {', '.join(METRICS)}")
    return text
