"""Tables of a report: a row and a column for what its cells are, averages over datasets, published numbers beside."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coop.report.averages import averages
from coop.report.beside import Beside
from coop.report.cells import (
    Cell,
    Record,
    cells_of,
    dividing,
    is_baseline,
    metric_name,
    said,
    value_of,
    where,
    with_key,
)
from coop.report.content import Grid, Value
from coop.report.table import AVERAGE

Place = tuple[tuple[str, ...], str]  # row headers, column


def make_grid(
    records: Sequence[Record], show: Mapping[str, Any], beside: Beside, whole: Sequence[str], id: str
) -> Grid:
    """Return the table that a study's file asks for; keys that it leaves out but cells differ in become row headers.

    `whole` names the study's own datasets.
    """
    metric = str(show.get("value", "accuracy"))
    chosen = where(records, show.get("where", {}))
    rows, columns = list(show["rows"]), list(show["columns"])
    rows += dividing(chosen, [*rows, *columns])
    keys = [*rows, *columns]
    cells = cells_of(chosen, keys)
    values = {_place(cell.keys, rows, columns): _beside(cell, beside, metric) for cell in cells}
    over: dict[str, None] = {}
    if "dataset" in keys:
        for average in averages(cells, keys, metric, whole):
            value = replace(average.value, published=beside.of_average(average, metric))
            if all(all(map(is_baseline, cell.records)) for cell in average.cells):
                value = replace(value, difference=None)
            values[_place(average.keys, rows, columns)] = value
            told = [part for part in value.note.split("; ") if part.startswith("over ")]
            over |= {f"averages are {part}": None for part in told if value.state == "partial"}
    headers = _ordered(values)
    names = [_heading(cell.keys, columns) for cell in sorted(cells, key=_by_columns(cells, columns))]
    names = list(dict.fromkeys([*names, *(column for _, column in values)]))
    _add_published_rows(values, headers, names, cells, rows, columns, beside, metric)
    return Grid(
        id=id,
        title=str(show.get("title") or f"{metric_name(metric).capitalize()} by {' and '.join(rows)}"),
        keys=tuple(rows),
        columns=tuple(names),
        rows=tuple((row, tuple(values.get((row, name)) for name in names)) for row in headers),
        notes=(*_notes(cells, metric), *over),
    )


def _beside(cell: Cell, beside: Beside, metric: str) -> Value:
    value = value_of(cell, metric)
    if all(map(is_baseline, cell.records)):
        value = replace(value, difference=None)  # to itself
    return replace(value, published=beside.of(cell, metric))


def _ordered(values: Mapping[Place, Value]) -> list[tuple[str, ...]]:
    """Return the row headers: averages first, and last the datasets (or whatever comes first) that lack everything."""
    headers = list(dict.fromkeys(row for row, _ in values))
    there = {row[0] for (row, _), value in values.items() if value.mean is not None}
    averaged = [row for row in headers if AVERAGE in row]
    rest = [row for row in headers if row not in averaged]
    return [*averaged, *(row for row in rest if row[0] in there), *(row for row in rest if row[0] not in there)]


def _place(keys: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str]) -> Place:
    return tuple(said(keys[key]) for key in rows), _heading(keys, columns)


def _heading(keys: Mapping[str, Any], columns: Sequence[str]) -> str:
    return ", ".join(AVERAGE if keys[key] == AVERAGE else with_key(key, keys[key]) for key in columns)


def _by_columns(cells: Sequence[Cell], columns: Sequence[str]) -> Any:
    """Return a sorting key: the order in which cells of the column keys alone would stand."""
    records = [record for cell in cells for record in cell.records]
    order = {_heading(cell.keys, columns): i for i, cell in enumerate(cells_of(records, columns))}
    return lambda cell: order[_heading(cell.keys, columns)]


def _add_published_rows(
    values: dict[Place, Value],
    headers: list[tuple[str, ...]],
    names: Sequence[str],
    cells: Sequence[Cell],
    rows: Sequence[str],
    columns: Sequence[str],
    beside: Beside,
    metric: str,
) -> None:
    """Add the rows of systems that only others measured, where the table's keys say all that they are."""
    keys = [*rows, *columns]
    if "label" not in rows or not set(keys) <= {"label", "dataset", "backbone", "shots", "target"}:
        return
    known = {key: list({repr(c.the(key)): c.the(key) for c in cells}.values()) for key in ("backbone", "dataset")}
    labels = [said(cell.the("label")) for cell in cells]
    fixed = {key: {said(cell.the(key)) for cell in cells} for key in ("dataset", "shots", "target") if key not in keys}
    for place, numbers in beside.others(labels, map(said, known["backbone"]), metric).items():
        about: dict[str, Any] = dict(zip(("label", "dataset", "backbone", "shots", "target"), place, strict=True))
        if any(about[key] not in allowed for key, allowed in fixed.items() if key != "target" or "dataset" not in keys):
            continue
        if about["shots"].isdigit():
            about["shots"] = int(about["shots"])
        header, column = _place(about, rows, columns)
        if column in names:
            if header not in headers:
                headers.append(header)
            values[header, column] = Value("missing", published=numbers, note="published only")
            beside.shown(place)


def _notes(cells: Sequence[Cell], metric: str) -> list[str]:
    differences = "differences are to zero-shot with the dataset's template, in points"
    notes = [f"{metric_name(metric)} in %: mean ± standard deviation over seeds; {differences}"]
    for key, words in (("own_split", "own split, not the official one"), ("unofficial", "not the official split file")):
        found = dict.fromkeys(said(r["dataset"]) for cell in cells for r in cell.records if r.get(key))
        if found:
            notes.append(f"{', '.join(found)}: {words}")
    return notes
