"""What a dataset's description says: one YAML file per dataset in `datasets/`, typed here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coop.errors import CoopError, unknown
from coop.io import resource_folder


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
class Description:
    """A dataset as its YAML file, and the user's overrides of it, describe it."""

    name: str
    reader: str  # how to read it where there is no split file: a name in `coop.data.reading.READERS`
    template: str  # hand-written prompt with {} for the class name
    title: str = ""
    directory: str = ""  # its folder below the data root
    images: str = "."  # image folder in `directory`: paths are relative to it
    official_split: OfficialSplit | None = None
    rename: dict[str, str] = field(default_factory=dict)  # class folder -> class name
    ignore: list[str] = field(default_factory=list)  # class folders that are left out
    same_names: bool = False  # classes may share a name (ImageNet's missile and sunglasses do)
    clean_names: bool = False  # class folders' names are made readable: 001.Black_footed_Albatross
    expected: Expected = field(default_factory=Expected)
    downloads: list[Download] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)  # what must be there in the end; empty: the image folder
    manual: str = ""  # what to do by hand, in words
    frames: str | None = None  # folder of videos whose middle frames become the images
    idx: str | None = None  # folder of four IDX files (MNIST's format) that become the images and the split file
    idx_classes: list[str] = field(default_factory=list)  # their class names, in the order of the labels
    source: str = ""
    licence: str = ""
    size: str = ""
    # the user's, on the command line
    root: str | None = None  # the dataset's folder, instead of data root / directory
    file: str | None = None  # the CSV of dataset=csv
    split_file: str | None = None  # a split file of one's own in the official layout
    class_names: str | None = None  # a file of names
    split_seed: int = 1  # of an own split, where there is no official one
    follow_links: bool = False  # symbolic links may lead out of the folder


def parse_description(mapping: Mapping[str, Any]) -> Description:
    """Return the typed description; raises CoopError for unknown keys, wrong types and a template without {}."""
    fields = Description.__dataclass_fields__
    for key in mapping:
        if key not in fields:
            raise unknown("key of a dataset's description", str(key), fields)
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Description), dict(mapping)))
    except OmegaConfBaseException as error:
        name = mapping.get("name", "?")
        raise CoopError(f"the description of dataset '{name}' is wrong: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, Description)
    if typed.template.count("{}") != 1:
        raise CoopError(f"dataset.template must contain {{}} once, where the class name goes, not '{typed.template}'")
    return typed


def dataset_descriptions() -> dict[str, Path]:
    """Return {name: YAML file} of the datasets that the toolkit knows."""
    return {path.stem: path for path in sorted(resource_folder("datasets").glob("*.yaml"))}


def load_description(name: str, /, **overrides: Any) -> Description:
    """Return the description called `name`, with the overrides that are not None."""
    files = dataset_descriptions()
    if name not in files:
        raise unknown("dataset", name, files)
    mapping = OmegaConf.to_container(OmegaConf.load(files[name]))
    assert isinstance(mapping, dict)
    given = {key: value for key, value in overrides.items() if value is not None}
    return parse_description({**{str(key): value for key, value in mapping.items()}, **given})


def dataset_folder(description: Description, data_root: Path) -> Path:
    """Return where the dataset lies: `root` if given, else its directory below `data_root`."""
    if description.root:
        return Path(description.root).expanduser()
    if not description.directory:
        raise CoopError(f"dataset={description.name} needs dataset.root=FOLDER: where your images are")
    return Path(data_root).expanduser() / description.directory
