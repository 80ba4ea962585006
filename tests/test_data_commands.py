"""`coop data`: what it prints, and what its exit code says."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from coop.cli import main
from tests.test_data_few_shot import SPLIT_FILES

REDUCED = {
    "caltech101": (2999, 100),
    "dtd": (560, 10),
    "eurosat": (1594, 10),
    "oxford_flowers": (3060, 102),
    "oxford_pets": (180, 3),
}


def coop(*words: str) -> int:
    return main(["data", *words])


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    """Return a data root with two classes of EuroSAT, without a split file."""
    for name in ("Forest", "River"):
        folder = tmp_path / "eurosat/2750" / name
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{name}_{number}.jpg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("name", SPLIT_FILES)
def test_printed_samples_equal_the_published_ones(assets: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = json.loads((assets / "reference/few_shot_oracle.json").read_text())["cases"][name]
    file = str(assets / "splits" / f"split_zhou_{SPLIT_FILES[name]}.json")
    assert len(cases) == 15
    for case, parts in cases.items():
        shots, seed = case.replace("-shot seed", "").split()
        assert coop("sample", name, "--shots", shots, "--seed", seed, "--split-file", file) == 0
        lines = capsys.readouterr().out.removesuffix("\n").split("\n")
        train, val = lines[: parts["train"]["count"]], lines[parts["train"]["count"] :]
        assert len(val) == parts["val"]["count"]
        for part, of_part in (("train", train), ("val", val)):
            assert hashlib.sha256("\n".join(of_part).encode()).hexdigest() == parts[part]["digest"], case


@pytest.mark.assets
@pytest.mark.parametrize("name", REDUCED)
def test_reduced_real_datasets_have_no_faults(assets: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert coop("check", name, "--no-decode", "--data-root", str(assets / "data")) == 0
    out = capsys.readouterr().out
    images, classes = REDUCED[name]
    assert "every file is there" in out and "FAULT" not in out
    assert f"classes: {classes} (" in out
    counts = [int(line.split()[1]) for line in out.splitlines() if line.startswith(("train:", "val:", "test:"))]
    assert sum(counts) == images


def test_list_tells_what_is_there(eurosat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coop("list", "--data-root", str(eurosat)) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("eurosat")]
    assert "20 of 27000 images" in line and "own split" in line and "MIT" in line
    (line,) = [line for line in lines if line.startswith("fashion_mnist")]  # a sample of it ships with the toolkit
    assert "1598 of 70000 images" in line and "sample" in line
    assert sum("not there" in line for line in lines) == 14


def test_check_reports_missing_and_unreadable_files(eurosat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = eurosat / "eurosat/2750"
    rows = [[f"River/River_{i}.jpg", 0, "River"] for i in range(10)]
    split = {"train": rows[:6], "val": rows[6:8], "test": [*rows[8:], ["Forest/Forest_77.jpg", 1, "Forest"]]}
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    (images / "River/River_1.jpg").write_bytes((images / "River/River_1.jpg").read_bytes()[:100])
    assert coop("check", "eurosat", "--data-root", str(eurosat), "--classes") == 1
    out = capsys.readouterr().out
    assert "FAULT Forest/Forest_77.jpg: missing" in out
    assert "FAULT River/River_1.jpg: cannot read the image" in out
    assert "2 files are missing or cannot be read" in out
    assert "differs from the whole dataset: train: 6 of 13500" in out
    assert "not the official file" in out
    assert [line.split() for line in out.splitlines() if line.startswith("1 ")] == [["1", "Forest", "0", "0", "1"]]


def test_sample_is_printed_or_written(eurosat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "eurosat", "--shots", "2", "--seed", "3", "--data-root", str(eurosat)]
    assert coop(*words) == 0
    printed = capsys.readouterr()
    assert "own" in printed.err, "an own split is never silent"
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [row[1:] for row in rows] == [["0", "Forest"]] * 2 + [["1", "River"]] * 2 + [["0", "Forest"]] * 2 + [
        ["1", "River"]
    ] * 2
    assert coop(*words, "--output", str(tmp_path / "s.json")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 's.json'}\n"
    written = json.loads((tmp_path / "s.json").read_text())
    assert [[row[0], str(row[1]), row[2]] for row in written["train"] + written["val"]] == rows


def test_own_folder_by_root(eurosat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coop("check", f"dataset.root={eurosat / 'eurosat/2750'}", "folder", "--no-decode", "dataset.name=land") == 0
    out = capsys.readouterr().out
    assert "own split: 50/20/30" in out and out.startswith("land: ")


@pytest.mark.parametrize(
    "words, told",
    [
        ("check eurosta", "did you mean 'eurosat'"),
        ("check dtd", "'dtd' is not there"),
        ("prepare folder dataset.root=x", "nothing to fetch"),
        ("check folder dataset.rot=x", "did you mean 'root'"),
        ("sample eurosat --shots 1 --output=", "--output ''"),
        ("sample eurosat --shots 1 --output .", "the name of a file"),
        ("sample eurosat --shots 1 dataset.rename=[", "dataset.rename=["),
        ("sample eurosat --shots 1 dataset.rename=[1]", "dataset 'eurosat' is wrong"),
        ("sample eurosat --shots 1 dataset.split_seed={", "dataset.split_seed={"),
        ("sample eurosat --shots 1 --validation min5", "did you mean 'min4'"),
        ("sample eurosat --shots 0", "1 or more, or all"),
        ("sample eurosat --shots 1.5", "shots=1.5"),
        ("sample eurosat --shots 1 --seed -1", "seed=-1"),
        ("check folder dataset.root=x dataset.name=../y", "dataset.name='../y'"),
    ],
)
def test_mistakes_are_one_sentence(eurosat: Path, words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert coop(*words.split(), "--data-root", str(eurosat)) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1 and len(err) < 500


@pytest.mark.parametrize("words", [["check", "folder", "root=x"], ["sample", "dtd", "--shots", "1", "--seed", "x"]])
def test_words_that_no_command_takes(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        coop(*words)


@pytest.mark.parametrize("quotes", ["{}", "'{}'", '"{}"'])
@pytest.mark.parametrize("template", ["a photo of a {}, a type of bird.", "{} texture: [rough], #1", "true {}"])
def test_a_template_is_taken_as_the_shell_passes_it(
    eurosat: Path, template: str, quotes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"dataset.root={eurosat / 'eurosat/2750'}"
    given = f"dataset.template={quotes.replace('{}', template)}"
    assert coop("check", "folder", "--no-decode", root, given) == 0
    assert f"template: {template}\n" in capsys.readouterr().out


def test_the_validation_rule_of_a_sample(eurosat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {}
    for rule in ("none", "min4", "full"):
        assert coop("sample", "eurosat", "--shots", "1", "--validation", rule, "--data-root", str(eurosat)) == 0
        lines[rule] = capsys.readouterr().out.splitlines()
    assert [len(lines[rule]) for rule in lines] == [2, 4, 6]
    assert lines["min4"][:2] == lines["none"] == lines["full"][:2]
