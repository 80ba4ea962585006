"""Your own data: folders of class folders, and a CSV; parts that are missing are made."""

from pathlib import Path

import pytest

from tests.data_miniatures import counts, make_class_folders, read, write


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
