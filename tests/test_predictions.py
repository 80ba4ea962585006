"""What a run keeps of its test images, on real ones: against scikit-learn, the images' files, and the classifier."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from coop.cli import main
from coop.data.images import unpacked_images
from coop.learned import Classifier
from coop.runs.store import read_predictions

pytestmark = pytest.mark.slow  # a run of lit_lite on real images
FASHION = Path(__file__).resolve().parents[1] / "datasets" / "fashion_mnist"


@pytest.fixture(scope="module")
def rows() -> list[list[Any]]:
    """Return (file, label, name) of 75 test images, 3 of class 0 up to 12 of class 9, not in the classes' order."""
    split = json.loads((FASHION / "split_fashion_mnist.json").read_text())
    some = [[row for row in split["test"] if row[1] == label][: 3 + label] for label in range(10)]
    return sorted((row for part in some for row in part), key=lambda row: row[0][-9:])


@pytest.fixture(scope="module")
def run(rows: list[list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a zero-shot run of lit_lite on these images."""
    place = tmp_path_factory.mktemp("run")
    split = json.loads((FASHION / "split_fashion_mnist.json").read_text()) | {"test": rows}
    (place / "split.json").write_text(json.dumps(split))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_CACHE", str(place / "cache"))
        arguments = ["dataset=fashion_mnist", f"dataset.root={FASHION}", f"dataset.split_file={place / 'split.json'}"]
        arguments += ["backbone=lit_lite", "method=zero_shot", "workers=0", f"results={place / 'results'}"]
        assert main(["run", *arguments]) == 0
    (result,) = (place / "results").rglob("result.json")
    return result.parent


def test_predictions_are_in_the_order_of_the_test_split(run: Path, rows: list[list[Any]]) -> None:
    (found,) = read_predictions(run).values()
    labels = [label for _, label, _ in rows]
    assert found.label.tolist() == labels and labels != sorted(labels)
    assert list(found.paths) == [path for path, _, _ in rows]
    names = json.loads((run / "result.json").read_text())["targets"]["fashion_mnist"]["per_class_accuracy"]
    assert list(names) == [name for _, name in sorted({(label, name) for _, label, name in rows})]


def test_metrics_follow_from_the_predictions(run: Path) -> None:
    kept = read_predictions(run)["fashion_mnist"]
    metrics = json.loads((run / "result.json").read_text())["targets"]["fashion_mnist"]
    truth, found = kept.label, kept.predicted
    assert metrics["n"] == len(found) == 75
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, found), abs=1e-6)
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, found, average="macro", zero_division=0), abs=1e-6)
    assert metrics["mean_confidence"] == pytest.approx(kept.confidence.mean(), abs=1e-6)
    counts = confusion_matrix(truth, found, labels=range(10))
    per_class = counts.diagonal() / counts.sum(axis=1)
    assert list(metrics["per_class_accuracy"].values()) == pytest.approx(per_class.tolist(), abs=1e-6)
    assert metrics["accuracy"] != pytest.approx(per_class.mean(), abs=1e-3)  # so that one cannot pass for the other


def test_the_classifier_agrees_on_the_images_files(run: Path, rows: list[list[Any]]) -> None:
    kept = read_predictions(run)["fashion_mnist"]
    some = range(0, len(rows), 6)
    classifier = Classifier.load(run, device="cpu")
    images = unpacked_images(FASHION / "images.zip")
    answers = classifier.predict([images / rows[i][0] for i in some], top=1)
    assert len({name for ((name, _),) in answers}) > 2
    for i, ((name, confidence),) in zip(some, answers, strict=True):
        assert classifier.class_names[kept.predicted[i]] == name
        assert float(kept.confidence[i]) == pytest.approx(confidence, abs=1e-4)
    assert kept.confidence.dtype == np.float32


def test_colleagues_can_read_every_file_of_a_run(run: Path) -> None:
    """Permissions are those of the umask, whoever wrote the file."""
    probe = run / "probe"
    probe.touch()
    expected = probe.stat().st_mode
    probe.unlink()
    assert {path.name: path.stat().st_mode for path in run.iterdir()} == {path.name: expected for path in run.iterdir()}
