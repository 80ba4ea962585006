"""The IDX files in which MNIST and its kin are published, and their images as PNG files in class folders."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coop.data.description import Description
from coop.data.own_split import carve_val
from coop.errors import CoopError
from coop.io import track

PARTS = {"train": "train", "test": "t10k"}  # part -> how its files' names begin
UNSIGNED_BYTE = 0x08
VAL_SEED = 1

Row = tuple[str, int, str]  # path, label, class name


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Return the array of an IDX file of bytes, packed by gzip or not; CoopError if it is none."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise CoopError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise CoopError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex()}")
    n_axes = content[3]
    start = 4 + 4 * n_axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != int(np.prod(shape)):
        raise CoopError(f"{path} is cut off: {len(content) - start} bytes for an array of shape {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def unpack_idx(description: Description, folder: Path) -> None:
    """Write the images of a dataset's IDX files and, when all are there, its split file; both below `folder`."""
    assert description.idx is not None and description.official_split is not None
    files = folder / description.idx
    rows = idx_rows(files, description.idx_classes)
    write_images(files, folder / description.images, rows)
    write_split(folder / description.official_split.file, rows)


def find_idx(folder: Path, part: str, kind: str) -> Path:
    """Return the file of a part's `images` or `labels`; CoopError names what was looked for."""
    name = f"{PARTS[part]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise CoopError(f"{folder} has no file {name}.gz: the four files of the dataset belong there")


def idx_rows(folder: Path, class_names: Sequence[str]) -> dict[str, list[Row]]:
    """Return the split of the four files in `folder`: train and val carved from it by CoOp's rule (20 %), and test.

    An image is called `ankle_boot/train_00007.png` after its class, its part and its place in the file.
    """
    rows = {}
    for part in PARTS:
        labels = read_idx(find_idx(folder, part, "labels")).tolist()
        names = [class_names[label] for label in labels]
        paths = [f"{name.replace(' ', '_')}/{part}_{i:05d}.png" for i, name in enumerate(names)]
        rows[part] = list(zip(paths, labels, names, strict=True))
    train, val = carve_val([label for _, label, _ in rows["train"]], VAL_SEED)
    everything = rows["train"]
    return {"train": [everything[i] for i in train], "val": [everything[i] for i in val], "test": rows["test"]}


def write_images(folder: Path, images: Path, rows: dict[str, list[Row]]) -> None:
    """Write the PNG files of a split's rows below `images`; what is there is kept, none is ever half-written."""
    arrays = {part: read_idx(find_idx(folder, part, "images")) for part in PARTS}
    wanted = [path for part in rows.values() for path, _, _ in part]
    for path in track(wanted, "writing images", total=len(wanted)):
        place = images / path
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        part, _, number = place.stem.partition("_")
        partial = place.with_suffix(".partial")
        Image.fromarray(arrays[part][int(number)]).save(partial, format="PNG", optimize=True)
        os.replace(partial, place)


def write_split(path: Path, rows: dict[str, list[Row]]) -> None:
    """Write a split file in CoOp's form, an item a line."""
    parts = []
    for part, items in rows.items():
        lines = ",\n".join(json.dumps(item) for item in items)
        parts.append(f'"{part}": [\n{lines}\n]')
    partial = path.with_suffix(".partial")
    partial.write_text("{" + ",\n".join(parts) + "}\n")
    os.replace(partial, path)
