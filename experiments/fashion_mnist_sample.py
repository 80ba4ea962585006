"""Make the few-shot sample of Fashion-MNIST in `datasets/fashion_mnist`.

    python -m experiments.fashion_mnist_sample

The four files come from Debian's package `dataset-fashion-mnist`, or any folder with them (`--files`). The whole set
as images is `coop data prepare fashion_mnist`.
"""

import argparse
import io
import random
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from coop.data import load_description
from coop.data.few_shot import few_shot_sample, sample_indices
from coop.data.hub import idx_source, labelled, with_val
from coop.data.splits import Row, write_split_file
from coop.errors import CoopError
from coop.io import atomic_write

FILES = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).resolve().parent.parent / "datasets" / "fashion_mnist"
SPLIT_FILE = "split_fashion_mnist.json"
CLASS_NAMES = tuple(load_description("fashion_mnist").idx_classes)
SHOTS, SEEDS = 16, (1, 2, 3)
TEST_PER_CLASS, TEST_SEED = 100, 1
WRITTEN = (2017, 8, 25, 0, 0, 0)  # the time of every file in the archive: the day of Fashion-MNIST's paper


def take_sample(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return what seeds 1-3 draw at 16 shots from the whole set by CoOp's rule, and 100 test images of each class."""
    chosen: dict[str, set[str]] = {"train": set(), "val": set()}
    for seed in SEEDS:
        train, val = few_shot_sample(rows, SHOTS, seed)
        chosen["train"].update(item[0] for item in train)
        chosen["val"].update(item[0] for item in val)
    stream = random.Random(TEST_SEED)
    places = sample_indices([label for _, label, _ in rows["test"]], TEST_PER_CLASS, stream)
    chosen["test"] = {rows["test"][i][0] for i in places}
    return {part: sorted(item for item in rows[part] if item[0] in chosen[part]) for part in ("train", "val", "test")}


def write_archive(images: Mapping[str, Image.Image], archive: Path) -> None:
    """Write images as PNG files into a ZIP file, not compressed again, sorted by name."""
    with atomic_write(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as zipped:
        for path in sorted(images):
            content = io.BytesIO()
            images[path].save(content, format="PNG", optimize=True)
            zipped.writestr(zipfile.ZipInfo(path, WRITTEN), content.getvalue())


def main() -> int:
    """Write the archive of images and the split file."""
    parser = argparse.ArgumentParser(description="a few-shot sample of Fashion-MNIST as an archive of images")
    parser.add_argument("--files", type=Path, default=FILES, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write into")
    args = parser.parse_args()
    try:
        source = idx_source(args.files, CLASS_NAMES)
        whole = {part: list(labelled(source, part)) for part in source.parts}
        rows = take_sample(with_val({part: [row for row, _ in items] for part, items in whole.items()}))
        chosen = {row[0] for of_part in rows.values() for row in of_part}
        images = {row[0]: image for items in whole.values() for row, image in items if row[0] in chosen}
        write_archive(images, args.out / "images.zip")
        write_split_file(args.out / SPLIT_FILE, rows)
    except CoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(items)} {part}" for part, items in rows.items())
    print(f"{args.out}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
