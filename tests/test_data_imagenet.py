"""Miniatures of ImageNet and its four variants: labels by sorted WordNet ids, names by classnames.txt."""

from pathlib import Path

import pytest

from tests.data_miniatures import counts, read, touch, write

WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n04008634": "missile", "n03773504": "missile"}


def make_imagenet(root: Path) -> None:
    write(root / "classnames.txt", *(f"{wnid} {name}" for wnid, name in WNIDS.items()))
    for part, images in (("train", 3), ("val", 2)):
        touch(root / "images", *(f"{part}/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(images)))


def test_imagenet_labels_count_the_sorted_folders(tmp_path: Path) -> None:
    make_imagenet(tmp_path / "imagenet")
    dataset = read("imagenet", tmp_path)
    assert dataset.class_names == ("tench", "goldfish", "missile", "missile")
    assert counts(dataset) == (12, 8, 8)
    assert list(dataset.train.paths)[:4] == [
        "train/n01440764/n01440764_0.JPEG",
        "train/n01440764/n01440764_1.JPEG",
        "train/n01440764/n01440764_2.JPEG",
        "train/n01443537/n01443537_0.JPEG",
    ]
    assert dataset.train[11] == ("train/n04008634/n04008634_2.JPEG", 3)
    assert dataset.val_is_test and dataset.val == dataset.test


def test_imagenet_v2_folder_i_is_line_i_of_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2"
    names = [f"n{i:08d} thing {i}" for i in range(12)]
    write(folder / "classnames.txt", *names)
    touch(folder / "imagenetv2-matched-frequency-format-val", *(f"{i}/{i}a.jpeg" for i in range(12)))
    dataset = read("imagenetv2", tmp_path)
    assert dataset.class_names == tuple(f"thing {i}" for i in range(12))
    assert counts(dataset) == (0, 0, 12)
    assert dataset.test[10] == ("10/10a.jpeg", 10), "by number, where sorting by name would put 10 after 1"


@pytest.mark.parametrize(
    "name, images",
    [
        ("imagenet_sketch", "imagenet-sketch/images"),
        ("imagenet_a", "imagenet-adversarial/imagenet-a"),
        ("imagenet_r", "imagenet-rendition/imagenet-r"),
    ],
)
def test_wordnet_targets_score_the_classes_that_they_have(tmp_path: Path, name: str, images: str) -> None:
    make_imagenet(tmp_path / "imagenet")  # its classnames.txt serves a target that has none
    touch(tmp_path / images, "n01443537/1.jpg", "n04008634/2.jpg", "n04008634/3.jpg", "README.txt")
    dataset = read(name, tmp_path)
    assert dataset.class_names == ("goldfish", "missile")
    assert counts(dataset) == (0, 0, 3)
    assert dataset.test[2] == ("n04008634/3.jpg", 1)
