"""Hostile and broken input: one clear sentence each."""

import json
from pathlib import Path

import pytest
from scipy.io import savemat

from coop.data import check_images, load_split_file, read_dataset
from coop.errors import CoopError
from tests.data_miniatures import make_class_folders, read, touch, write

GOOD = ["a/1.jpg", 0, "cat"]


def split_with(*rows: object) -> dict[str, object]:
    return {"train": [GOOD, *rows], "val": [], "test": [GOOD]}


@pytest.mark.parametrize(
    "content, fault",
    [
        (split_with(["/etc/passwd", 1, "dog"]), "'/etc/passwd' leaves the image folder"),
        (split_with(["a/../../x.jpg", 1, "dog"]), "leaves the image folder"),
        (split_with(["..\\x.jpg", 1, "dog"]), "leaves the image folder"),
        (split_with(["C:\\x.jpg", 1, "dog"]), "leaves the image folder"),
        (split_with(["", 1, "dog"]), "is not a path"),
        (split_with([7, 1, "dog"]), "is not a path"),
        (split_with(["b/\0.jpg", 1, "dog"]), "contains a control character"),
        (split_with(["b/\ud800.jpg", 1, "dog"]), "contains a control character"),
        (split_with(["b/1.jpg", 1, "d\nog"]), "is not a class name"),
        (split_with(["b/1.jpg", 1, ["dog"] * 999]), "is not a class name"),
        (split_with(["b/1.jpg", 2, "dog"]), "none has label 1"),
        (split_with(["b/1.jpg", -1, "dog"]), "-1 is not a label"),
        (split_with(["b/1.jpg", True, "dog"]), "True is not a label"),
        (split_with(["b/1.jpg", "1", "dog"]), "'1' is not a label"),
        (split_with(["b/1.jpg", 0, "dog"]), "label 0 has two class names, 'cat' and 'dog'"),
        (split_with(["b/1.jpg", 1, "cat"]), "labels 0, 1 are all called 'cat'"),
        (split_with(["b/1.jpg", 1, " "]), "is not a class name"),
        (split_with(["b/1.jpg", 1]), "must be \\[path, label, class name\\]"),
        (split_with("b/1.jpg"), "must be \\[path, label, class name\\]"),
        ({"train": {}, "test": []}, "'train' must be a list"),
        ({"train": [GOOD]}, "not a split file: .* found train"),
        ([GOOD], "not a split file: .* found list"),
    ],
)
def test_bad_split_files(tmp_path: Path, content: object, fault: str) -> None:
    touch(tmp_path, "eurosat/2750/a/1.jpg")
    file = tmp_path / "split.json"
    file.write_text(json.dumps(content))
    with pytest.raises(CoopError, match=fault) as error:
        read("eurosat", tmp_path, split_file=str(file))
    sentence = str(error.value)
    assert sentence.startswith(str(file)) and "\n" not in sentence and len(sentence) < 400


def test_split_files_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_bytes(b"\xff{")
    with pytest.raises(CoopError, match="is not a JSON file"):
        load_split_file(tmp_path / "split.json")
    with pytest.raises(CoopError, match="cannot read"):
        load_split_file(tmp_path / "absent.json")


def test_a_linked_folder_that_leaves_the_images_is_refused_unless_it_is_your_own(tmp_path: Path) -> None:
    touch(tmp_path, "outside/1.jpg", "eurosat/2750/b/1.jpg")
    (tmp_path / "eurosat/2750/a").symlink_to(tmp_path / "outside")
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split_with(["b/1.jpg", 1, "dog"])))
    with pytest.raises(CoopError, match="'a' is a symbolic link that leaves .*follow_links"):
        read("eurosat", tmp_path)
    assert len(read("eurosat", tmp_path, follow_links=True).train) == 2
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/eurosat").symlink_to(tmp_path / "eurosat")
    assert len(read("eurosat", tmp_path / "moved", follow_links=True).train) == 2, "the dataset itself may be a link"


@pytest.mark.parametrize(
    "overrides, fault",
    [
        ({"tempate": "a {}"}, "unknown key .*did you mean 'template'"),
        ({"template": "a photo"}, "must contain {} once"),
        ({"split_seed": "x"}, "description of dataset 'eurosat' is wrong"),
        ({"split_file": "mine.json"}, "dataset.split_file='mine.json': no such file"),
        ({"class_names": "names.txt"}, "gives 1 names for 2 classes"),
        ({"root": "absent"}, "not there: no folder absent; .*dataset.root=FOLDER"),
        ({"images": "2751"}, "no image folder"),
    ],
)
def test_bad_descriptions(tmp_path: Path, overrides: dict[str, str], fault: str) -> None:
    touch(tmp_path, "eurosat/2750/b/1.jpg")
    write(tmp_path / "eurosat/names.txt", "only one")
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split_with(["b/1.jpg", 1, "dog"])))
    whole = {"name": "eurosat", "reader": "class_folders", "template": "{}", "directory": "eurosat", "images": "2750"}
    whole["official_split"] = {"file": "split_zhou_EuroSAT.json"}  # type: ignore[assignment]
    with pytest.raises(CoopError, match=fault):
        read_dataset({**whole, **overrides}, tmp_path)


def test_own_class_names(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "data", ["a", "b"])
    (tmp_path / "list.txt").write_text("ape\n\nbear\n")
    (tmp_path / "map.json").write_text('{"b": "bear"}')
    (tmp_path / "same.json").write_text('["bear", "bear"]')
    (tmp_path / "strange.json").write_text('{"z": "zebra"}')
    root = str(tmp_path / "data")
    assert read("folder", tmp_path, root=root, class_names=str(tmp_path / "list.txt")).class_names == ("ape", "bear")
    assert read("folder", tmp_path, root=root, class_names=str(tmp_path / "map.json")).class_names == ("a", "bear")
    with pytest.raises(CoopError, match="all called 'bear'"):
        read("folder", tmp_path, root=root, class_names=str(tmp_path / "same.json"))
    with pytest.raises(CoopError, match="renames 'z', which is no class"):
        read("folder", tmp_path, root=root, class_names=str(tmp_path / "strange.json"))


@pytest.mark.parametrize(
    "folders, fault",
    [
        ([], "no class folders"),
        (["a", "b_1"], "'a' has 2 images, but an own split needs 3"),
        (["train/a", "cats"], "and also 'cats'"),
        (["train/a"], "has only the folder 'train'"),
        (["train/a", "test/b"], "has the class folder 'b'"),
        (["a_b", "a b"], "all called 'a b'"),
    ],
)
def test_bad_folders(tmp_path: Path, folders: list[str], fault: str) -> None:
    for folder in folders:
        touch(tmp_path, *(f"{folder}/{i}.jpg" for i in range(2 if folder == "a" else 5)))
    with pytest.raises(CoopError, match=fault):
        read("folder", tmp_path, root=str(tmp_path))


@pytest.mark.parametrize(
    "lines, fault",
    [
        ([], "found nothing"),
        (["picture,kind", "1.jpg,cat"], "found picture, kind"),
        (["path,label,class name,split", "1.jpg,0,cat,training set"], "row 2: the split 'training set'"),
        (["path,label,class name", "1.jpg,x,cat"], "row 2: the label 'x'"),
        (["path,label", "1.jpg,0", "2.jpg"], "row 3: 1 cells"),
        (["path,class", "../1.jpg,cat"], "leaves the image folder"),
        (["path,class,split", "1.jpg,cat,train"], "only train images"),
    ],
)
def test_bad_csv(tmp_path: Path, lines: list[str], fault: str) -> None:
    write(tmp_path / "list.csv", *lines)
    with pytest.raises(CoopError, match=fault):
        read("csv", tmp_path, file=str(tmp_path / "list.csv"))


def test_damaged_mat_files(tmp_path: Path) -> None:
    folder = tmp_path / "oxford_flowers"
    touch(folder, "jpg/image_00001.jpg", "imagelabels.mat")
    with pytest.raises(CoopError, match="imagelabels.mat is not the official file"):
        read("oxford_flowers", tmp_path)
    savemat(folder / "imagelabels.mat", {"other": [1]})
    with pytest.raises(CoopError, match="is not the official file .*labels"):
        read("oxford_flowers", tmp_path)
    touch(tmp_path, "stanford_cars/x.jpg")
    with pytest.raises(CoopError, match="cars_meta.mat is missing"):
        read("stanford_cars", tmp_path)


def test_imagenet_refusals(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    touch(root, "images/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(CoopError, match="not laid out as ImageNet.*valprep"):
        read("imagenet", tmp_path)
    touch(root, "images/val/n01440764/1.JPEG")
    with pytest.raises(CoopError, match="classnames.txt is missing"):
        read("imagenet", tmp_path)
    write(root / "classnames.txt", "n01443537 goldfish")
    with pytest.raises(CoopError, match="'n01440764', which classnames.txt does not name"):
        read("imagenet", tmp_path)
    write(root / "classnames.txt", "n01440764 tench", "n01443537 goldfish")
    assert read("imagenet", tmp_path).notes[0] == "no train folder: this can only be tested on"
    touch(root, "images/train/n01443537/1.JPEG")
    with pytest.raises(CoopError, match="differ in 2 class folders"):
        read("imagenet", tmp_path)


LONG = "x" * 131_149


@pytest.mark.parametrize(
    "lines",
    [
        [f"path,{LONG}", "1.jpg,cat"],
        ["path,label,class name", '1.jpg,"0\n\n\n1",cat'],
        ["path,label,class name", f"1.jpg,{LONG},cat"],
        ["path,class", f'"{LONG}\n1.jpg",cat'],
        ["path,class", f'1.jpg,"{LONG}\ncat"'],
        ["path,class", f"{LONG}/../../1.jpg,cat"],
        ["path,class,split", f'1.jpg,cat,"{LONG}\n"'],
        ["path,label,class name", f"1.jpg,0,{LONG}", "2.jpg,0,cat"],
        ["path,class", f"1.jpg,{LONG}", f"2.jpg,{LONG}"],
        [f'path,"class\n\n{LONG}'],
    ],
)
def test_messages_about_a_csv_are_short_whatever_its_cells_hold(tmp_path: Path, lines: list[str]) -> None:
    write(tmp_path / "list.csv", *lines)
    with pytest.raises(CoopError) as error:
        read("csv", tmp_path, file=str(tmp_path / "list.csv"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_list_of_missing_images_is_short_whatever_their_names(tmp_path: Path) -> None:
    with pytest.raises(CoopError) as error:
        check_images(tmp_path, [f"{LONG}{i}" for i in range(20)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 3000


@pytest.mark.parametrize("name", ["..", "a/b", "\\", "", " ", "a\nb", "x" * 300])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    make_class_folders(tmp_path, ["a"], 5)
    with pytest.raises(CoopError, match="dataset.name="):
        read("folder", tmp_path, root=str(tmp_path), name=name)
