"""Tables of the frame: rows and columns of cells, averages, published numbers; as text, Markdown, CSV or LaTeX."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from coop.errors import CoopError, unknown
from coop.report.frame import (
    AVERAGE,
    NOT_SETTINGS,
    OWN,
    SEEDS,
    TEST_WARNING,
    Cell,
    Value,
    averages,
    cells_of,
    dividing,
    heading,
    in_order,
    key_name,
    listed,
    metric_name,
    shown,
    text_of,
    where,
)
from coop.report.published import Publications
from coop.runs.store import PER_CLASS

if TYPE_CHECKING:
    from coop.runs.study import TablePart

FORMATS = ("text", "markdown", "csv", "latex")
DAGGER = "†"  # a number whose settings were chosen on the test images
COMPARED = ("dataset", "backbone", "protocol", "shots")  # rows that are the same in these compete for the best number


@dataclass(frozen=True)
class Grid:
    """A table: row headers (a text for each key), and a value for each column; None where none is planned."""

    id: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Value | None, ...]], ...]
    notes: tuple[str, ...] = ()
    value: str = "accuracy"
    cells: tuple[Cell, ...] = field(default=(), repr=False)  # all of them, averages last

    def best(self) -> set[tuple[int, int]]:
        """Return the places (row, column) of the best of our numbers in a column, among rows of the same dataset."""
        sign = -1 if self.value == "ece" else 1
        groups: dict[tuple[Any, ...], list[tuple[float, int, int]]] = {}
        for i, (keys, values) in enumerate(self.rows):
            for j, value in enumerate(values):
                if value is not None and value.mean is not None:
                    same = tuple(key for name, key in zip(self.keys, keys, strict=True) if name in COMPARED)
                    groups.setdefault((same, j), []).append((sign * value.mean, i, j))
        out = set()
        for found in groups.values():
            if len(found) > 1:
                best = max(round(mean, 4) for mean, _, _ in found)
                out |= {(i, j) for mean, i, j in found if round(mean, 4) == best}
        return out


def make_grid(
    frame: pd.DataFrame,
    rows: Sequence[str],
    columns: Sequence[str],
    value: str = "accuracy",
    published: Publications | None = None,
    study: Sequence[str] = (),
    id: str = "table",
    title: str = "",
) -> Grid:
    """Return a table of the frame; `study` names the datasets that published averages are over.

    Settings that tell rows of the frame apart and are not named become row headers.
    """
    rows = [*rows, *dividing(frame, [*rows, *columns])]
    return _grid(frame, rows, columns, value, published or Publications(), study, id, title, heading)


def _grid(
    frame: pd.DataFrame,
    rows: Sequence[str],
    columns: Sequence[str],
    value: str,
    published: Publications,
    study: Sequence[str],
    id: str,
    title: str,
    column_name: Callable[[str, Any], str],
) -> Grid:
    """Return the table whose rows and columns tell all cells apart."""
    keys = list(dict.fromkeys([*rows, *columns]))
    several = frame["dataset"].nunique() > 1 and "dataset" in rows
    cells = cells_of(frame, keys, value)
    means = averages(cells, keys, study) if "dataset" in keys else []
    values: dict[tuple[tuple[str, ...], str], Value] = {}

    def name(keys: Mapping[str, Any]) -> str:
        own = several and "target" in columns and keys["target"] in (keys["dataset"], OWN)
        return ", ".join(OWN if own and key == "target" else column_name(key, keys[key]) for key in columns)

    for cell in [*cells, *means]:
        place = tuple(text_of(cell.keys[key]) for key in rows), name(cell.keys)
        values[place] = replace(cell.value, published=published.of(cell, value))
    ordered = in_order(cells, columns)
    names = list(dict.fromkeys([*(name(cell.keys) for cell in ordered), *(column for _, column in values)]))
    headers = _ordered(values)
    known = {"label", "dataset", "backbone", "shots", "target"}
    if "label" in rows and set(keys) <= known:
        for about, numbers in published.others(cells, keys, value):
            place = tuple(text_of(about[key]) for key in rows), name(about)
            if place[1] in names:
                headers += [] if place[0] in headers else [place[0]]
                values[place] = Value("missing", published=numbers, note="published only")
                published.mark_shown(about)
    return Grid(
        id=id,
        title=title or f"{metric_name(value).capitalize()} by {' and '.join(map(key_name, rows))}",
        keys=tuple(rows),
        columns=tuple(names),
        rows=tuple((row, tuple(values.get((row, column)) for column in names)) for row in headers),
        notes=(*grid_notes(frame, value), *_average_notes(means)),
        value=value,
        cells=(*cells, *means),
    )


def study_grid(frame: pd.DataFrame, show: "TablePart", published: Publications, study: Sequence[str], id: str) -> Grid:
    """Return the table that a study's file asks for."""
    chosen = where(frame, show.where)
    return make_grid(chosen, show.rows, show.columns, show.value, published, study, id, show.title or "")


def _ordered(values: Mapping[tuple[tuple[str, ...], str], Value]) -> list[tuple[str, ...]]:
    """Return the row headers: averages first, and last the datasets (or whatever comes first) that lack everything."""
    headers = list(dict.fromkeys(row for row, _ in values))
    there = {row[0] for (row, _), value in values.items() if value.mean is not None}
    averaged = [row for row in headers if AVERAGE in row]
    rest = [row for row in headers if row not in averaged]
    return [*averaged, *(row for row in rest if row[0] in there), *(row for row in rest if row[0] not in there)]


def _average_notes(means: Sequence[Cell]) -> list[str]:
    notes = {
        f"averages are {part}": None
        for cell in means
        for part in cell.value.note.split("; ")
        if part.startswith("over ") and cell.value.state == "partial"
    }
    return list(notes)


def grid_notes(frame: pd.DataFrame, value: str) -> list[str]:
    """Return what readers must know of a table's numbers: their unit, validation, tuning, splits."""
    notes = [
        f"{metric_name(value)} in %: mean ± standard deviation over n runs with different seeds (none for a single "
        "run); differences are to zero-shot with the dataset's template, in points"
    ]
    done = frame[frame["state"] == "done"]
    by_rule: dict[str, dict[str, None]] = {}
    what = "label" if "label" in done else "method"
    if "validation" in done:
        for rule, name in zip(done["validation"], done[what], strict=True):
            if rule is not None:
                by_rule.setdefault(str(rule), {})[shown(what, str(name))] = None
    for rule, names in by_rule.items():
        who = listed(names, "series" if what == "label" else "methods")
        text = f"{who}: settings are chosen for each run on validation images (validation={rule})"
        notes.append(f"{DAGGER} {who}: {TEST_WARNING}" if rule == "test" else text)
    if len(done) and "test" not in by_rule:
        free = "no setting is chosen on validation images" if not by_rule else "the other series choose none"
        same = "; settings are the same for all datasets" if done["dataset"].nunique() > 1 else ""
        notes.append(f"{free}{same}{tuned_note(done, what)}")
    if value == "accuracy":
        notes += class_mean_notes(done)
    for key, words in (("own_split", "own split, not the official one"), ("unofficial", "not the official split file")):
        found = done.loc[done[key].astype(bool), "dataset"].unique() if key in done else ()
        if len(found):
            notes.append(f"{', '.join(shown('dataset', str(name)) for name in found)}: {words}")
    return notes


def class_mean_notes(done: pd.DataFrame) -> list[str]:
    """Return a note of zero-shot's mean per-class accuracies, where they are not its accuracies: CLIP's metric."""
    zero = done[(done["method"] == "zero_shot") & ((done[PER_CLASS] - done["accuracy"]).abs() >= 5e-4)]
    several = [key for key in ("target", "backbone", "precision", "template") if zero[key].nunique(dropna=False) > 1]
    parts = []
    for row in zero.to_dict("records"):
        names = [shown(key, text_of(row[key])) for key in ("dataset", *several) if row[key] is not None]
        parts.append(f"{' '.join(dict.fromkeys(names))} {100 * row[PER_CLASS]:.1f}")
    about = (
        "mean per-class accuracy of zero-shot, which CLIP's paper reports for Pets, Flowers, Aircraft and Caltech101"
    )
    return [f"{about}: {', '.join(dict.fromkeys(parts))}"] if parts else []


def tuned_note(done: pd.DataFrame, what: str) -> str:
    """Return which settings a series has differently on different datasets, if there are any."""
    place = [key for key in (what, "backbone", "protocol", "shots", "target") if key in done and key != "target"]
    other = {*place, *NOT_SETTINGS, "dataset", "data", "target", "targets", "validation", "label"}
    settings = [str(key) for key in done if key not in other and done[key].map(repr).nunique() > 1]
    inside = dividing(done, [*place, "dataset"], settings)
    tuned = [key for key in dividing(done, [*place, *inside], settings) if key not in inside]
    return f", but {', '.join(tuned)}, which differ between datasets" if tuned else ""


# The table of `coop table`: whatever runs lie in a results folder.


def make_table(
    frame: pd.DataFrame,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    value: str = "accuracy",
) -> Grid:
    """Return the table of runs with their `difference`.

    Unless given, columns are the shots, or the targets where a run has several; rows are all else that differs.
    Raises CoopError for unknown keys, and where runs that differ in more than their seed would be averaged.
    """
    keys = [key for key in frame.columns if key not in NOT_SETTINGS]
    for key in [*(rows or ()), *(columns or ())]:
        if key not in keys and key not in SEEDS:
            raise unknown("table key", key, keys)
    if columns is None:
        several = "target" not in (rows or ()) and bool(dividing(frame, ["run"], ["target"]))
        columns = ["target"] if several else ["shots"]
    if rows is None:
        basic = ["dataset", "backbone", *(["protocol"] if frame["protocol"].nunique() > 1 else []), "method"]
        basic += ["shots"] if "target" in columns else []
        rows = [key for key in basic if key not in columns]
        rows += dividing(frame, [*rows, *columns], [key for key in keys if key not in rows])
    else:
        _refuse_pooling(frame, [*rows, *columns])

    def name(key: str, one: Any) -> str:
        return f"{key} {text_of(one)}"

    return _grid(frame, list(rows), list(columns), value, Publications(), (), "table", "", name)


def _refuse_pooling(frame: pd.DataFrame, keys: Sequence[str]) -> None:
    mixed = dividing(frame, keys)
    if not mixed:
        return
    texts = {key: frame[key].map(lambda one: text_of(one, "null")) for key in mixed}
    in_turn = {
        key: sorted(set(some), key=lambda text: (not text.isdigit(), text.zfill(9))) for key, some in texts.items()
    }
    found = "; ".join(f"{key} ({', '.join(some)})" for key, some in in_turn.items())
    key = mixed[0]
    raise CoopError(
        f"a cell would average over more than seeds, over {found}: add {', '.join(mixed)} to --rows or --columns, "
        f"or choose one (--where {key}={texts[key].mode()[0]})"
    )


# Rendering.


def render(grid: Grid, form: str, width: int | None = None) -> str:
    """Return the table in one of FORMATS; `width` is the terminal's, for `text`. CSV has a line for each cell."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "csv":
        return to_csv(cell_frame(grid))
    if form == "markdown":
        return to_markdown(grid)
    return to_latex(grid) if form == "latex" else to_text(grid, width)


def cell_frame(grid: Grid) -> pd.DataFrame:
    """Return the cells as a frame, a line for each: keys, `mean`, `std`, `n`, `difference`, `datasets`, `note`."""
    lines = [
        {**cell.keys, **{name: getattr(cell.value, name) for name in ("mean", "std", "n", "difference")}}
        | {"datasets": len(cell.datasets) or 1, "note": TEST_WARNING if cell.value.on_test else None}
        for cell in grid.cells
        if cell.value.mean is not None
    ]
    return pd.DataFrame(lines)


def to_csv(frame: pd.DataFrame) -> str:
    """Return a frame as CSV; a text that a spreadsheet would run as a formula begins with an apostrophe."""

    def inert(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    plain = frame.astype(object).map(inert).infer_objects() if len(frame) else frame
    plain = plain.set_axis([inert(str(name)) for name in frame.columns], axis=1)
    return plain.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def cell_text(value: Value | None) -> str:
    """Return a value as a cell's text: '82.5 ±0.6 (+55.4) n=3 [paper 81.2: +1.3]'; empty where none is planned."""
    if value is None or (not value.planned and not value.published):
        return ""
    if value.mean is None:
        text = str(value.state) if value.planned else ""
    else:
        text = f"{value.mean:.1f}{DAGGER if value.on_test else ''}"
        text += f" ±{value.std:.1f}" if value.std is not None else ""
        text += f" ({value.difference:+.1f})" if value.difference is not None else ""
        text += f" n={value.n}" if value.n > 1 or value.state == "partial" else ""
        text += f" of {value.planned}" if value.n < value.planned else ""
    for number in value.published[:1]:
        away = f": {value.mean - number.value:+.1f}" if value.mean is not None and number.verified else ""
        text += f" [{'paper' if number.verified else 'unverified'} {number.value:g}{away}]"
    return text.strip()


def _texts(grid: Grid, display: bool = False) -> pd.DataFrame:
    rows = [
        [*(shown(key, text) if display else text for key, text in zip(grid.keys, row, strict=True)),
         *map(cell_text, values)]
        for row, values in grid.rows
    ]  # fmt: skip
    columns = [shown("column", name) if display else name for name in grid.columns]
    return pd.DataFrame(rows, columns=[*map(key_name, grid.keys), *columns], dtype=object)


def to_text(grid: Grid, width: int | None = None) -> str:
    """Return the table for a terminal of `width` characters; one that is too narrow gets a line for each cell."""
    texts = _texts(grid)
    widths = [max([len(str(name)), *texts.iloc[:, i].map(len)]) for i, name in enumerate(texts.columns)]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return _narrow(grid, width)
    rich = RichTable(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(texts.columns):
        rich.add_column(column, justify="left" if i < len(grid.keys) else "right", no_wrap=True)
    for row in texts.itertuples(index=False):
        rich.add_row(*row)
    return _printed(rich, max(width or 0, sum(widths) + 2 * len(widths)), grid.notes, width)


def _narrow(grid: Grid, width: int) -> str:
    """Return a block for each row: its headers, then a line for each cell."""
    rich = RichTable.grid(padding=(0, 2))
    rich.add_column(overflow="fold")
    rich.add_column(overflow="fold")
    for row, values in grid.rows:
        rich.add_row("  ".join(text for text in row if text != "-"), "")
        for column, value in zip(grid.columns, values, strict=True):
            if cell_text(value):
                rich.add_row(f"  {column}", cell_text(value))
    return _printed(rich, width, grid.notes, width)


def _printed(rich: RichTable, width: int, notes: Sequence[str], note_width: int | None) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(rich)
    console = Console(file=out, width=note_width or 1000, highlight=False, markup=False)
    for note in notes:
        console.print(note, style="dim")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def to_markdown(grid: Grid) -> str:
    """Return the table in Markdown, its notes below it."""
    texts = _texts(grid).map(_one_line).map(lambda text: text.replace("|", "\\|"))
    texts.columns = [_one_line(name).replace("|", "\\|") for name in texts.columns]
    sides = ["left"] * len(grid.keys) + ["right"] * len(grid.columns)
    table = texts.to_markdown(index=False, disable_numparse=True, colalign=sides if len(texts) else None)
    return table + "\n" + "".join(f"\n{note}\n" for note in grid.notes)


def to_latex(grid: Grid) -> str:
    """Return the table in LaTeX (booktabs): names as papers have them, the best of a column bold, notes as comments."""
    texts = _texts(grid, display=True).map(_one_line)
    names = [_one_line(name) for name in texts.columns]
    texts.columns = pd.Index([name + " " * names[:i].count(name) for i, name in enumerate(names)])
    bold = pd.DataFrame("", index=texts.index, columns=texts.columns)
    for i, j in grid.best():
        bold.iat[i, len(grid.keys) + j] = "textbf:--rwrap;"
    styled = texts.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    styled = styled.apply(lambda _: bold, axis=None)
    text: str = styled.to_latex(hrules=True, column_format="l" * len(grid.keys) + "r" * len(grid.columns))
    text = text.replace("±", r"$\pm$").replace(DAGGER, r"$^{\dagger}$").replace("(-", "($-$")
    text = re.sub(r" n=(\d+)", r" {\\scriptsize $n{=}\1$}", text)
    return text + "".join(f"% {_one_line(note)}\n" for note in grid.notes)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
