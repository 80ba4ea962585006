"""What `coop report` writes: the page, and every table and figure as files of its own beside it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from coop.errors import CoopError
from coop.io import track, write_text
from coop.report.content import Bars, Curves, Detail, Grid, Report, Value, Words
from coop.report.figures import FORMATS, draw_bars, draw_curves, draw_reliability
from coop.report.page import write_page
from coop.report.render import latex_text
from coop.report.rows import rows_of

MANIFEST = ".files.json"  # what the last report wrote: what this one does not write again is removed
PAGE = "index.html"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the page, `figures/` and `tables/`, each file whole or not at all; return their paths, the page first.

    Files of an earlier report in the same folder are replaced or removed; others are left alone.
    """
    if folder.exists() and not folder.is_dir():
        raise CoopError(f"{folder} is a file: give a folder to write the report into (--output FOLDER)")
    write_page(report, folder / PAGE)
    written = [folder / PAGE]
    for part in track(report.parts, "writing", len(report.parts)):
        written += _files(part, folder)
    written += _together(report, folder)
    _forget_older(folder, written)
    return written


def _files(part: Grid | Curves | Bars | Words | Detail, folder: Path) -> list[Path]:
    """Write the files of one part."""
    if isinstance(part, (Words, Detail)):  # all of them share files
        return []
    paths = [folder / "tables" / f"{part.id}.csv"]
    write_text(paths[0], _csv(part))
    if isinstance(part, Grid):
        for ending, text in (("md", markdown(part)), ("tex", latex(part))):
            paths.append(folder / "tables" / f"{part.id}.{ending}")
            write_text(paths[-1], text)
        return paths
    figures = [folder / "figures" / f"{part.id}.{form}" for form in FORMATS]
    if isinstance(part, Curves) and part.panels:
        draw_curves(part, figures)
    elif isinstance(part, Bars) and part.bars:
        draw_bars(part, figures)
    else:
        return paths
    return [*paths, *figures]


def _together(report: Report, folder: Path) -> Iterator[Path]:
    """Write what many parts share: words, classes and confusions as tables, reliability as a figure."""
    words = [part for part in report.parts if isinstance(part, Words) and part.vectors]
    details = [part for part in report.parts if isinstance(part, Detail)]
    named = [("words", [row for part in words for row in rows_of(part)])]
    for label, baseline in dict.fromkeys((part.label, part.baseline) for part in details):
        some = [part for part in details if (part.label, part.baseline) == (label, baseline)]
        slug = re.sub(r"\W+", "-", f"{label} {baseline}".lower()).strip("-")
        named.append((f"classes-{slug}", [row for part in some for row in rows_of(part)]))
        named.append((f"confusions-{slug}", [{"dataset": p.dataset} | vars(c) for p in some for c in p.confusions]))
        drawn = [part for part in some if part.reliability]
        if drawn:
            figures = [folder / "figures" / f"reliability-{slug}.{form}" for form in FORMATS]
            draw_reliability(drawn, figures)
            yield from figures
    for name, rows in named:
        if rows:
            write_text(folder / "tables" / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.4f"))
            yield folder / "tables" / f"{name}.csv"


def _csv(part: Grid | Curves | Bars) -> str:
    return pd.DataFrame(rows_of(part)).to_csv(index=False, float_format="%.4f")


def _forget_older(folder: Path, written: list[Path]) -> None:
    """Remove what the report before wrote and this one did not, then note what this one wrote."""
    manifest = folder / MANIFEST
    now = sorted(path.relative_to(folder).as_posix() for path in written)
    try:
        before = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else []
    except ValueError:
        before = []
    for name in before:
        path = folder / str(name)
        if name not in now and ".." not in Path(str(name)).parts and not Path(str(name)).is_absolute():
            path.unlink(missing_ok=True)
    write_text(manifest, json.dumps(now, indent=1) + "\n")


def markdown(grid: Grid) -> str:
    """Return the table in Markdown, its notes below it."""
    frame = pd.DataFrame(_texts(grid), columns=[*grid.keys, *grid.columns])
    return frame.to_markdown(index=False) + "\n" + "".join(f"\n{note}\n" for note in grid.notes)


def latex(grid: Grid) -> str:
    """Return the table in LaTeX (booktabs), its notes as comments."""
    names = [latex_text(name) for name in (*grid.keys, *grid.columns)]
    frame = pd.DataFrame(_texts(grid), columns=names).map(latex_text)
    columns = "l" * len(grid.keys) + "r" * len(grid.columns)
    text: str = frame.style.hide(axis="index").to_latex(hrules=True, column_format=columns)
    return text + "".join(f"% {note}\n" for note in grid.notes)


def _texts(grid: Grid) -> list[list[str]]:
    return [[*row, *(cell_text(value) for value in values)] for row, values in grid.rows]


def cell_text(value: Value | None) -> str:
    """Return a value as a cell of a text table: '82.5 ±0.6 (+55.4) [paper 81.2: +1.3]'; empty where none is planned."""
    if value is None:
        return ""
    text = f"{value.mean:.1f}" if value.mean is not None else value.state if value.planned else ""
    if value.mean is not None and value.std is not None:
        text += f" ±{value.std:.1f}"
    if value.difference is not None:
        text += f" ({value.difference:+.1f})"
    if value.mean is not None and value.state == "partial":
        text += f" {value.n} of {value.planned} runs"
    for number in value.published[:1]:
        told = f"paper {number.value:g}" if number.verified else f"unverified {number.value:g}"
        if value.mean is not None and number.verified:
            told += f": {value.mean - number.value:+.1f}"
        text += f" [{told}]"
    return text.strip()
