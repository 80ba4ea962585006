"""From a description to a dataset: the one entrance for every layout."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coop.data.class_names import renamed
from coop.data.content import PARTS, Content, check_distinct, content_notes
from coop.data.dataset import Dataset, dataset_digest
from coop.data.description import Description, dataset_folder, parse_description
from coop.data.paths import check_folders_inside
from coop.data.readers.annotations import (
    read_aircraft,
    read_cars,
    read_flowers,
    read_pets,
    read_sun397,
    read_ucf101,
)
from coop.data.readers.class_folders import read_class_folders, read_folder
from coop.data.readers.imagenet import read_imagenet, read_imagenet_v2, read_wordnet_folders
from coop.data.readers.table import csv_file, read_csv
from coop.data.split_file import find_split_file, read_split_file
from coop.errors import CoopError, unknown
from coop.io import resource_folder

Reader = Callable[[Description, Path], Content]
READERS: Mapping[str, Reader] = {
    "class_folders": read_class_folders,
    "folder": read_folder,
    "csv": read_csv,
    "imagenet": read_imagenet,
    "imagenet_v2": read_imagenet_v2,
    "wordnet_folders": read_wordnet_folders,
    "pets": read_pets,
    "cars": read_cars,
    "flowers": read_flowers,
    "aircraft": read_aircraft,
    "sun397": read_sun397,
    "ucf101": read_ucf101,
}


def read_dataset(description: Mapping[str, Any], data_root: Path) -> Dataset:
    """Read and check the dataset that `description` (a YAML file of datasets/, with overrides) describes.

    Images themselves are not looked at: `check_images` does that for those that a run needs.
    """
    return read_described(parse_description(description), data_root)


def read_described(description: Description, data_root: Path) -> Dataset:
    """Read and check the dataset of a typed description."""
    if description.reader not in READERS:
        raise unknown("reader", description.reader, READERS)
    folder = _existing_folder(description, data_root)
    split_file = find_split_file(description, folder)
    if split_file:
        content = read_split_file(description, split_file)
    else:
        content = READERS[description.reader](description, folder)
        _explain_own_split(description, folder, content)
    if folder == bundled_sample(description):
        content.notes.append(
            f"the sample of {description.title} that ships with the toolkit; "
            f"the whole dataset: coop data prepare {description.name}"
        )
    root = folder / description.images
    follow_links = description.follow_links or content.follow_links
    names = _class_names(description, content, folder)
    train, val, test = (content.part(part) for part in PARTS)
    if not len(test):
        raise CoopError(f"dataset '{description.name}' in {folder} has no test images to measure on")
    if not follow_links:
        for part in (train, val, test):
            check_folders_inside(root, part.paths, description.name)
    return Dataset(
        name=description.name,
        root=root,
        class_names=tuple(names),
        train=train,
        val=val,
        test=test,
        template=description.template,
        split_source=content.split_source,
        digest=dataset_digest(names, train, val, test),
        notes=(*content.notes, *content_notes(content)),
        follow_links=follow_links,
        val_is_test=content.val_is_test,
    )


def _existing_folder(description: Description, data_root: Path) -> Path:
    if description.reader == "csv" and not description.root and not description.directory:
        return csv_file(description).parent
    folder = dataset_folder(description, data_root)
    sample = bundled_sample(description)
    if not folder.is_dir() and sample:
        return sample
    if not folder.is_dir():
        remedy = f"run 'coop data prepare {description.name}' or give " if description.directory else "correct "
        raise CoopError(f"dataset '{description.name}' is not there: no folder {folder}; {remedy}dataset.root=FOLDER")
    if not (folder / description.images).is_dir():
        raise CoopError(
            f"dataset '{description.name}' has no image folder {folder / description.images}: "
            f"run 'coop data prepare {description.name}' to see what belongs there"
        )
    return folder


def bundled_sample(description: Description) -> Path | None:
    """Return the folder of a sample that ships with the toolkit and serves where the whole dataset is not there."""
    if description.root or not description.directory:
        return None
    folder = resource_folder("datasets") / description.directory
    return folder if folder.is_dir() else None


def _explain_own_split(description: Description, folder: Path, content: Content) -> None:
    """Note that the official split file is missing and where it comes from."""
    official = description.official_split
    if official:
        content.notes.append(
            f"{official.file} is not in {folder}, so the split is our own and results are not "
            f"comparable with published ones; the official file: {official.url}"
        )


def _class_names(description: Description, content: Content, folder: Path) -> list[str]:
    """Return the class names, those of the user's file if given, no two alike."""
    if not description.class_names:
        names = content.class_names
    else:
        file = Path(description.class_names).expanduser()
        names = renamed(content.class_names, file if file.is_file() else folder / file)
    if not description.same_names:
        check_distinct(names, f"dataset '{description.name}'")
    return names
