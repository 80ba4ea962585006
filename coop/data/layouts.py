"""From a description to a dataset: split files, class folders, CSV files, ImageNet and its variants, Aircraft."""

import csv
import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coop.data.annotations import ANNOTATIONS, read_fields, read_lines
from coop.data.dataset import (
    EMPTY,
    PARTS,
    Dataset,
    Split,
    check_folders_inside,
    dataset_digest,
    is_class_name,
    shortened,
)
from coop.data.images import SUFFIXES, unpacked_images
from coop.data.spec import DatasetSpec, dataset_folder, parse_description, prepare_command
from coop.data.splits import (
    Content,
    Row,
    check_distinct,
    completed,
    content_notes,
    content_of,
    find_split_file,
    load_json,
    load_split_file,
    names_of,
    split_of,
    split_source,
)
from coop.errors import CoopError, first_line, one_line, unknown
from coop.io import cache_folder, resource_folder, track, write_text

PART_FOLDERS = {  # the spellings in use, Hugging Face's imagefolder included
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HUB_FILE = "split.json"  # of dataset=hub
PART_OF = {spelling: part for part, spellings in PART_FOLDERS.items() for spelling in spellings}


def read_dataset(description: DatasetSpec | Mapping[str, Any], data_root: Path) -> Dataset:
    """Read and check the dataset that `description` (a YAML file of datasets/, with overrides) describes.

    Images themselves are not looked at: `check_images` does that for those that a run needs.
    """
    spec = description if isinstance(description, DatasetSpec) else parse_description(description)
    folder, root = _existing_folders(spec, data_root)
    file = find_split_file(spec, folder)
    if file:
        content = content_of(load_split_file(file), str(file), split_source(spec, file), spec.same_names)
    elif spec.reader in READERS:
        content = completed(READERS[spec.reader](spec, folder, root), spec.split_seed)
    else:
        raise unknown("reader", one_line(spec.reader), READERS)
    notes = list(content.notes)
    if "own split" in content.split_source:
        notes.insert(0, _own_split_note(spec, folder, content))
    if folder == bundled_sample(spec):
        notes.append(
            f"the sample of {spec.title} that ships with the toolkit; the whole dataset: coop data prepare {spec.name}"
        )
    follow_links = spec.follow_links or content.follow_links
    names = _class_names(spec, content, folder)
    train, val, test = (content.part(part) for part in PARTS)
    if not len(test):
        raise CoopError(f"dataset '{spec.name}' in {folder} has no test images to measure on")
    if not follow_links:
        for part in (train, val, test):
            check_folders_inside(root, part.paths, spec.name)
    return Dataset(
        name=spec.name,
        root=root,
        class_names=tuple(names),
        train=train,
        val=val,
        test=test,
        template=spec.template,
        split_source=content.split_source,
        digest=dataset_digest(names, train, val, test),
        notes=(*notes, *content_notes(content)),
        follow_links=follow_links,
        val_is_test=content.val_is_test,
    )


def bundled_sample(spec: DatasetSpec) -> Path | None:
    """Return the folder of a sample that ships with the toolkit and serves where the whole dataset is not there."""
    if spec.root or not spec.directory:
        return None
    folder = resource_folder("datasets") / spec.directory
    return folder if os.path.isdir(folder) else None


def _existing_folders(spec: DatasetSpec, data_root: Path) -> tuple[Path, Path]:
    """Return the dataset's folder and its image folder; images may lie there as a ZIP file, too."""
    if spec.reader == "csv" and not spec.root and not spec.directory:
        folder = csv_file(spec).parent
        return folder, folder
    folder = dataset_folder(spec, data_root)
    sample = bundled_sample(spec)
    if not os.path.isdir(folder) and sample:
        folder = sample
    if not os.path.isdir(folder):
        remedy = f"run '{prepare_command(spec)}' or give " if spec.directory else "correct "
        raise CoopError(f"dataset '{spec.name}' is not there: no folder {folder}; {remedy}dataset.root=FOLDER")
    root = folder / spec.images
    archive = root.with_name(f"{root.name}.zip") if spec.images != "." else None
    if archive and not os.path.isdir(root) and os.path.isfile(archive):
        return folder, unpacked_images(archive)
    if not os.path.isdir(root):
        remedy = f"run '{prepare_command(spec)}' to see what belongs there"
        raise CoopError(f"dataset '{spec.name}' has no image folder {root}: {remedy}")
    return folder, root


def read_hub(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read the list that `coop data prepare hub` wrote of the parts that the library has."""
    path = folder / HUB_FILE
    if not path.is_file():
        raise CoopError(f"dataset '{spec.name}' has no {path}: run '{prepare_command(spec)}', which writes it")
    parts = {part: rows for part, rows in load_split_file(path).items() if rows}
    return content_of(parts, str(path), spec.source, spec.same_names)


def read_annotations(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read the official annotation files, which CoOp's split file was made of."""
    try:
        parts = ANNOTATIONS[spec.reader](folder)
    except CoopError as error:
        split = f"has no {spec.official_split.file} in {folder}, and " if spec.official_split else ""
        raise CoopError(
            f"dataset '{spec.name}' {split}cannot be read from its annotation files ({error}): "
            f"run '{prepare_command(spec)}'"
        ) from error.__cause__ or error
    return content_of(parts, str(folder), "official annotation files", spec.same_names)


def _own_split_note(spec: DatasetSpec, folder: Path, content: Content) -> str:
    """Say that the split was made here, how large its parts are, and where an official file comes from."""
    sizes = ", ".join(f"{len(content.part(part))} {part}" for part in PARTS)
    if not spec.official_split:
        return f"the split was made here: {sizes} images"
    return (
        f"{spec.official_split.file} is not in {folder}, so the split is our own ({sizes} images) and results are not "
        f"comparable with published ones; the official file: {spec.official_split.url}"
    )


# Class names.

NUMBERED = re.compile(r"^\d+\s*[._\- ]\s*(?=\S)")


def cleaned(folders: Sequence[str]) -> list[str]:
    """Return readable names: underscores become spaces; a number in front goes if every folder has one.

    >>> cleaned(["001.Black_footed_Albatross", "002.Laysan_Albatross"])
    ['Black footed Albatross', 'Laysan Albatross']
    """
    names = list(folders)
    if names and all(NUMBERED.match(name) for name in names):
        names = [NUMBERED.sub("", name) for name in names]
    names = [re.sub(r"[_\s]+", " ", name).strip() for name in names]
    return [name or folder for name, folder in zip(names, folders, strict=True)]


def _readable(spec: DatasetSpec, names: Sequence[str]) -> list[str]:
    """Return class names as prompts have them: cleaned and renamed as the description says."""
    names = cleaned(names) if spec.clean_names else names
    strange = [] if spec.directory else sorted(set(spec.rename) - set(names))  # shipped descriptions rename absent ones
    if strange:
        known = one_line(", ".join(names[:5]))
        raise CoopError(f"dataset.rename: {shortened(strange[0])} is no class of {known}, ...")
    return [spec.rename.get(name, name) for name in names]


def _class_names(spec: DatasetSpec, content: Content, folder: Path) -> list[str]:
    """Return the class names, those of the user's file if given, no two alike."""
    names = content.class_names
    if spec.class_names:
        file = Path(os.path.expanduser(spec.class_names))
        names = _renamed(names, file if os.path.isfile(file) else folder / file)
    if not spec.same_names:
        check_distinct(names, f"dataset '{spec.name}'")
    return names


def _renamed(names: Sequence[str], file: Path) -> list[str]:
    """Return the class names that `file` gives: a text file or JSON list of all, in label order, or JSON {old: new}."""
    content = load_json(file) if file.suffix.lower() == ".json" else read_lines(file)
    if isinstance(content, Mapping):
        strange = sorted(set(content) - set(names))
        if strange:
            known = one_line(", ".join(names[:5]))
            raise CoopError(f"{file} renames {shortened(strange[0])}, which is no class of {known}, ...")
        content = [content.get(name, name) for name in names]
    if not isinstance(content, list):
        raise CoopError(f"{file} must hold a list of class names or {{old name: new name}}")
    if len(content) != len(names):
        counts = f"{len(content)} names for {len(names)} classes"
        raise CoopError(f"{file} gives {counts}: give one per class, in label order")
    for name in content:
        if not is_class_name(name):
            raise CoopError(f"{file}: {shortened(name)} is not a class name")
    return [name.strip() for name in content]


# Listing folders of class folders: sorted, and kept for the next time where it took long.

WORTH_KEEPING = 20_000  # files; fewer are listed as fast as a kept listing is checked
SETTLED = 2.0  # seconds: a folder changed later than this before listing may change again within its time stamp
LISTING_FORMAT = 2
JUNK = ("__MACOSX",)  # what unpacking leaves behind


def class_folders(root: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden and ignored ones."""
    try:
        with os.scandir(root) as entries:
            names = [e.name for e in entries if e.name[0] != "." and e.name not in (*JUNK, *ignore) and e.is_dir()]
    except OSError as error:
        raise CoopError(f"cannot list {root}: {error.strerror}") from error
    if any("\n" in name for name in names):
        raise CoopError(f"a folder in {root} has a line break in its name: rename it")
    return sorted(names)


def list_images(root: Path, below: str, folders: Sequence[str]) -> Split:
    """List the images in root/below/<folder> and in the folders inside it, sorted; labels index `folders`.

    Paths are relative to `root`. A long listing is kept in the cache until a folder changes.
    """
    place = root / below
    stamps = [os.stat(place / folder).st_mtime_ns for folder in ("", *folders)]
    key = json.dumps([LISTING_FORMAT, os.path.realpath(place), folders, SUFFIXES])
    kept = cache_folder() / "listings" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    names = _kept_names(kept, stamps)
    if names is None:
        names = [_image_names(place / folder) for folder in track(folders, f"listing {place}", total=len(folders))]
        settled = time.time() - max(stamps) / 1e9 > SETTLED
        nested = any("/" in name for of_folder in names for name in of_folder)  # their folders have stamps of their own
        if sum(map(len, names)) >= WORTH_KEEPING and settled and not nested:
            with suppress(OSError):  # a cache that cannot be written is no error
                write_text(kept, json.dumps({"stamps": stamps, "names": names}))
    prefix = f"{below}/" if below else ""
    paths = [f"{prefix}{folder}/{name}" for folder, of in zip(folders, names, strict=True) for name in of]
    return Split(paths, array("i", [label for label, of in enumerate(names) for _ in of]))


def _kept_names(kept: Path, stamps: list[int]) -> list[list[str]] | None:
    """Return the kept listing if it is whole and of these time stamps."""
    try:
        listing = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        return None
    return listing["names"] if listing["stamps"] == stamps else None


def _image_names(folder: Path) -> list[str]:
    """Return the images in a folder and in folders inside it, sorted; links to folders inside are not followed."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CoopError(f"cannot list {folder}: {error.strerror}") from error
    found = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    for name in set(names).difference(found, JUNK):
        inside = folder / name
        if name[0] != "." and inside.is_dir() and not inside.is_symlink():
            found += [f"{name}/{image}" for image in _image_names(inside)]
    if any("\n" in name for name in found):
        raise CoopError(f"an image in {folder} has a line break in its name: rename it")
    return sorted(found)


# Class folders: Caltech101, DTD, EuroSAT and Food101 without a split file, and your own.


def read_class_folders(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read one folder of class folders, a set in one piece."""
    folders = class_folders(root, spec.ignore)
    names = _folder_names(spec, root, folders)
    images = list_images(root, "", folders)
    empty = sorted(set(range(len(folders))) - set(images.labels))
    if empty:
        raise CoopError(f"the class folder {root / folders[empty[0]]} has no images")
    return Content(names, {"train": images}, "", follow_links=True)


def read_folder(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read a folder of your own: train, val and test folders of class folders, or one folder of class folders.

    `dataset.layout` says which; `auto` takes folders called train, val or test for parts.
    """
    found = class_folders(root, spec.ignore)
    parts = {part: name for part in PARTS for name in found if PART_OF.get(name.lower()) == part}
    if spec.layout == "flat" or (spec.layout == "auto" and not parts):
        return read_class_folders(spec, folder, root)
    if not parts:
        raise CoopError(f"{root} has no folder train, val or test, which dataset.layout=parts asks for")
    strange = sorted(set(found) - set(parts.values()))
    if strange:
        raise CoopError(
            f"{root} has the folders {', '.join(parts.values())} and also {shortened(strange[0])}: if all are classes, "
            "give dataset.layout=flat; if some are parts, leave the others out with dataset.ignore=[...]"
        )
    return _given_parts(spec, root, parts)


def _given_parts(spec: DatasetSpec, root: Path, given: dict[str, str]) -> Content:
    """Read the part folders that are there; all of them have the classes of train, or of the last part without it."""
    main = given.get("train") or given[max(given, key=PARTS.index)]
    folders = class_folders(root / main)
    if not folders and _image_names(root / main):
        raise CoopError(
            f"{root / main} has images but no class folders: sort them into one folder per class, "
            f"or give dataset.layout=flat if {shortened(main)} is a class itself"
        )
    names = _folder_names(spec, root / main, folders)
    if set(given) == {"train"}:
        raise CoopError(
            f"{root} has only the folder {shortened(main)}: add val or test, give the folder of classes as "
            "dataset.root, or dataset.layout=flat if it is a class itself"
        )
    parts = {part: _part(root, name, folders) for part, name in given.items()}
    return Content(names, parts, f"folders {', '.join(given.values())}", follow_links=True)


def _part(root: Path, name: str, folders: list[str]) -> Split:
    """List one part; it may lack classes, but has none of its own."""
    there = class_folders(root / name)
    strange = sorted(set(there) - set(folders))
    if strange:
        odd = shortened(strange[0])
        raise CoopError(f"{root / name} has the class folder {odd}, which the train part does not have")
    split = list_images(root, name, there)
    if there == folders:
        return split
    label_of = [folders.index(folder) for folder in there]
    return Split(split.paths, [label_of[label] for label in split.labels])


def _folder_names(spec: DatasetSpec, root: Path, folders: Sequence[str]) -> list[str]:
    if not folders:
        raise CoopError(f"{root} has no class folders: expected one folder of images per class")
    return _readable(spec, folders)


# A CSV of your own.

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path"),
    "label": ("label", "class_id", "target"),
    "class name": ("class name", "class_name", "classname", "class", "name"),
    "split": ("split", "part", "set"),
}


def read_csv(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read `dataset.file`; paths are relative to `dataset.root`, or to the CSV's own folder without it."""
    path = csv_file(spec)
    cells = _read_cells(path)
    rows = _csv_rows(cells, path)
    names = names_of({"csv": rows}, str(path), same_names=True)
    parts: dict[str, list[Row]] = {}
    for number, (row, cell) in enumerate(zip(rows, cells, strict=True), start=2):
        part = PART_OF.get(cell.get("split", "train").lower())
        if not part:
            raise CoopError(f"{path}, row {number}: the split {shortened(cell['split'])} is none of train, val, test")
        parts.setdefault(part, []).append(row)
    if "split" in cells[0] and set(parts) == {"train"}:
        raise CoopError(f"{path} has only train images: add rows of val or test, or leave out the column of splits")
    return Content(_readable(spec, names), {part: split_of(of_part) for part, of_part in parts.items()}, path.name)


def csv_file(spec: DatasetSpec) -> Path:
    """Return the CSV's path; CoopError if none is given or it is not there."""
    if not spec.file:
        raise CoopError("dataset=csv needs dataset.file=FILE: a CSV with the columns path, label, class name, split")
    path = Path(os.path.expanduser(spec.file))
    if not os.path.isfile(path):
        raise CoopError(f"dataset.file={shortened(spec.file)}: no such file")
    return path


def _read_cells(path: Path) -> list[dict[str, str]]:
    """Return the table's rows by our own column names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            lines = [line for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CoopError(f"cannot read {path} as a CSV: {first_line(error)}") from error
    known = {spelling: column for column, spellings in COLUMNS.items() for spelling in spellings}
    columns = [known.get(name, "") for name in header]
    doubled = [column for column in COLUMNS if columns.count(column) > 1]
    if "path" not in columns or not {"label", "class name"} & set(columns) or doubled:
        raise CoopError(
            f"{path}: the first line must name the columns path, label, class name, split; "
            f"label or class name may be missing, and split; found {one_line(', '.join(header)) or 'nothing'}"
        )
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise CoopError(f"{path}, row {number}: {len(line)} cells, but the first line names {len(header)} columns")
    if not lines:
        raise CoopError(f"{path} lists no images")
    return [{c: cell.strip() for c, cell in zip(columns, line, strict=True) if c} for line in lines]


def _csv_rows(cells: list[dict[str, str]], path: Path) -> list[Row]:
    """Return rows with both label and name; the missing one follows from the other, names in sorted order.

    Without a column of class names, a label column of words alone gives the class names.
    """
    numbers = [bool(re.fullmatch("[0-9]{1,9}", cell.get("label", ""))) for cell in cells]
    column = "class name" if "class name" in cells[0] else "label"
    if "label" not in cells[0] or (column == "label" and not any(numbers)):
        order = {name: label for label, name in enumerate(sorted({cell[column] for cell in cells}))}
        return [(cell["path"], order[cell[column]], cell[column]) for cell in cells]
    if not all(numbers):
        row = numbers.index(False)
        raise CoopError(
            f"{path}, row {row + 2}: the label {shortened(cells[row]['label'])} is not a number from 0 on; "
            "if the column holds class names, call it 'class name'"
        )
    return [(cell["path"], int(cell["label"]), cell[column]) for cell in cells]


# ImageNet and the four sets that test its shifts: class folders of WordNet ids, or V2's numbered folders.
# Labels count the sorted folders that are there, as in the original: ImageNet-A and -R have 200 classes, not 1000.

NAMES_FILE = "classnames.txt"
TRAIN_REMEDY = "expected train/ and val/ with one folder per class, e.g. val/n01440764 (valprep.sh sorts a flat val/)"


def read_imagenet(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read images/{train,val}/n*; the official validation images are both val and test, as in the original."""
    folders = class_folders(root / "val") if (root / "val").is_dir() else []
    if not folders:
        raise CoopError(f"{root} is not laid out as ImageNet: {TRAIN_REMEDY}")
    names = _wordnet_names(folders, keyed_names(folder), root / "val")
    train, notes = EMPTY, ["no train folder: this can only be tested on"]
    if (root / "train").is_dir():
        odd = sorted(set(class_folders(root / "train")) ^ set(folders))
        if odd:
            raise CoopError(f"{root}/train and {root}/val differ in {len(odd)} class folders, first {odd[0]!r}")
        train, notes = list_images(root, "train", folders), []
    test = list_images(root, "val", folders)
    parts = {"train": train, "val": test, "test": test}
    source = "official: train, val (val is also the test part)"
    return Content(names, parts, source, notes, follow_links=True, val_is_test=True)


def read_wordnet_folders(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read ImageNet-Sketch, -A or -R: folders of WordNet ids, to test on."""
    folders = class_folders(root, spec.ignore)
    names = _wordnet_names(folders, keyed_names(folder), root)
    test = list_images(root, "", folders)
    return Content(names, {"test": test}, "official: all images are test", follow_links=True)


def read_imagenet_v2(spec: DatasetSpec, folder: Path, root: Path) -> Content:
    """Read ImageNetV2: folder i holds the class on line i of classnames.txt, counted from 0."""
    names = list(keyed_names(folder).values())
    found = set(class_folders(root))
    wanted = [str(label) for label in range(len(names))]
    odd = sorted(found ^ set(wanted))
    if odd:
        raise CoopError(
            f"{root} should have the folders 0 to {len(names) - 1}, one per line of {NAMES_FILE}; "
            f"{shortened(odd[0])} is {'too much' if odd[0] in found else 'missing'}"
        )
    test = list_images(root, "", wanted)
    return Content(names, {"test": test}, "official: all images are test", follow_links=True)


def keyed_names(folder: Path) -> dict[str, str]:
    """Return {WordNet id: class name} from lines of `id name` in the dataset's classnames.txt, or ImageNet's."""
    places = (folder / NAMES_FILE, folder.parent / "imagenet" / NAMES_FILE)
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        looked = f"looked for {places[0]} and {places[1]}"
        raise CoopError(f"{NAMES_FILE} is missing ({looked}): CoOp's DATASETS.md links to it")
    return dict(read_fields(found, " ", 2, "'id name'"))


def _wordnet_names(folders: list[str], names: dict[str, str], place: Path) -> list[str]:
    if not folders:
        raise CoopError(f"{place} has no class folders: expected one folder per WordNet id, e.g. n01440764")
    strange = [name for name in folders if name not in names]
    if strange:
        raise CoopError(f"{place} has the folder {shortened(strange[0])}, which {NAMES_FILE} does not name")
    return [names[name] for name in folders]


Reader = Callable[[DatasetSpec, Path, Path], Content]  # given the dataset's folder and its image folder
READERS: Mapping[str, Reader] = {
    "hub": read_hub,
    "class_folders": read_class_folders,
    "folder": read_folder,
    "csv": read_csv,
    "imagenet": read_imagenet,
    "imagenet_v2": read_imagenet_v2,
    "wordnet_folders": read_wordnet_folders,
    **dict.fromkeys(ANNOTATIONS, read_annotations),
}
