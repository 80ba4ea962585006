"""Datasets of torchvision and of the Hugging Face hub become image files and a split file, pixel for pixel."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as torchvision_datasets

from coop.cli import main
from coop.data import Dataset, load_description, open_rgb, read_dataset
from coop.data.prepare import prepare_dataset
from tests.data_miniatures import counts


def saved(folder: Path, *names: str, images: int = 5) -> None:
    """Save images of random pixels in class folders."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng([len(name), i]).integers(0, 256, (6, 5, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def prepared(data_root: Path, source: str, **overrides: object) -> Dataset:
    spec = load_description("hub", source=source, **overrides)
    said: list[str] = []
    assert prepare_dataset(spec, data_root, said.append), said
    assert prepare_dataset(spec, data_root, said.append) and len(said) == 1, "nothing is written twice"
    return read_dataset(spec, data_root)


def test_three_official_parts(tmp_path: Path) -> None:
    raw = tmp_path / "hub/torchvision-RenderedSST2/download"
    for part in ("train", "valid", "test"):
        saved(raw / "rendered-sst2" / part, "negative", "positive")
    dataset = prepared(tmp_path, "torchvision:RenderedSST2")
    assert dataset.name == "RenderedSST2" and dataset.class_names == ("negative", "positive")
    assert counts(dataset) == (10, 10, 10) and not dataset.own_split
    theirs = torchvision_datasets.RenderedSST2(raw, split="test")
    for (path, label), (image, their_label) in zip(
        ((dataset.test.paths[i], dataset.test.labels[i]) for i in range(10)), theirs, strict=True
    ):
        assert label == their_label and np.array_equal(open_rgb(dataset.root / path), np.asarray(image))


def test_no_validation_part(tmp_path: Path) -> None:
    raw = tmp_path / "hub/torchvision-MNIST/download/MNIST/raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    dataset = prepared(tmp_path, "torchvision:MNIST")
    assert counts(dataset) == (30, 10, 20) and dataset.own_split and "torchvision:MNIST" in dataset.split_source
    assert dataset.class_names[2] == "two", "torchvision calls it '2 - two'"


def test_a_set_in_one_piece(tmp_path: Path) -> None:
    saved(tmp_path / "hub/torchvision-ImageFolder/download", "big_dog", "cat", images=10)
    dataset = prepared(tmp_path, "torchvision:ImageFolder", name="pets")
    assert dataset.name == "pets" and dataset.class_names == ("big dog", "cat") and counts(dataset) == (10, 4, 6)


def test_hugging_face(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="the Hugging Face library is not installed")
    if not hasattr(library, "load_dataset"):
        pytest.skip("the Hugging Face library is not installed")
    for part in ("train", "test"):
        saved(tmp_path / "set" / part, "big_dog", "cat")
    dataset = prepared(tmp_path, f"huggingface:{tmp_path / 'set'}", name="pets")
    assert dataset.class_names == ("big dog", "cat") and counts(dataset) == (8, 2, 10)
    shutil.rmtree(tmp_path / "set")
    for path, label in (dataset.test[i] for i in range(10)):
        assert open_rgb(dataset.root / path).size == (5, 6) and path.startswith(("big_dog/", "cat/")[label])


@pytest.mark.parametrize(
    "words, told",
    [
        ("check hub", "dataset.source=torchvision:NAME"),
        ("prepare hub", "dataset.source=torchvision:NAME"),
        ("prepare hub dataset.source=torchvison:CIFAR10", "torchvision:NAME or huggingface"),
        ("prepare hub dataset.source=torchvision:CIFAR1", "did you mean 'CIFAR10'"),
        (
            "prepare hub dataset.source=torchvision:CocoDetection",
            "images of torchvision:CocoDetection cannot be written",
        ),
        ("check hub dataset.source=torchvision:CIFAR10", "coop data prepare hub dataset.source=torchvision:CIFAR10"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words.split(), "--data-root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1 and len(err) < 4000
    assert not list(tmp_path.rglob("*.png"))
