"""A miniature of every dataset's true layout, annotation files in their true formats: counts, names, label order."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from coop.data import dataset_descriptions, load_description
from coop.errors import CoopError
from tests.data_miniatures import counts, make_class_folders, name_of, read, touch, write


@pytest.mark.parametrize(
    "name, images, folders, expected",
    [
        (
            "caltech101",
            "caltech-101/101_ObjectCategories",
            ["airplanes", "Faces", "Leopards", "Motorbikes", "accordion", "BACKGROUND_Google", "Faces_easy"],
            ("face", "leopard", "motorbike", "accordion", "airplane"),
        ),
        ("food101", "food-101/images", ["waffles", "apple_pie"], ("apple_pie", "waffles")),
        ("dtd", "dtd/images", ["zigzagged", "banded"], ("banded", "zigzagged")),
        (
            "eurosat",
            "eurosat/2750",
            [
                "AnnualCrop",
                "Forest",
                "HerbaceousVegetation",
                "Highway",
                "Industrial",
                "Pasture",
                "PermanentCrop",
                "Residential",
                "River",
                "SeaLake",
            ],
            (
                "Annual Crop Land",
                "Forest",
                "Herbaceous Vegetation Land",
                "Highway or Road",
                "Industrial Buildings",
                "Pasture Land",
                "Permanent Crop Land",
                "Residential Buildings",
                "River",
                "Sea or Lake",
            ),
        ),
    ],
)
def test_class_folders_without_a_split_file_are_split_by_the_originals_rule(
    tmp_path: Path, name: str, images: str, folders: list[str], expected: tuple[str, ...]
) -> None:
    make_class_folders(tmp_path / images, folders)
    touch(tmp_path / images, f"{folders[0]}/.hidden.jpg", f"{folders[0]}/notes.txt")
    dataset = read(name, tmp_path)
    n = len(expected)
    assert dataset.class_names == expected
    assert counts(dataset) == (5 * n, 2 * n, 3 * n)
    assert dataset.split_source == "own split: 50/20/30 of every class, seed 1"
    assert "not comparable" in dataset.notes[0] and "split_zhou_" in dataset.notes[0]
    assert dataset.root == tmp_path / images
    for part, per_class in ((dataset.train, 5), (dataset.val, 2), (dataset.test, 3)):
        assert np.bincount(part.labels).tolist() == [per_class] * n
    assert len(set(name_of(dataset))) == 10 * n, "no image is in two parts"
    assert read(name, tmp_path).digest == dataset.digest
    assert read(name, tmp_path, split_seed=2).digest != dataset.digest


def test_oxford_pets(tmp_path: Path) -> None:
    def lines(breeds: dict[str, int], numbers: range) -> list[str]:
        return [f"{breed}_{number} {label} 1 1" for breed, label in breeds.items() for number in numbers]

    breeds = {"Abyssinian": 1, "american_pit_bull_terrier": 2}
    write(tmp_path / "oxford_pets/annotations/trainval.txt", *lines(breeds, range(10)))
    write(tmp_path / "oxford_pets/annotations/test.txt", *lines(breeds, range(10, 15)))
    touch(tmp_path, "oxford_pets/images/Abyssinian_1.jpg")
    dataset = read("oxford_pets", tmp_path)
    assert dataset.class_names == ("abyssinian", "american_pit_bull_terrier")
    assert counts(dataset) == (16, 4, 10)
    assert dataset.split_source.startswith("official annotation files; own split: val is 20 % of every class of train")
    assert "split_zhou_OxfordPets.json is not in" in dataset.notes[0]
    assert name_of(dataset)["american_pit_bull_terrier_12.jpg"] == "american_pit_bull_terrier"
    assert sorted(dataset.test.paths) == sorted(f"{b}_{i}.jpg" for b in breeds for i in range(10, 15))


def car_annotations(path: Path, items: list[tuple[str, int]], key: str = "annotations") -> None:
    """Write annotations as the devkit has them: a struct array of boxes, class and file name."""
    fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    array = np.array([[(np.array([[39]]), np.array([[c]], np.uint8), f) for f, c in items]], dtype=fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {key: array})


def make_cars(root: Path) -> None:
    names = np.array([["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]], dtype=object)
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    car_annotations(root / "devkit/cars_train_annos.mat", [(f"{i:05d}.jpg", i % 2 + 1) for i in range(1, 21)])
    car_annotations(root / "cars_test_annos_withlabels.mat", [(f"{i:05d}.jpg", 2 - i % 2) for i in range(1, 5)])


def test_stanford_cars(tmp_path: Path) -> None:
    make_cars(tmp_path / "stanford_cars")
    dataset = read("stanford_cars", tmp_path)
    assert dataset.class_names == ("2000 AM General Hummer SUV", "2012 Ram C/V Cargo Van Minivan")
    assert counts(dataset) == (16, 4, 4)
    names = name_of(dataset)
    assert names["cars_train/00001.jpg"] == "2012 Ram C/V Cargo Van Minivan"
    assert names["cars_test/00001.jpg"] == "2000 AM General Hummer SUV"


def test_oxford_flowers(tmp_path: Path) -> None:
    folder = tmp_path / "oxford_flowers"
    touch(folder, "jpg/image_00001.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[2] * 10 + [1] * 10 + [3] * 10], np.uint8)})
    (folder / "cat_to_name.json").write_text(
        json.dumps({"2": "hard-leaved pocket orchid", "1": "pink primrose", "3": "rose"})
    )
    dataset = read("oxford_flowers", tmp_path)
    assert dataset.class_names == ("pink primrose", "hard-leaved pocket orchid", "rose")
    assert counts(dataset) == (15, 6, 9)
    assert dataset.train.labels[0] == 1, "classes come in order of first appearance, as few-shot sampling sees them"
    assert name_of(dataset)["image_00011.jpg"] == "pink primrose"


def test_fgvc_aircraft_has_an_official_split(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    touch(folder, "images/1025794.jpg")
    write(folder / "variants.txt", "707-320", "A340-200", "DH-82 Tiger Moth")
    write(folder / "images_variant_train.txt", "0000001 A340-200", "0000002 707-320", "0000003 707-320")
    write(folder / "images_variant_val.txt", "0000004 DH-82 Tiger Moth")
    write(folder / "images_variant_test.txt", "0000005 DH-82 Tiger Moth", "0000006 707-320")
    dataset = read("fgvc_aircraft", tmp_path)
    assert dataset.class_names == ("707-320", "A340-200", "DH-82 Tiger Moth")
    assert counts(dataset) == (3, 1, 2)
    assert dataset.train[0] == ("0000001.jpg", 1)
    assert dataset.split_source.startswith("official")
    assert dataset.notes == (
        "classes without train images: 1, first 'DH-82 Tiger Moth'",
        "classes without test images: 1, first 'A340-200'",
    )


def test_sun397(tmp_path: Path) -> None:
    folder = tmp_path / "sun397"
    touch(folder, "SUN397/a/abbey/sun_1.jpg")
    write(folder / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    both = ("/a/apartment_building/outdoor", "/a/abbey")
    write(folder / "Training_01.txt", *(f"{place}/sun_{i}.jpg" for place in both for i in range(5)))
    write(folder / "Testing_01.txt", *(f"{place}/sun_{i}.jpg" for place in both for i in range(5, 8)))
    dataset = read("sun397", tmp_path)
    assert dataset.class_names == ("abbey", "outdoor apartment_building")
    assert counts(dataset) == (8, 2, 6)
    assert dataset.test[0] == ("a/apartment_building/outdoor/sun_5.jpg", 1)


def test_ucf101(tmp_path: Path) -> None:
    folder = tmp_path / "ucf101"
    touch(folder, "UCF-101-midframes/Yo_Yo/v_YoYo_g08_c01.jpg")
    write(folder / "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup", "2 YoYo")
    train = [f"{a}/v_{a}_g08_c{i:02d}.avi {n}" for n, a in ((2, "YoYo"), (1, "ApplyEyeMakeup")) for i in range(1, 6)]
    write(folder / "ucfTrainTestlist/trainlist01.txt", *train)
    write(
        folder / "ucfTrainTestlist/testlist01.txt",
        "YoYo/v_YoYo_g01_c01.avi",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    )
    dataset = read("ucf101", tmp_path)
    assert dataset.class_names == ("Apply_Eye_Makeup", "Yo_Yo")
    assert counts(dataset) == (8, 2, 2)
    assert dataset.test[0] == ("Yo_Yo/v_YoYo_g01_c01.jpg", 1)


def test_every_description_is_whole() -> None:
    known = dataset_descriptions()
    assert len(known) >= 17
    for name in known:
        description = load_description(name)
        assert description.name == name
        if name not in ("folder", "csv", "hub"):
            assert description.source and description.licence and description.size and description.expected.classes


def test_split_file_wins_over_annotations(tmp_path: Path) -> None:
    touch(tmp_path, "stanford_cars/cars_train/00001.jpg")
    with pytest.raises(CoopError, match="no split_zhou_StanfordCars.json.*cars_meta.mat is missing.*data prepare"):
        read("stanford_cars", tmp_path)
    make_cars(tmp_path / "stanford_cars")
    own = read("stanford_cars", tmp_path)
    assert own.own_split and own.digest != read("stanford_cars", tmp_path, split_seed=2).digest
    split = {
        part: [[f"cars_{part}/1.jpg", 0, "2012 Car"], ["cars_train/2.jpg", 1, "2011 Car"]] for part in ("train", "test")
    }
    (tmp_path / "stanford_cars/split_zhou_StanfordCars.json").write_text(json.dumps({**split, "val": []}))
    dataset = read("stanford_cars", tmp_path)
    assert dataset.class_names == ("2012 Car", "2011 Car")
    assert "not the official file" in dataset.split_source
    assert dataset.notes[0] == "images listed more than once: 1, first 'cars_train/2.jpg'"
