"""A table as text for the terminal, Markdown, CSV or LaTeX."""

import io
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from coop.errors import unknown
from coop.report.table import FORMATS, Table


def render(table: Table, form: str, width: int | None = None) -> str:
    """Return the table in one of FORMATS; `width` is the terminal's, for `text`. CSV has a line for each cell."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "csv":
        return table.cells.to_csv(index=False, float_format="%.4f")
    grid = _grid(table)
    if form == "markdown":
        flat = grid.set_axis([str(column) for column in grid.columns], axis=1)
        return flat.to_markdown(index=False) + "\n\n" + "\n".join(_caption(table)) + "\n"
    if form == "latex":
        latex = grid.map(latex_text).set_axis([latex_text(str(column)) for column in grid.columns], axis=1)
        styled = latex.style.hide(axis="index").to_latex(hrules=True, column_format="l" * len(grid.columns))
        return styled + "".join(f"% {line}\n" for line in _caption(table))
    return _text(table, grid, width)


def _text(table: Table, grid: pd.DataFrame, width: int | None) -> str:
    rich = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in grid.columns:
        rich.add_column(str(column), justify="left" if column in table.rows else "right", overflow="fold")
    for row in grid.itertuples(index=False):
        rich.add_row(*map(str, row))
    out = io.StringIO()
    console = Console(file=out, width=200 if width is None else width, highlight=False, markup=False)
    console.print(rich)
    for line in _caption(table):
        console.print(line, style="dim")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _grid(table: Table) -> pd.DataFrame:
    """Return the cells as text, a column for each value of the column keys; missing cells are empty."""
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    columns: list[str] = []
    for cell in table.cells.to_dict("records"):
        key = tuple(_word(cell[name]) for name in table.rows)
        column = ", ".join(f"{name} {_word(cell[name])}" for name in table.columns)
        if column not in columns:
            columns.append(column)
        lines.setdefault(key, {})[column] = _cell(cell)
    ordered = [column for column in _sorted_columns(table) if column in columns]
    rows = [[*key, *(cells.get(column, "") for column in ordered)] for key, cells in lines.items()]
    return pd.DataFrame(rows, columns=[*table.rows, *ordered])


def _sorted_columns(table: Table) -> list[str]:
    """Return the column labels, numbers by size and words (test sets) in the order in which runs have them."""
    seen: dict[tuple[Any, ...], int] = {}
    for cell in table.cells.to_dict("records"):
        seen.setdefault(tuple(cell[name] for name in table.columns), len(seen))

    def order(values: tuple[Any, ...]) -> list[float]:
        return [float(v) for v in values if isinstance(v, (int, float))] + [float(seen[values])]

    return [
        ", ".join(f"{name} {_word(v)}" for name, v in zip(table.columns, values, strict=True))
        for values in sorted(seen, key=order)
    ]


def _cell(cell: dict[Any, Any]) -> str:
    text = f"{cell['mean']:.1f}"
    if cell["std"] == cell["std"] and cell["n"] > 1:
        text += f" ±{cell['std']:.1f}"
    if cell["difference"] == cell["difference"] and cell.get("method") != "zero_shot":
        text += f" ({cell['difference']:+.1f})"
    return f"{text} n={cell['n']}" if cell["n"] > 1 else text


def _word(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def latex_text(text: Any) -> str:
    """Return a cell's text with LaTeX's special characters escaped."""
    out = str(text)
    for plain, escaped in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
        out = out.replace(plain, escaped)
    return out.replace("±", r"$\pm$").replace("{}", r"\{\}") if "textbackslash" not in out else out


def _caption(table: Table) -> list[str]:
    words = table.value.replace("_", " ")
    return [
        f"{words} in %: mean ± standard deviation over seeds (difference to zero-shot with the dataset's template); "
        "n runs; an average is over n datasets",
        *table.notes,
    ]
