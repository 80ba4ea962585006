"""Datasets of torchvision and of the Hugging Face hub, written once as image files and a split file.

`coop data prepare hub dataset.source=torchvision:CIFAR10` writes, `coop run dataset=hub dataset.source=...` reads.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coop.data.dataset import PARTS
from coop.data.layouts import PART_OF, cleaned
from coop.data.spec import DatasetSpec
from coop.data.splits import Row, carve_val, prepared_split_file, three_way, write_split_file
from coop.errors import CoopError, first_line, one_line, unknown
from coop.io import track

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TORCHVISION_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Source:
    """What a library has: the class names (None: labels are the names), and each part as pairs of image and label."""

    class_names: list[str] | None
    parts: Mapping[str, Any]  # train, val, test -> a sequence whose items are (PIL image, int)


def export(spec: DatasetSpec, folder: Path) -> Path:
    """Write a library's dataset below `folder` and return its split file.

    Parts that the library does not have are made: 20 % of train become val, val is the test part where there is none,
    and a set in one piece is split 50/20/30. Images are PNG files, so that no pixel changes.
    """
    library, _, name = spec.source.partition(":")
    try:
        source = LIBRARIES[library](name, folder / "download")
        rows = {part: list(_written(source, part, folder / spec.images)) for part in PARTS if part in source.parts}
    except CoopError:
        raise
    except Exception as error:  # of the network, of archives, of missing packages: every set has its own
        raise CoopError(f"{library} cannot give '{name}': {type(error).__name__}: {first_line(error)}") from error
    assert spec.official_split is not None
    path = folder / (spec.official_split.file if len(rows) == len(PARTS) else prepared_split_file(spec))
    write_split_file(path, _completed(rows, spec.split_seed))
    return path


def _written(source: Source, part: str, images: Path) -> Iterator[Row]:
    """Write a part's images, unless they are there, and yield its rows."""
    items = source.parts[part]
    names = cleaned(source.class_names) if source.class_names else None
    for i in track(range(len(items)), f"writing {part} images", total=len(items)):
        image, label = items[i]
        if not isinstance(image, Image.Image) or not isinstance(label, int) or label < 0:
            raise CoopError(f"item {i} is no image with one class, but {type(image).__name__}, {type(label).__name__}")
        name = names[label] if names else str(label)
        path = f"{label:04d}_{re.sub('[^A-Za-z0-9]+', '_', name)[:50]}/{part}_{i:06d}.png"
        place, partial = images / path, images / f"{path}.partial"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            plain = image if image.mode in PNG_MODES else image.convert("RGB")
            plain.save(partial, format="PNG")
            partial.replace(place)
        yield path, label, name


def _completed(rows: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Return train, val and test, the missing ones made of what is there."""
    rows = dict(rows)
    if list(rows) == ["train"]:
        labels = [label for _, label, _ in rows["train"]]
        names = {label: name for _, label, name in rows["train"]}
        places = three_way(labels, [names.get(label, "") for label in range(max(labels, default=0) + 1)], seed)
        return {part: [rows["train"][i] for i in of_part] for part, of_part in zip(PARTS, places, strict=True)}
    if "test" not in rows:
        rows["test"] = rows.pop("val", [])
    if "val" not in rows:
        train, val = carve_val([label for _, label, _ in rows.get("train", ())], seed)
        rows["train"], rows["val"] = [rows["train"][i] for i in train], [rows["train"][i] for i in val]
    return {part: rows.get(part, []) for part in PARTS}


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
