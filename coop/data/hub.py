"""Datasets that are no image files - torchvision's, the Hugging Face hub's, IDX files - written once as such.

`coop data prepare hub dataset.source=torchvision:CIFAR10` writes, `coop run dataset=hub dataset.source=...` reads.
"""

import gzip
import inspect
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coop.data.dataset import PARTS
from coop.data.layouts import HUB_FILE, PART_OF, cleaned
from coop.data.spec import DatasetSpec
from coop.data.splits import Row, completed, content_of, rows_of, write_split_file
from coop.errors import CoopError, first_line, one_line, unknown
from coop.io import track

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TORCHVISION_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
IDX_FILES = {"train": "train", "test": "t10k"}  # part -> how its files' names begin
UNSIGNED_BYTE = 0x08
IDX_VAL_SEED = 1


@dataclass(frozen=True)
class Source:
    """What a library or a file has: the class names (None: labels are the names), and pairs of image and label."""

    class_names: list[str] | None
    parts: Mapping[str, Any]  # those of train, val, test that are there -> a sequence whose items are (PIL image, int)


def export(spec: DatasetSpec, folder: Path) -> Path:
    """Write a dataset's images below `folder` and, when all are there, the list of them; return that file.

    The list has the parts that are there, which reading completes; IDX files have an official list, with a val part.
    Images are PNG files, so that no pixel changes.
    """
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}
    library, _, name = spec.source.partition(":")
    try:
        if spec.idx:
            source = idx_source(folder / spec.idx, spec.idx_classes)
        else:
            source = LIBRARIES[library](name, folder / "download")
        for part, items in source.parts.items():
            for row, image in track(labelled(source, part), f"writing {part} images", total=len(items)):
                _write_image(image, folder / spec.images / row[0])
                rows[part].append(row)
    except CoopError:
        raise
    except Exception as error:  # of the network, of archives, of missing packages: every set has its own
        found = f"{type(error).__name__}: {first_line(error)}"
        raise CoopError(f"the images of {spec.source} cannot be written: {found}") from error
    path = folder / (spec.official_split.file if spec.official_split else HUB_FILE)
    write_split_file(path, with_val(rows) if spec.idx else rows)
    return path


def labelled(source: Source, part: str) -> Iterator[tuple[Row, Image.Image]]:
    """Yield a part's rows and images, each called `ankle_boot/train_00007.png` after its class, part and place."""
    names = cleaned(source.class_names) if source.class_names else None
    for i in range(len(source.parts[part])):
        image, label = source.parts[part][i]
        if not isinstance(image, Image.Image) or not isinstance(label, int) or label < 0:
            raise CoopError(f"item {i} is no image with one class, but {type(image).__name__}, {type(label).__name__}")
        name = names[label] if names else str(label)
        yield (f"{re.sub('[^A-Za-z0-9-]+', '_', name)[:50] or '_'}/{part}_{i:05d}.png", label, name), image


def _write_image(image: Image.Image, place: Path) -> None:
    """Write a PNG file unless it is there; none is ever half-written."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(".partial")
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(partial, format="PNG")
        partial.replace(place)


def with_val(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the three parts of IDX files' rows of train and test: val is carved from train by CoOp's rule."""
    there = {part: of_part for part, of_part in rows.items() if of_part}
    content = completed(content_of(there, "IDX files", ""), IDX_VAL_SEED)
    return {part: rows_of(content.part(part), content.class_names) for part in PARTS}


def idx_source(folder: Path, class_names: Sequence[str]) -> Source:
    """Return what the four IDX files in `folder` hold, in which MNIST and its kin are published."""
    parts = {}
    for part in IDX_FILES:
        path = idx_file(folder, part, "labels")
        labels = read_idx(path).tolist()
        if labels and max(labels) >= len(class_names):
            raise CoopError(f"{path} has the label {max(labels)}, but there are {len(class_names)} class names")
        images = map(Image.fromarray, read_idx(idx_file(folder, part, "images")))
        parts[part] = list(zip(images, labels, strict=True))
    return Source(list(class_names), parts)


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


def _torchvision(name: str, folder: Path) -> Source:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise unknown("dataset of torchvision", name[:80], datasets.__all__)
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    common = {"root": str(folder)} if "root" in parameters else {}
    if "download" in parameters:
        common["download"] = True  # type: ignore[assignment]
    parts: dict[str, Any] = {}
    if "train" in parameters:
        parts = {"train": kind(**common, train=True), "test": kind(**common, train=False)}
    elif "split" in parameters:
        for part, spellings in TORCHVISION_SPLITS.items():
            for spelling in spellings:
                try:
                    parts.setdefault(part, kind(**common, split=spelling))
                except ValueError:  # there is no such split
                    continue
    else:
        parts = {"train": kind(**common)}
    if not parts:
        raise CoopError(f"torchvision's {name} has no parts called train, val or test")
    names = getattr(next(iter(parts.values())), "classes", None)
    return Source([str(name) for name in names] if names else None, parts)


class _HuggingFacePart:
    """A part of a Hugging Face dataset as a sequence of (image, label)."""

    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image, self.label = rows, image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return row[self.image], row[self.label]


def _hugging_face(name: str, folder: Path) -> Source:
    try:
        from datasets import ClassLabel, load_dataset
        from datasets import Image as ImageFeature
    except ImportError as error:
        raise CoopError("datasets of the Hugging Face hub need its library: pip install datasets") from error
    loaded = load_dataset(name, cache_dir=str(folder))
    strange = [part for part in loaded if part.lower() not in PART_OF]
    features = next(iter(loaded.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if strange or not images or not labels:
        found = one_line(f"the parts {', '.join(loaded)} and the columns {', '.join(features)}")
        wanted = "train, val, test, a column of images and one of class labels"
        raise CoopError(f"'{name}' has {found}: wanted are {wanted}")
    parts = {PART_OF[part.lower()]: _HuggingFacePart(rows, images[0], labels[0]) for part, rows in loaded.items()}
    return Source(list(features[labels[0]].names), parts)


LIBRARIES = {"torchvision": _torchvision, "huggingface": _hugging_face}
