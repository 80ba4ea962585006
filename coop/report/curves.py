"""Accuracy against shots: a picture for each dataset, zero-shot as a star at 0 (CoOp, Figure 3), and terminal bars."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from coop.report.table import AVERAGE, Table

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too


def draw_curves(table: Table, path: Path) -> None:
    """Draw a panel for each dataset of a table whose columns are shots, a line for each method with its spread.

    The file's ending chooses the format: .png, .svg or .pdf.
    """
    datasets = [name for name in table.cells["dataset"].unique() if name != AVERAGE]
    columns = min(len(datasets), 4)
    lines = -(-len(datasets) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis, dataset in zip(axes.flat, datasets, strict=False):
        _panel(axis, table, table.cells[table.cells["dataset"] == dataset], str(dataset))
    for axis in axes.flat[len(datasets) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)


def _panel(axis: plt.Axes, table: Table, cells: pd.DataFrame, title: str) -> None:
    kinds = [key for key in table.rows if key != "dataset"]
    zero = cells[cells["shots"] == 0]
    for marker, (_, cell) in zip("*PXd", zero.iterrows(), strict=False):
        axis.plot(0, cell["mean"], marker=marker, color="black", markersize=12, linestyle="", label=_name(cell, kinds))
    trained = cells[cells["shots"] != 0]
    for colour, (_, line) in zip(_COLOURS * 9, trained.groupby(kinds, dropna=False, sort=False), strict=False):
        shots = [float(value) for value in line["shots"]]
        axis.errorbar(
            shots, line["mean"], line["std"], color=colour, marker="o", capsize=3, label=_name(line.iloc[0], kinds)
        )
    ticks = sorted({float(value) for value in cells["shots"]})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set(title=title, xlabel="shots (training images per class)", ylabel=f"{table.value.replace('_', ' ')} (%)")
    axis.grid(alpha=0.3)


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
