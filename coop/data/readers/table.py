"""A CSV of your own: path, label, class name, split; all but path and one of the two class columns may be left out."""

import csv
from collections.abc import Mapping
from pathlib import Path

from coop.data.content import PARTS, Content, Row, names_of, split_of
from coop.data.description import Description
from coop.data.own_split import THREE_WAY_RULE, carve_val, own_split, three_way
from coop.data.readers.class_folders import PART_FOLDERS
from coop.errors import CoopError

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path"),
    "label": ("label", "class_id", "target"),
    "class name": ("class name", "class_name", "classname", "class", "name"),
    "split": ("split", "part", "set"),
}


def read_csv(description: Description, folder: Path) -> Content:
    """Read `dataset.file`; paths are relative to `dataset.root`, or to the CSV's own folder without it."""
    path = csv_file(description)
    cells = _read_cells(path)
    rows = _rows(cells, path)
    names = names_of({"csv": rows}, str(path), description.same_names)
    if "split" in cells[0]:
        return _given_split(names, rows, [cell["split"] for cell in cells], path, description.split_seed)
    whole = split_of(rows)
    places = three_way(whole.labels, names, description.split_seed)
    parts = dict(zip(PARTS, map(whole.subset, places), strict=True))
    return Content(names, parts, f"{path.name}; {own_split(THREE_WAY_RULE, description.split_seed)}")


def csv_file(description: Description) -> Path:
    """Return the CSV's path; CoopError if none is given or it is not there."""
    if not description.file:
        raise CoopError("dataset=csv needs dataset.file=FILE: a CSV with the columns path, label, class name, split")
    path = Path(description.file).expanduser()
    if not path.is_file():
        raise CoopError(f"dataset.file={description.file}: no such file")
    return path


def _read_cells(path: Path) -> list[Mapping[str, str]]:
    """Return the table's rows by our own column names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            lines = [line for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CoopError(f"cannot read {path} as a CSV: {error}") from error
    known = {spelling: column for column, spellings in COLUMNS.items() for spelling in spellings}
    columns = [known.get(name, "") for name in header]
    doubled = [column for column in COLUMNS if columns.count(column) > 1]
    if "path" not in columns or not {"label", "class name"} & set(columns) or doubled:
        raise CoopError(
            f"{path}: the first line must name the columns path, label, class name, split; "
            f"label or class name may be missing, and split; found {', '.join(header) or 'nothing'}"
        )
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise CoopError(f"{path}, row {number}: {len(line)} cells, but the first line names {len(header)} columns")
    if not lines:
        raise CoopError(f"{path} lists no images")
    return [{c: cell.strip() for c, cell in zip(columns, line, strict=True) if c} for line in lines]


def _rows(cells: list[Mapping[str, str]], path: Path) -> list[Row]:
    """Return rows with both label and name; the missing one follows from the other, names in sorted order."""
    if "label" not in cells[0]:
        order = {name: label for label, name in enumerate(sorted({cell["class name"] for cell in cells}))}
        return [(cell["path"], order[cell["class name"]], cell["class name"]) for cell in cells]
    rows = []
    for number, cell in enumerate(cells, start=2):
        if not cell["label"].isdecimal() or len(cell["label"]) > 9:
            raise CoopError(f"{path}, row {number}: the label '{cell['label']}' is not a number from 0 on")
        rows.append((cell["path"], int(cell["label"]), cell.get("class name", cell["label"])))
    return rows


def _given_split(names: list[str], rows: list[Row], parts: list[str], path: Path, seed: int) -> Content:
    by_part: dict[str, list[Row]] = {part: [] for part in PARTS}
    spellings = {spelling: part for part, several in PART_FOLDERS.items() for spelling in several}
    for number, (row, part) in enumerate(zip(rows, parts, strict=True), start=2):
        if part.lower() not in spellings:
            raise CoopError(f"{path}, row {number}: the split '{part}' is none of train, val, test")
        by_part[spellings[part.lower()]].append(row)
    splits = {part: split_of(of_part) for part, of_part in by_part.items()}
    source = path.name
    if not by_part["val"] and by_part["train"]:
        train, val = carve_val(splits["train"].labels, seed)
        splits["train"], splits["val"] = splits["train"].subset(train), splits["train"].subset(val)
        source += f"; {own_split('val is 20 % of every class of train', seed)}"
    return Content(names, splits, source)
