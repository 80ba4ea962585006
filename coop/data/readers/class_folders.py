"""Folders of class folders: Caltech101, DTD, EuroSAT and Food101 without a split file, and your own."""

from collections.abc import Sequence
from pathlib import Path

from coop.data.class_names import cleaned
from coop.data.content import Content
from coop.data.dataset import EMPTY, Split
from coop.data.description import Description
from coop.data.listing import class_folders, list_images
from coop.data.own_split import CARVED_RULE, THREE_WAY_RULE, carve_val, own_split, three_way
from coop.errors import CoopError

PART_FOLDERS = {  # the spellings in use, Hugging Face's imagefolder included
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def read_class_folders(description: Description, folder: Path) -> Content:
    """Read one folder of class folders and split it 50/20/30, as CoOp does without a split file."""
    root = folder / description.images
    return _split_three_ways(description, root, class_folders(root, description.ignore))


def read_folder(description: Description, folder: Path) -> Content:
    """Read a folder of your own: train, val and test folders of class folders, or one folder of class folders.

    Missing parts are made: no val takes 20 % of train; no test makes val the test part.
    """
    root = folder / description.images
    found = class_folders(root, description.ignore)
    parts = {part: name for part, names in PART_FOLDERS.items() for name in found if name.lower() in names}
    if not parts:
        return _split_three_ways(description, root, found)
    strange = sorted(set(found) - set(parts.values()))
    if strange:
        raise CoopError(
            f"{root} has the folders {', '.join(parts.values())} and also '{strange[0]}': "
            "either parts or classes, not both (dataset.ignore leaves folders out)"
        )
    return _given_parts(description, root, parts)


def _split_three_ways(description: Description, root: Path, folders: Sequence[str]) -> Content:
    names = _names(description, root, folders)
    images = list_images(root, folders=folders).split
    _check_no_empty_class(root, folders, images)
    places = three_way(images.labels, names, description.split_seed)
    parts = dict(zip(("train", "val", "test"), map(images.subset, places), strict=True))
    return Content(names, parts, own_split(THREE_WAY_RULE, description.split_seed), follow_links=True)


def _given_parts(description: Description, root: Path, given: dict[str, str]) -> Content:
    """Read the part folders that are there; all of them have the classes of train, or of test without train."""
    folders = class_folders(root / given["train" if "train" in given else next(reversed(given))])
    parts = {part: _part(root, name, folders) for part, name in given.items()}
    names = _names(description, root, folders)
    source = f"folders {', '.join(given.values())}"
    if "test" not in parts:
        if "val" not in parts:
            raise CoopError(f"{root} has only a train folder: add val or test, or give the folder of classes")
        parts["test"] = parts.pop("val")
        source += f"; own split: '{given['val']}' is the test part"
    if "val" not in parts and "train" in parts:
        train, val = carve_val(parts["train"].labels, description.split_seed)
        parts["train"], parts["val"] = parts["train"].subset(train), parts["train"].subset(val)
        source += f"; {own_split(CARVED_RULE.replace('official ', ''), description.split_seed)}"
    return Content(names, {part: parts.get(part, EMPTY) for part in PART_FOLDERS}, source, follow_links=True)


def _part(root: Path, name: str, folders: list[str]) -> Split:
    """List one part; it may lack classes, but has none of its own."""
    there = class_folders(root / name)
    strange = sorted(set(there) - set(folders))
    if strange:
        raise CoopError(f"{root / name} has the class folder '{strange[0]}', which the train part does not have")
    split = list_images(root, name, there).split
    if there == folders:
        return split
    label_of = [folders.index(folder) for folder in there]
    return Split(split.paths, [label_of[label] for label in split.labels])


def _names(description: Description, root: Path, folders: Sequence[str]) -> list[str]:
    """Return the class names: the folders' names, renamed or cleaned as the description says."""
    if not folders:
        raise CoopError(f"{root} has no class folders: expected one folder of images per class")
    return [description.rename.get(name, name) for name in (cleaned(folders) if description.clean_names else folders)]


def _check_no_empty_class(root: Path, folders: Sequence[str], images: Split) -> None:
    empty = sorted(set(range(len(folders))) - set(images.labels))
    if empty:
        raise CoopError(f"the class folder {root / folders[empty[0]]} has no images")
