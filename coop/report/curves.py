"""The demonstration's picture, accuracy against shots (CoOp, Figure 3), and its bars for the terminal."""

from pathlib import Path

import pandas as pd
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from coop.report.content import Curves, Line, Panel, Value
from coop.report.figures import draw_curves as draw
from coop.report.table import AVERAGE, Table


def draw_curves(table: Table, path: Path) -> None:
    """Draw a panel for each dataset of a table whose columns are shots, a line for each method with its spread.

    The file's ending chooses the format: .png, .svg or .pdf.
    """
    draw(curves_of(table), [path])


def curves_of(table: Table) -> Curves:
    """Return the curves that a table with shots as columns holds."""
    kinds = [key for key in table.rows if key != "dataset"]
    panels = []
    for dataset, cells in table.cells.groupby("dataset", sort=False):
        if dataset != AVERAGE:
            groups = cells.groupby(kinds, dropna=False, sort=False) if kinds else [((), cells)]
            panels.append(Panel(str(dataset), tuple(_line(group, kinds) for _, group in groups)))
    x, y = "shots (training images per class)", f"{table.value.replace('_', ' ')} (%)"
    return Curves("curve", f"{table.value.replace('_', ' ').capitalize()} against shots", x, y, tuple(panels))


def _line(cells: pd.DataFrame, kinds: list[str]) -> Line:
    points = []
    for cell in cells.to_dict("records"):
        spread = cell["std"] if cell["n"] > 1 else None
        points.append((float(cell["shots"]), Value("done", cell["mean"], spread, int(cell["n"]), int(cell["n"]))))
    return Line(_name(cells.iloc[0], kinds), tuple(points), star=all(shots == 0 for shots, _ in points))


def _name(cell: pd.Series, kinds: list[str]) -> str:
    words = [str(cell["method"])] if "method" in kinds else []
    words += [f"{key} {cell[key]}" for key in kinds if key not in ("method", "backbone") and cell[key] == cell[key]]
    return ", ".join(word for word in words if not word.endswith(" None"))


def bars(table: Table, width: int = 50) -> RenderableType:
    """Return a bar for each cell, for the terminal: 0 to 100 %."""
    grid = RichTable.grid(padding=(0, 2))
    for cell in table.cells.to_dict("records"):
        if cell.get("dataset") == AVERAGE:
            continue
        what = _name(pd.Series(cell), table.rows[1:])
        shots = f"{cell['shots']} shots" if cell["shots"] else ""
        grid.add_row(what, shots, Bar(100, 0, cell["mean"], width=width), f"{cell['mean']:.1f} %")
    return Group(grid)
