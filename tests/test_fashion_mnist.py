"""IDX files become the right PNG files; the repository's sample is what the script takes from the whole set."""

import gzip
import io
import json
import random
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coop.data import load_description, load_split_file, read_dataset
from coop.data.hub import idx_file, idx_source, labelled, read_idx, with_val
from coop.data.prepare import prepare_dataset
from coop.data.splits import Row, rows_of
from coop.errors import CoopError
from experiments.fashion_mnist_sample import CLASS_NAMES, FILES, OUT, SPLIT_FILE, take_sample

NAMES = ("cup", "ankle boot")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file as its specification says: magic, big-endian sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return four small files: 20 training and 6 test images of two classes, each image of its own grey."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, count, first in (("train", 20, 0), ("t10k", 6, 100)):
        images = np.repeat(np.arange(first, first + count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 2)
    return folder


def whole_rows(folder: Path, names: Sequence[str]) -> dict[str, list[Row]]:
    """Return the split of the four files in `folder`."""
    source = idx_source(folder, names)
    return with_val({part: [row for row, _ in labelled(source, part)] for part in source.parts})


def test_prepare_makes_images_and_split_of_files_put_there_by_hand(files: Path, tmp_path: Path) -> None:
    """Nothing is fetched; every image lands in its class's folder under its number."""
    description = load_description("fashion_mnist", downloads=[], idx_classes=list(NAMES))
    said: list[str] = []
    place = tmp_path / "fashion_mnist"
    place.mkdir()
    files.rename(place / "files")
    assert prepare_dataset(description, tmp_path, said.append)
    assert said == ["split_fashion_mnist.json: written, with the images in images"]
    rows = load_split_file(place / SPLIT_FILE)
    assert rows == whole_rows(place / "files", NAMES)
    assert {part: len(items) for part, items in rows.items()} == {"train": 16, "val": 4, "test": 6}
    assert ("ankle_boot/test_00003.png", 1, "ankle boot") in rows["test"]
    for path, label, name in [row for part in rows.values() for row in part]:
        number = int(path[-9:-4])
        picture = np.asarray(Image.open(place / "images" / path))
        assert picture.shape == (28, 28)
        assert set(picture.flat) == {number + (100 if "/test_" in path else 0)}
        assert name == NAMES[label] == NAMES[number % 2]
    assert not read_dataset(description, tmp_path).own_split


def test_damaged_and_missing_files_are_named(files: Path) -> None:
    path = idx_file(files, "train", "labels")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:-3]))
    with pytest.raises(CoopError, match="cut off: 17 bytes"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\x89PNG and so on"))
    with pytest.raises(CoopError, match="begins with 89504e47"):
        read_idx(path)
    path.unlink()
    with pytest.raises(CoopError, match=r"no file train-labels-idx1-ubyte\.gz"):
        idx_source(files, NAMES)


def test_sample_is_balanced_and_within_its_size() -> None:
    split = json.loads((OUT / SPLIT_FILE).read_text())
    assert Counter(label for _, label, _ in split["test"]) == dict.fromkeys(range(10), 100)
    for part, least in (("train", 16), ("val", 4)):
        counts = Counter(label for _, label, _ in split[part])
        assert len(counts) == 10 and min(counts.values()) >= least
    for path, label, name in [row for part in split.values() for row in part]:
        assert name == CLASS_NAMES[label]
        assert path.startswith(name.replace(" ", "_") + "/")
    dataset = read_dataset(load_description("fashion_mnist"), Path("/nowhere"))
    assert {
        "train": rows_of(dataset.train, dataset.class_names),
        "val": rows_of(dataset.val, dataset.class_names),
        "test": rows_of(dataset.test, dataset.class_names),
    } == load_split_file(OUT / SPLIT_FILE)
    assert sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file()) < 2e6


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_sample_is_what_the_script_takes_from_the_whole_set() -> None:
    rows = take_sample(whole_rows(FILES, CLASS_NAMES))
    assert load_split_file(OUT / SPLIT_FILE) == rows
    train = read_idx(idx_file(FILES, "train", "images"))
    with zipfile.ZipFile(OUT / "images.zip") as images:
        for path, _, _ in random.Random(0).sample(rows["train"], 20):
            picture = Image.open(io.BytesIO(images.read(path)))
            assert np.array_equal(np.asarray(picture), train[int(path[-9:-4])])
