"""Readers of official annotation files: rows of the parts that they list, as the original's module for each reads them.

CoOp pools the flowers' official parts and has no file for the val part of pets, cars, SUN397 and UCF101: what lacks
here is completed by `splits.completed`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from coop.data.dataset import PARTS, shortened
from coop.data.splits import Row, load_json
from coop.errors import CoopError, first_line

Parts = dict[str, list[Row]]  # train, val, test -> rows


def _pets(folder: Path) -> Parts:
    """Read annotations/{trainval,test}.txt; the breed is the file's name without its number (oxford_pets.py)."""

    def rows(path: Path) -> list[Row]:
        lines = read_fields(path, " ", 4, "'image class species breed'")
        return [(f"{i}.jpg", _number(c, path) - 1, "_".join(i.split("_")[:-1]).lower()) for i, c, *_ in lines]

    lists = folder / "annotations"
    return {"train": rows(lists / "trainval.txt"), "test": rows(lists / "test.txt")}


def _cars(folder: Path) -> Parts:
    """Read the devkit's .mat files; the year moves from the end of the name to its front (stanford_cars.py)."""
    meta = folder / "devkit" / "cars_meta.mat"
    names = _read_mat(meta, "class_names", "the list of models", lambda m: [str(name[0]) for name in m[0]])

    def rows(images: str, path: Path) -> list[Row]:
        items = _read_mat(path, "annotations", "file names and classes", _car_annotations)
        beyond = [label for _, label in items if not 1 <= label <= len(names)]
        if beyond:
            raise CoopError(f"{path} has the class number {beyond[0]}, but {meta} names 1 to {len(names)}")
        return [(f"{images}/{file}", label - 1, year_first(names[label - 1])) for file, label in items]

    train, test = folder / "devkit" / "cars_train_annos.mat", folder / "cars_test_annos_withlabels.mat"
    return {"train": rows("cars_train", train), "test": rows("cars_test", test)}


def _flowers(folder: Path) -> Parts:
    """Read imagelabels.mat, one label per image number (oxford_flowers.py). The original does not use setid.mat."""
    path = folder / "imagelabels.mat"
    labels = _read_mat(path, "labels", "a label per image", lambda m: [int(label) for label in m[0]])
    names = load_json(folder / "cat_to_name.json")
    if not isinstance(names, dict) or not {str(label) for label in labels} <= set(names):
        raise CoopError(f"{folder / 'cat_to_name.json'} does not name every label of {path}")
    return {"train": [(f"image_{i:05d}.jpg", c - 1, names[str(c)]) for i, c in enumerate(labels, start=1)]}


def _sun397(folder: Path) -> Parts:
    """Read ClassName.txt, Training_01.txt and Testing_01.txt (sun397.py)."""
    listing = folder / "ClassName.txt"
    classes = numbered_names([line.lstrip("/") for line in read_lines(listing)], listing)

    def rows(path: Path) -> list[Row]:
        images = [line.lstrip("/") for line in read_lines(path)]
        places = [str(PurePosixPath(image).parent) for image in images]
        return [(i, label_of(classes, c, path), scene_name(c)) for i, c in zip(images, places, strict=True)]

    return {"train": rows(folder / "Training_01.txt"), "test": rows(folder / "Testing_01.txt")}


def _ucf101(folder: Path) -> Parts:
    """Read split 1 of ucfTrainTestlist; one middle frame per video, folders in CoOp's spelling (ucf101.py)."""
    lists = folder / "ucfTrainTestlist"
    index = lists / "classInd.txt"
    classes = {name: _number(label, index) - 1 for label, name in read_fields(index, " ", 2, "'number class'")}

    def rows(path: Path) -> list[Row]:
        found = []
        for line in read_lines(path):
            action, _, video = line.split(" ")[0].partition("/")
            name = action_name(action)
            found.append((f"{name}/{Path(video).stem}.jpg", label_of(classes, action, path), name))
        return found

    return {"train": rows(lists / "trainlist01.txt"), "test": rows(lists / "testlist01.txt")}


def _aircraft(folder: Path) -> Parts:
    """Read images_variant_{train,val,test}.txt, the official split; labels by variants.txt (fgvc_aircraft.py)."""
    variants = numbered_names(read_lines(folder / "variants.txt"), folder / "variants.txt")

    def rows(path: Path) -> list[Row]:
        lines = read_fields(path, " ", 2, "'image variant'")
        return [(f"{image}.jpg", label_of(variants, name, path), name) for image, name in lines]

    return {part: rows(folder / f"images_variant_{part}.txt") for part in PARTS}


ANNOTATIONS: Mapping[str, Callable[[Path], Parts]] = {  # given the dataset's folder
    "aircraft": _aircraft,
    "pets": _pets,
    "cars": _cars,
    "flowers": _flowers,
    "sun397": _sun397,
    "ucf101": _ucf101,
}


def year_first(name: str) -> str:
    """Return a car's name as CoOp writes it.

    >>> year_first("Audi TTS Coupe 2012")
    '2012 Audi TTS Coupe'
    """
    *model, year = name.split(" ")
    return " ".join([year, *model])


def scene_name(place: str) -> str:
    """Return a SUN397 class name: the parts after the letter, reversed.

    >>> scene_name("a/apartment_building/outdoor")
    'outdoor apartment_building'
    """
    return " ".join(reversed(place.split("/")[1:]))


def action_name(action: str) -> str:
    """Return UCF101's class name as CoOp writes it.

    >>> action_name("ApplyEyeMakeup")
    'Apply_Eye_Makeup'
    """
    return "_".join(re.findall("[A-Z][^A-Z]*", action))


def _read_mat(path: Path, key: str, what: str, read: Callable[[Any], Any]) -> Any:
    """Return what `read` makes of a variable of a .mat file; CoopError for every way in which that can fail."""
    from scipy.io import loadmat

    if not path.is_file():
        raise CoopError(f"{path} is missing: {what}")
    try:
        return read(loadmat(path)[key])
    except Exception as error:  # scipy raises a dozen types on a damaged file
        found = f"{type(error).__name__}: {first_line(error)}"
        raise CoopError(f"{path} is not the official file ({what}): {found}") from error


def _car_annotations(variable: Any) -> list[tuple[str, int]]:
    return [(str(item["fname"][0]), int(item["class"][0, 0])) for item in variable[0]]


def _number(text: str, path: Path) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise CoopError(f"{path}: {shortened(text)} is not a class number")
    return int(text)


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CoopError(f"cannot read {path}: {first_line(error)}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_fields(path: Path, separator: str, count: int, what: str) -> list[list[str]]:
    """Return each line of a text file cut into `count` fields, the last of which keeps the rest."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = [field.strip() for field in line.split(separator, count - 1)]
        if len(fields) < count or not all(fields):
            raise CoopError(f"{path}, line {number}: expected {what}, found {shortened(line)}")
        rows.append(fields)
    return rows


def numbered_names(names: Sequence[str], path: Path) -> dict[str, int]:
    """Return {class name: label} of names in label order; CoopError if one comes twice or there is none."""
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) != len(names) or not names:
        raise CoopError(f"{path} should name each class once, found {len(names)} lines with {len(labels)} names")
    return labels


def label_of(labels: Mapping[str, int], name: str, path: Path) -> int:
    """Return a class's label; CoopError says which file has a class that the list lacks."""
    if name not in labels:
        raise CoopError(f"{path} has the class {shortened(name)}, which the list of classes does not")
    return labels[name]
