"""The official annotation files, read where CoOp's split file is missing; each as CoOp's file in its docstring does."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from scipy.io import loadmat

from coop.data.class_names import read_lines
from coop.data.content import Content, Row, names_of, split_of
from coop.data.description import Description
from coop.data.own_split import CARVED_RULE, THREE_WAY_RULE, carve_val, own_split, three_way
from coop.data.split_file import load_json
from coop.errors import CoopError


def _with_carved_val(description: Description, source: str, trainval: list[Row], test: list[Row]) -> Content:
    """Keep the official test part and carve val from trainval."""
    names = names_of({"train": trainval, "test": test}, source, description.same_names)
    whole = split_of(trainval)
    train, val = carve_val(whole.labels, description.split_seed)
    parts = {"train": whole.subset(train), "val": whole.subset(val), "test": split_of(test)}
    return Content(names, parts, own_split(CARVED_RULE, description.split_seed))


def _read_mat(path: Path, key: str, what: str, read: Callable[[Any], Any]) -> Any:
    """Return what `read` makes of a variable of a .mat file; CoopError for every way in which that can fail."""
    if not path.is_file():
        raise CoopError(f"{path} is missing: {what}")
    try:
        return read(loadmat(path)[key])
    except Exception as error:  # scipy raises a dozen types on a damaged file
        raise CoopError(f"{path} is not the official file ({what}): {type(error).__name__}: {error}") from error


def _fields(path: Path, separator: str, count: int, what: str) -> list[list[str]]:
    """Return each line cut into at least `count` fields, the last of which keeps the rest."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split(separator, count - 1)
        if len(fields) < count:
            raise CoopError(f"{path}, line {number}: expected {what}, found '{line}'")
        rows.append(fields)
    return rows


def _number(text: str, path: Path) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise CoopError(f"{path}: '{text}' is not a class number")
    return int(text)


def read_pets(description: Description, folder: Path) -> Content:
    """Read annotations/{trainval,test}.txt; the breed is the file's name without its number (oxford_pets.py)."""
    parts = []
    for name in ("trainval.txt", "test.txt"):
        path = folder / "annotations" / name
        lines = _fields(path, " ", 4, "'image class species breed'")
        parts.append([(f"{i}.jpg", _number(c, path) - 1, "_".join(i.split("_")[:-1]).lower()) for i, c, *_ in lines])
    return _with_carved_val(description, str(folder / "annotations"), *parts)


def read_cars(description: Description, folder: Path) -> Content:
    """Read the devkit's .mat files; the year moves from the end of the name to its front (stanford_cars.py)."""
    meta = folder / "devkit" / "cars_meta.mat"
    names = _read_mat(meta, "class_names", "the list of models", lambda m: [str(name[0]) for name in m[0]])
    files = {
        "cars_train": folder / "devkit" / "cars_train_annos.mat",
        "cars_test": folder / "cars_test_annos_withlabels.mat",
    }
    parts = []
    for images, path in files.items():
        items = _read_mat(path, "annotations", "file names and classes", _car_annotations)
        beyond = [label for _, label in items if not 1 <= label <= len(names)]
        if beyond:
            raise CoopError(f"{path} has the class number {beyond[0]}, but {meta} names 1 to {len(names)}")
        parts.append([(f"{images}/{file}", label - 1, year_first(names[label - 1])) for file, label in items])
    return _with_carved_val(description, str(folder), *parts)


def _car_annotations(variable: Any) -> list[tuple[str, int]]:
    return [(str(item["fname"][0]), int(item["class"][0, 0])) for item in variable[0]]


def year_first(name: str) -> str:
    """Return a car's name as CoOp writes it.

    >>> year_first("Audi TTS Coupe 2012")
    '2012 Audi TTS Coupe'
    """
    *model, year = name.split(" ")
    return " ".join([year, *model])


def read_flowers(description: Description, folder: Path) -> Content:
    """Read imagelabels.mat, one label per image number, and split all 50/20/30 (oxford_flowers.py).

    The official setid.mat is not used, by the original neither.
    """
    path = folder / "imagelabels.mat"
    labels = _read_mat(path, "labels", "a label per image", lambda m: [int(label) for label in m[0]])
    names = load_json(folder / "cat_to_name.json")
    if not isinstance(names, dict) or not {str(label) for label in labels} <= set(names):
        raise CoopError(f"{folder / 'cat_to_name.json'} does not name every label of {path}")
    rows = [(f"image_{i:05d}.jpg", label - 1, names[str(label)]) for i, label in enumerate(labels, start=1)]
    class_names = names_of({"labels": rows}, str(path), description.same_names)
    whole = split_of(rows)
    places = three_way(whole.labels, class_names, description.split_seed)
    parts = dict(zip(("train", "val", "test"), map(whole.subset, places), strict=True))
    return Content(class_names, parts, own_split(THREE_WAY_RULE, description.split_seed))


def read_aircraft(description: Description, folder: Path) -> Content:
    """Read images_variant_{train,val,test}.txt, the official split; labels by variants.txt (fgvc_aircraft.py)."""
    variants = _labels(read_lines(folder / "variants.txt"), folder / "variants.txt")
    parts = {}
    for part in ("train", "val", "test"):
        path = folder / f"images_variant_{part}.txt"
        lines = _fields(path, " ", 2, "'image variant'")
        parts[part] = [(f"{image}.jpg", _label(variants, name, path), name) for image, name in lines]
    names = names_of(parts, str(folder), description.same_names)
    splits = {part: split_of(rows) for part, rows in parts.items()}
    return Content(names, splits, "official: images_variant_{train,val,test}.txt")


def read_sun397(description: Description, folder: Path) -> Content:
    """Read ClassName.txt, Training_01.txt and Testing_01.txt (sun397.py)."""
    classes = _labels([line.lstrip("/") for line in read_lines(folder / "ClassName.txt")], folder / "ClassName.txt")
    parts = []
    for name in ("Training_01.txt", "Testing_01.txt"):
        path = folder / name
        images = [line.lstrip("/") for line in read_lines(path)]
        places = [str(PurePosixPath(image).parent) for image in images]
        parts.append([(i, _label(classes, c, path), scene_name(c)) for i, c in zip(images, places, strict=True)])
    return _with_carved_val(description, str(folder), *parts)


def scene_name(place: str) -> str:
    """Return a SUN397 class name: the parts after the letter, reversed.

    >>> scene_name("a/apartment_building/outdoor")
    'outdoor apartment_building'
    """
    return " ".join(reversed(place.split("/")[1:]))


def read_ucf101(description: Description, folder: Path) -> Content:
    """Read split 1 of ucfTrainTestlist; one middle frame per video, folders in CoOp's spelling (ucf101.py)."""
    lists = folder / "ucfTrainTestlist"
    index = lists / "classInd.txt"
    classes = {name: _number(label, index) - 1 for label, name in _fields(index, " ", 2, "'number class'")}
    parts = []
    for name in ("trainlist01.txt", "testlist01.txt"):
        path = lists / name
        rows = []
        for line in read_lines(path):
            action, _, video = line.split(" ")[0].partition("/")
            label = _label(classes, action, path)
            rows.append((f"{action_name(action)}/{Path(video).stem}.jpg", label, action_name(action)))
        parts.append(rows)
    return _with_carved_val(description, str(lists), *parts)


def action_name(action: str) -> str:
    """Return UCF101's class name as CoOp writes it.

    >>> action_name("ApplyEyeMakeup")
    'Apply_Eye_Makeup'
    """
    return "_".join(re.findall("[A-Z][^A-Z]*", action))


def _labels(names: Sequence[str], path: Path) -> dict[str, int]:
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) != len(names) or not names:
        raise CoopError(f"{path} should name each class once, found {len(names)} lines with {len(labels)} names")
    return labels


def _label(labels: dict[str, int], name: str, path: Path) -> int:
    if name not in labels:
        raise CoopError(f"{path} has the class '{name}', which the list of classes does not")
    return labels[name]
