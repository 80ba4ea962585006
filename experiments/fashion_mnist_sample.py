"""Make the few-shot sample of Fashion-MNIST in `datasets/fashion_mnist`.

    python -m experiments.fashion_mnist_sample

The four files come from Debian's package `dataset-fashion-mnist`, or any folder with them (`--files`). The whole set
as images is `coop data prepare fashion_mnist`.
"""

import argparse
import random
import sys
import tempfile
import zipfile
from pathlib import Path

from coop.data import load_description
from coop.data.convert import idx_rows, write_idx_images
from coop.data.few_shot import few_shot_sample, sample_indices
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


def write_archive(images: Path, archive: Path, rows: dict[str, list[Row]]) -> None:
    """Write the PNG files of a split's rows below `images` into a ZIP file, not compressed again, sorted by name."""
    with atomic_write(archive) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as zipped:
        for path in sorted(path for part in rows.values() for path, _, _ in part):
            zipped.writestr(zipfile.ZipInfo(path, WRITTEN), (images / path).read_bytes())


def main() -> int:
    """Write the archive of images and the split file."""
    parser = argparse.ArgumentParser(description="a few-shot sample of Fashion-MNIST as an archive of images")
    parser.add_argument("--files", type=Path, default=FILES, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write into")
    args = parser.parse_args()
    try:
        rows = take_sample(idx_rows(args.files, CLASS_NAMES))
        with tempfile.TemporaryDirectory() as place:
            write_idx_images(args.files, Path(place), rows)
            write_archive(Path(place), args.out / "images.zip", rows)
        write_split_file(args.out / SPLIT_FILE, rows)
    except CoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(items)} {part}" for part, items in rows.items())
    print(f"{args.out}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
