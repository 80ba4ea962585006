"""A table as bars, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from coop.report.table import AVERAGE, Table


def _name(cell: Mapping[Any, Any], kinds: list[str]) -> str:
    words = [str(cell["method"])] if "method" in kinds else []
    words += [f"{key} {cell[key]}" for key in kinds if key not in ("method", "backbone") and cell[key] == cell[key]]
    return ", ".join(word for word in words if not word.endswith(" None"))


def bars(table: Table, width: int = 50) -> RenderableType:
    """Return a bar for each cell, for the terminal: 0 to 100 %."""
    grid = RichTable.grid(padding=(0, 2))
    for cell in table.cells.to_dict("records"):
        if cell.get("dataset") == AVERAGE:
            continue
        what = _name(cell, table.rows[1:])
        shots = f"{cell['shots']} shots" if cell["shots"] else ""
        grid.add_row(what, shots, Bar(100, 0, cell["mean"], width=width), f"{cell['mean']:.1f} %")
    return Group(grid)
