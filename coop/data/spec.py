"""What a dataset's description says: one YAML file per dataset in `datasets/`, typed here."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coop.data.dataset import CONTROL, is_class_name, shortened
from coop.errors import CoopError, unknown, wrong_value
from coop.io import read_yaml, resource_folder

HUBS = ("torchvision", "huggingface")
LAYOUTS = ("auto", "flat", "parts")


@dataclass
class OfficialSplit:
    """The split file that the dataset's published numbers were made with."""

    file: str  # its name in the dataset's folder
    url: str = ""
    sha256: str | None = None


@dataclass
class Download:
    """One file that `coop data prepare` fetches, and what it becomes."""

    url: str
    creates: str  # path in the dataset's folder that it becomes ("." for the folder itself)
    size: str = ""  # for people, e.g. "5 GB"
    md5: str | None = None
    sha256: str | None = None
    done_when: str = ""  # path whose existence means that it is there ("": `creates`)
    member: str = ""  # what inside the archive becomes `creates` ("": the same path)
    filename: str = ""  # its name on disk where the address does not end in it; an archive's is unpacked


@dataclass
class Expected:
    """How many classes and images the whole dataset has; None where nobody has counted."""

    classes: int | None = None
    train: int | None = None
    val: int | None = None
    test: int | None = None
    per_class: dict[str, int] = field(default_factory=dict)  # part -> images of every class, where all are equal


@dataclass
class DatasetSpec:
    """A dataset as its YAML file, and the user's overrides of it, describe it.

    `root`: the dataset's folder, instead of its `directory` below data_root. `images`: the image folder in it.
    `template`: the hand-written prompt, with {} for the class name. `name`: what results call it. `split_file`: a split
    file in the official layout; `split_seed`: of the split that is made where there is none. `class_names`: a file of
    names; `clean_names`: make names readable. `rename`: {class folder: class name}; `ignore`: class folders left out.
    `layout` of dataset=folder: flat (class folders), parts (train, val, test) or auto. `file`: the CSV of dataset=csv.
    `source` of dataset=hub: torchvision:NAME or huggingface:ORG/NAME. `follow_links`: links may lead out of the folder.
    The other keys are for descriptions in datasets/.
    """

    name: str
    reader: str  # how to read it where there is no split file: a name in `coop.data.layouts.READERS`
    template: str
    title: str = ""
    directory: str = ""  # its folder below the data root
    images: str = "."
    official_split: OfficialSplit | None = None
    rename: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    same_names: bool = False  # classes may share a name (ImageNet's missile and sunglasses do)
    clean_names: bool = False
    expected: Expected = field(default_factory=Expected)
    downloads: list[Download] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)  # what must be there in the end; empty: the image folder
    manual: str = ""  # what to do by hand, in words
    idx: str | None = None  # folder of four IDX files (MNIST's format) that become the images and the split file
    idx_classes: list[str] = field(default_factory=list)  # their class names, in the order of the labels
    source: str = ""  # where it comes from: a web page; of dataset=hub, torchvision:NAME or huggingface:ORG/NAME
    licence: str = ""
    size: str = ""
    # the user's alone, on the command line
    root: str | None = None
    layout: str = "auto"
    file: str | None = None
    split_file: str | None = None
    class_names: str | None = None
    split_seed: int = 1
    follow_links: bool = False


def parse_description(mapping: Mapping[str, Any]) -> DatasetSpec:
    """Return the typed description; the name of `folder` and `csv` is that of the user's folder or file.

    Raises CoopError for unknown keys, wrong types, a template without {} and a name that no folder can have.
    """
    fields = DatasetSpec.__dataclass_fields__
    for key in mapping:
        if key not in fields:
            raise unknown("key of a dataset's description", str(key)[:80], fields)
    try:
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetSpec), dict(mapping)))
    except OmegaConfBaseException as error:
        name = shortened(mapping.get("name"))
        raise CoopError(f"the description of dataset {name} is wrong: {wrong_value(error)}") from error
    assert isinstance(spec, DatasetSpec)
    for key, value in vars(spec).items():
        if isinstance(value, str) and key != "manual" and (CONTROL.search(value) or len(value) > 1000):
            raise CoopError(f"dataset.{key}={shortened(value)}: give one line of at most 1000 characters")
    for name in spec.rename.values():
        if not is_class_name(name):
            raise CoopError(f"dataset.rename: {shortened(name)} is not a class name")
    if spec.template.count("{}") != 1:
        raise CoopError(f"dataset.template={shortened(spec.template)}: it must contain {{}} once, for the class name")
    if spec.layout not in LAYOUTS:
        raise unknown("dataset.layout", spec.layout, LAYOUTS)
    if spec.reader == "hub" and spec.source:
        library, _, name = spec.source.partition(":")
        plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")
        if library not in HUBS or not plain:
            raise CoopError(f"dataset.source={shortened(spec.source)}: give torchvision:NAME or huggingface:ORG/NAME")
        spec.directory = f"hub/{library}-{plain}"
        spec.name = plain if spec.name == "hub" else spec.name
    place = spec.file if spec.reader == "csv" else spec.root
    if spec.name == spec.reader and place:
        path = Path(os.path.abspath(os.path.expanduser(place)))
        spec.name = (path.stem if spec.reader == "csv" else path.name) or spec.name
    if set(spec.name) & set("/\\") or spec.name.strip(". ") == "" or len(spec.name) > 100:
        raise CoopError(f"dataset.name={shortened(spec.name)}: give a name that a folder can have, such as 'birds'")
    return spec


def dataset_descriptions() -> dict[str, Path]:
    """Return {name: YAML file} of the datasets that the toolkit knows."""
    return {path.stem: path for path in sorted(resource_folder("datasets").glob("*.yaml"))}


def load_description(name: str, /, **overrides: Any) -> DatasetSpec:
    """Return the description called `name`, with the overrides."""
    files = dataset_descriptions()
    if name not in files:
        raise unknown("dataset", name[:80], files)
    return parse_description({**read_yaml(files[name]), **overrides})


def describe_folder(path: str | Path, taken: Collection[str] = (), **overrides: Any) -> DatasetSpec:
    """Return the description of a folder of class folders, or of a CSV file, of one's own.

    Its name is the last part of the path; if that is in `taken`, the parts before it are put in front with "-", and
    a number behind if that is not enough: /a/birds and /b/birds become `birds` and `b-birds`.
    """
    place = Path(os.path.abspath(os.path.expanduser(path)))
    is_file = os.path.isfile(place)
    parts = [*place.parts[1:-1], place.stem if is_file else place.name]
    names = ("-".join(parts[-length:])[-100:] for length in range(1, len(parts) + 1))
    numbered = (f"{parts[-1][:90]}-{number}" for number in range(2, len(taken) + 3))
    name = next(name for name in (*names, *numbered) if name not in taken)
    if is_file:
        return load_description("csv", **{"file": str(place), "name": name, **overrides})
    if not os.path.isdir(place):
        raise CoopError(f"there is no folder or CSV file {shortened(str(path))}")
    return load_description("folder", **{"root": str(place), "name": name, **overrides})


def prepare_command(spec: DatasetSpec) -> str:
    """Return the command that gets the dataset."""
    return f"coop data prepare {f'hub dataset.source={spec.source}' if spec.reader == 'hub' else spec.name}"


def dataset_folder(spec: DatasetSpec, data_root: Path) -> Path:
    """Return where the dataset lies: `root` if given, else its directory below `data_root`."""
    if spec.root:
        return Path(os.path.expanduser(spec.root))
    if not spec.directory and spec.reader == "hub":
        raise CoopError("dataset=hub needs dataset.source=torchvision:NAME or huggingface:ORG/NAME")
    if not spec.directory:
        raise CoopError(f"dataset={spec.name} needs dataset.root=FOLDER: where your images are")
    return Path(os.path.expanduser(data_root)) / spec.directory
