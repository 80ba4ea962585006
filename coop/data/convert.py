"""What `coop data prepare` makes once: a split file of official annotation files, and images of IDX files.

The annotation files are read where CoOp's split file is missing; each as CoOp's file in its docstring does.
"""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coop.data.dataset import PARTS, shortened
from coop.data.layouts import label_of, numbered_names, read_fields, read_lines
from coop.data.spec import DatasetSpec
from coop.data.splits import (
    Row,
    carve_val,
    load_json,
    names_of,
    prepared_split_file,
    three_way,
    write_split_file,
)
from coop.errors import CoopError, first_line
from coop.io import track


def make_split_file(spec: DatasetSpec, folder: Path) -> Path:
    """Write a dataset's own split file from its official annotation files, by the original's rule; return its path.

    The flowers are split 50/20/30; the others keep the official test part, and 20 % of each class of the rest is val.
    """
    trainval, test = ANNOTATIONS[spec.annotations](folder)
    names = names_of({"train": trainval, "test": test}, str(folder), spec.same_names)
    labels = [label for _, label, _ in trainval]
    if test:
        train, val = carve_val(labels, spec.split_seed)
        parts = {"train": [trainval[i] for i in train], "val": [trainval[i] for i in val], "test": test}
    else:
        places = three_way(labels, names, spec.split_seed)
        parts = {part: [trainval[i] for i in of_part] for part, of_part in zip(PARTS, places, strict=True)}
    path = folder / prepared_split_file(spec)
    write_split_file(path, parts)
    return path


def _pets(folder: Path) -> tuple[list[Row], list[Row]]:
    """Read annotations/{trainval,test}.txt; the breed is the file's name without its number (oxford_pets.py)."""

    def rows(path: Path) -> list[Row]:
        lines = read_fields(path, " ", 4, "'image class species breed'")
        return [(f"{i}.jpg", _number(c, path) - 1, "_".join(i.split("_")[:-1]).lower()) for i, c, *_ in lines]

    return rows(folder / "annotations" / "trainval.txt"), rows(folder / "annotations" / "test.txt")


def _cars(folder: Path) -> tuple[list[Row], list[Row]]:
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
    return rows("cars_train", train), rows("cars_test", test)


def _flowers(folder: Path) -> tuple[list[Row], list[Row]]:
    """Read imagelabels.mat, one label per image number (oxford_flowers.py). The original does not use setid.mat."""
    path = folder / "imagelabels.mat"
    labels = _read_mat(path, "labels", "a label per image", lambda m: [int(label) for label in m[0]])
    names = load_json(folder / "cat_to_name.json")
    if not isinstance(names, dict) or not {str(label) for label in labels} <= set(names):
        raise CoopError(f"{folder / 'cat_to_name.json'} does not name every label of {path}")
    rows = [(f"image_{i:05d}.jpg", label - 1, names[str(label)]) for i, label in enumerate(labels, start=1)]
    return rows, []


def _sun397(folder: Path) -> tuple[list[Row], list[Row]]:
    """Read ClassName.txt, Training_01.txt and Testing_01.txt (sun397.py)."""
    listing = folder / "ClassName.txt"
    classes = numbered_names([line.lstrip("/") for line in read_lines(listing)], listing)

    def rows(path: Path) -> list[Row]:
        images = [line.lstrip("/") for line in read_lines(path)]
        places = [str(PurePosixPath(image).parent) for image in images]
        return [(i, label_of(classes, c, path), scene_name(c)) for i, c in zip(images, places, strict=True)]

    return rows(folder / "Training_01.txt"), rows(folder / "Testing_01.txt")


def _ucf101(folder: Path) -> tuple[list[Row], list[Row]]:
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

    return rows(lists / "trainlist01.txt"), rows(lists / "testlist01.txt")


ANNOTATIONS: Mapping[str, Callable[[Path], tuple[list[Row], list[Row]]]] = {  # -> trainval (or all), test
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


# IDX files, in which MNIST and its kin are published, as PNG files in class folders.

IDX_FILES = {"train": "train", "test": "t10k"}  # part -> how its files' names begin
UNSIGNED_BYTE = 0x08
IDX_VAL_SEED = 1


def unpack_idx(spec: DatasetSpec, folder: Path) -> None:
    """Write the images of a dataset's IDX files and, when all are there, its split file; both below `folder`."""
    assert spec.idx is not None and spec.official_split is not None
    rows = idx_rows(folder / spec.idx, spec.idx_classes)
    write_idx_images(folder / spec.idx, folder / spec.images, rows)
    write_split_file(folder / spec.official_split.file, rows)


def idx_rows(folder: Path, class_names: Sequence[str]) -> dict[str, list[Row]]:
    """Return the split of the four files in `folder`: train and val carved from it by CoOp's rule (20 %), and test.

    An image is called `ankle_boot/train_00007.png` after its class, its part and its place in the file.
    """
    rows = {}
    for part in IDX_FILES:
        path = idx_file(folder, part, "labels")
        labels = read_idx(path).tolist()
        if labels and max(labels) >= len(class_names):
            raise CoopError(f"{path} has the label {max(labels)}, but there are {len(class_names)} class names")
        names = [class_names[label] for label in labels]
        paths = [f"{name.replace(' ', '_')}/{part}_{i:05d}.png" for i, name in enumerate(names)]
        rows[part] = list(zip(paths, labels, names, strict=True))
    train, val = carve_val([label for _, label, _ in rows["train"]], IDX_VAL_SEED)
    everything = rows["train"]
    return {"train": [everything[i] for i in train], "val": [everything[i] for i in val], "test": rows["test"]}


def write_idx_images(folder: Path, images: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the PNG files of a split's rows below `images`; what is there is kept, none is ever half-written."""
    arrays = {part: read_idx(idx_file(folder, part, "images")) for part in IDX_FILES}
    wanted = [path for part in rows.values() for path, _, _ in part if not (images / path).exists()]
    for path in track(wanted, "writing images", total=len(wanted)):
        part, _, number = Path(path).stem.partition("_")
        place, partial = images / path, (images / path).with_suffix(".partial")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[part][int(number)]).save(partial, format="PNG", optimize=True)
        os.replace(partial, place)


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Return the array of an IDX file of bytes, packed by gzip or not; CoopError if it is none."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CoopError(f"cannot read {path}: {first_line(error)}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise CoopError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex()}")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start].ljust(start - 4, b"\0"), dtype=">u4"))
    if len(content) - start != int(np.prod(shape, dtype=object)):
        raise CoopError(f"{path} is cut off: {len(content) - start} bytes for an array of shape {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def idx_file(folder: Path, part: str, kind: str) -> Path:
    """Return the file of a part's `images` or `labels`; CoopError names what was looked for."""
    name = f"{IDX_FILES[part]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise CoopError(f"{folder} has no file {name}.gz: the four files of the dataset belong there")
