"""Your own data: folders of class folders, and a CSV; parts that are missing are made."""

import shutil
import zipfile
from pathlib import Path

import pytest

from coop.data import check_images, describe_folder, read_dataset
from coop.errors import CoopError
from tests.data_miniatures import counts, make_class_folders, name_of, read, write


def test_folder_with_three_parts(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "train", ["002.Laysan_Albatross", "001.Black_footed_Albatross"], 4)
    make_class_folders(tmp_path / "validation", ["001.Black_footed_Albatross"], 1)
    make_class_folders(tmp_path / "test", ["001.Black_footed_Albatross", "002.Laysan_Albatross"], 2)
    dataset = read("folder", Path("unused"), root=str(tmp_path))
    assert dataset.class_names == ("Black footed Albatross", "Laysan Albatross")
    assert counts(dataset) == (8, 1, 4)
    assert dataset.split_source == "folders train, validation, test"
    assert dataset.test[3] == ("test/002.Laysan_Albatross/002.Laysan_Albatross_0001.jpg", 1)


def test_folder_of_class_folders_is_split(tmp_path: Path) -> None:
    make_class_folders(tmp_path, ["big_dog", "cat"])
    dataset = read("folder", Path("unused"), root=str(tmp_path))
    assert dataset.class_names == ("big dog", "cat")
    assert counts(dataset) == (10, 4, 6)
    assert dataset.split_source.startswith("own split: 50/20/30")


@pytest.mark.parametrize("given, expected", [(["train", "test"], (8, 2, 10)), (["train", "val"], (8, 2, 10))])
def test_folder_makes_the_part_that_is_missing(
    tmp_path: Path, given: list[str], expected: tuple[int, int, int]
) -> None:
    for part in given:
        make_class_folders(tmp_path / part, ["a", "b"], 5)
    dataset = read("folder", Path("unused"), root=str(tmp_path))
    assert counts(dataset) == expected
    assert "own split: val is 20 % of every class" in dataset.split_source
    assert all(path.startswith(given[1]) for path in dataset.test.paths)


def test_csv_with_and_without_a_split(tmp_path: Path) -> None:
    rows = [f"a/{i}.png,0,cat,{part}" for i, part in enumerate(["train", "train", "val", "test"])]
    rows += [f'b/{i}.png,1,"dog, big",{part}' for i, part in enumerate(["train", "valid", "test", "test"])]
    write(tmp_path / "list.csv", "path,label,class name,split", *rows)
    dataset = read("csv", Path("unused"), file=str(tmp_path / "list.csv"))
    assert dataset.class_names == ("cat", "dog, big")
    assert counts(dataset) == (3, 2, 3)
    assert (dataset.split_source, dataset.root) == ("list.csv", tmp_path)
    write(tmp_path / "bare.csv", "file_name,class", *(f"{c}{i}.png,{c}" for c in ("zebra", "ant") for i in range(10)))
    bare = read("csv", Path("unused"), file=str(tmp_path / "bare.csv"), root=str(tmp_path))
    assert bare.class_names == ("ant", "zebra"), "names without labels are sorted"
    assert counts(bare) == (10, 4, 6)
    assert bare.split_source == "bare.csv; own split: 50/20/30 of every class, seed 1"
    write(tmp_path / "list.csv", "path,class,split", *(f"{i}.png,ant,{'val' if i < 3 else 'train'}" for i in range(10)))
    lacking = read("csv", Path("unused"), file=str(tmp_path / "list.csv"))
    assert counts(lacking) == (6, 1, 3), "as of a folder, val is the test part where there is none"
    assert "own split: val is the test part; own split: val is 20 %" in lacking.split_source


def test_classes_called_train_and_test_are_had_with_a_flat_layout(tmp_path: Path) -> None:
    make_class_folders(tmp_path, ["train", "bus", "test"], 10)
    with pytest.raises(CoopError, match=r"train, test and also 'bus'.*dataset\.layout=flat"):
        read("folder", Path("unused"), root=str(tmp_path))
    dataset = read("folder", Path("unused"), root=str(tmp_path), layout="flat")
    assert dataset.class_names == ("bus", "test", "train") and counts(dataset) == (15, 6, 9)
    with pytest.raises(CoopError, match="did you mean 'flat'"):
        read("folder", Path("unused"), root=str(tmp_path), layout="flatt")
    make_class_folders(tmp_path / "own", ["a"], 10)
    with pytest.raises(CoopError, match="layout=parts"):
        read("folder", Path("unused"), root=str(tmp_path / "own"), layout="parts")


def test_images_without_class_folders_in_a_part(tmp_path: Path) -> None:
    make_class_folders(tmp_path, ["train", "test"], 10)
    with pytest.raises(CoopError, match="has images but no class folders.*dataset.layout=flat"):
        read("folder", Path("unused"), root=str(tmp_path))


def test_images_in_folders_inside_a_class_folder_are_the_class(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "bird", ["male", "female/young"], 5)
    make_class_folders(tmp_path, ["cat"], 4)
    make_class_folders(tmp_path / "cat", [".hidden", "__MACOSX"], 4)
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    dataset = read("folder", Path("unused"), root=str(tmp_path))
    names = name_of(dataset)
    assert [sum(name == wanted for name in names.values()) for wanted in ("bird", "cat")] == [10, 4]
    assert sorted(names)[0].startswith("bird/female/young/")


def test_a_csv_with_words_as_labels(tmp_path: Path) -> None:
    write(tmp_path / "w.csv", "path,label", *(f"{c}{i}.png,{c}" for c in ("zebra", "ant_eater") for i in range(10)))
    assert read("csv", Path("unused"), file=str(tmp_path / "w.csv")).class_names == ("ant eater", "zebra")
    write(tmp_path / "m.csv", "path,label", "1.png,0", "2.png,ant")
    with pytest.raises(CoopError, match="row 3: the label 'ant' .*call it 'class name'"):
        read("csv", Path("unused"), file=str(tmp_path / "m.csv"))


def test_class_names_are_cleaned_alike_in_folders_and_in_a_csv(tmp_path: Path) -> None:
    folders = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    make_class_folders(tmp_path / "birds", folders)
    write(tmp_path / "b.csv", "path,class", *(f"birds/{f}/{f}_{i:04d}.jpg,{f}" for f in folders for i in range(10)))
    for clean, expected in ((True, ("Black footed Albatross", "Laysan Albatross")), (False, tuple(folders))):
        folder = read("folder", Path("unused"), root=str(tmp_path / "birds"), clean_names=clean)
        table = read("csv", Path("unused"), file=str(tmp_path / "b.csv"), clean_names=clean)
        assert folder.class_names == table.class_names == expected


def test_own_sets_are_called_by_their_folder_or_file_and_their_split_is_noted(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "birds.v2", ["a", "b"], 5)
    write(tmp_path / "list.csv", "path,class", *(f"birds.v2/{c}/{c}_{i:04d}.jpg,{c}" for c in "ab" for i in range(5)))
    dataset = read("folder", Path("unused"), root=str(tmp_path / "birds.v2"))
    assert dataset.name == "birds.v2"
    assert dataset.notes == ("the split was made here: 4 train, 2 val, 4 test images",)
    assert read("csv", Path("unused"), file=str(tmp_path / "list.csv")).name == "list"
    assert read("folder", Path("unused"), root=str(tmp_path / "birds.v2"), name="mine").name == "mine"


def test_paths_are_described_by_distinct_names(tmp_path: Path) -> None:
    taken: list[str] = []
    for place in ("x/birds", "y/birds", "birds", "birds"):
        make_class_folders(tmp_path / place, ["a", "b"], 5)
        spec = describe_folder(tmp_path / place, taken, template="{} here")
        taken.append(spec.name)
        assert counts(read_dataset(spec, Path("unused"))) == (4, 2, 4)
        assert spec.template == "{} here"
    assert taken[:2] == ["birds", "y-birds"] and len(set(taken)) == 4
    write(tmp_path / "birds.csv", "path,class,split", "x/birds/a/a_0000.jpg,a,test")
    assert len(read_dataset(describe_folder(tmp_path / "birds.csv"), Path("unused")).test) == 1
    with pytest.raises(CoopError, match="no folder or CSV file"):
        describe_folder(tmp_path / "absent")


def test_a_zip_file_of_images_is_unpacked_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "eurosat"
    make_class_folders(folder / "2750", ["a", "b"])
    with zipfile.ZipFile(folder / "2750.zip", "w") as zipped:
        for path in sorted((folder / "2750").rglob("*.jpg")):
            zipped.write(path, path.relative_to(folder / "2750"))
    plain = read("eurosat", tmp_path)
    shutil.rmtree(folder / "2750")
    dataset = read("eurosat", tmp_path)
    assert dataset.digest == plain.digest and dataset.root.is_relative_to(tmp_path / "cache")
    check_images(dataset.root, list(name_of(dataset)))
    stamps = {path: path.stat() for path in dataset.root.rglob("*.jpg")}
    assert read("eurosat", tmp_path).root == dataset.root
    shutil.rmtree(dataset.root)
    dataset.root.with_name(f"{dataset.root.name}.tmp").mkdir()  # of a process that was killed
    assert read("eurosat", tmp_path).root == dataset.root
    for path, stamp in stamps.items():
        assert (path.stat().st_mtime_ns, path.stat().st_size) == (stamp.st_mtime_ns, stamp.st_size)
    assert not list((tmp_path / "cache" / "images").glob("*.tmp"))


@pytest.mark.parametrize("damage", ["../out.jpg", "cut", "flipped"])
def test_a_damaged_or_hostile_zip_file_of_images(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "eurosat" / "2750.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../out.jpg" if damage == "../out.jpg" else "a/1.jpg", b"image" * 100)
    content = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[:-20])
    if damage == "flipped":
        archive.write_bytes(content.replace(b"imageimage", b"imageimagf", 1))
    with pytest.raises(CoopError, match="unpack"):
        read("eurosat", tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))
