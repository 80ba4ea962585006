"""Class by class: a report's details against scikit-learn, on the predictions that real small runs kept."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, recall_score

from coop.cli import main
from coop.report.detail import Detail, Details, Runs
from coop.report.frame import planned, with_difference
from coop.report.words import ReportWords
from coop.runs.store import Predictions, read_predictions, stored_runs
from coop.runs.study import DetailPart, WordsPart
from tests.small_place import make_place, words_for

COLOURS = {"red cup": (200, 30, 30), "green leaf": (30, 200, 30), "blue car": (30, 30, 200), "brown bag": (99, 60, 20)}
SHOW = DetailPart(label="CoOp", baseline="zero-shot", where={"shots": 2})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, noisy images of four colours, and the runs on them: zero-shot, and CoOp with two seeds."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2), ("test", 9)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            (folder / "noisy" / part / name).mkdir(parents=True)
            for i in range(count + number):
                pixels = np.clip(np.array(colour) + random.integers(-120, 120, (150, 200, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "noisy" / part / name / f"{i}.png")
    words = words_for(folder, folder / "results")
    common = [text for text in words if not text.startswith(("augment", "epochs", "dataset.root"))]
    common.append(f"dataset.root={folder / 'noisy'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_CACHE", str(folder / "cache"))
        assert main(["run", *common, "method=zero_shot"]) == 0
        grid = ["method=coop", "shots=2", "seed=1,2", "epochs=20", "lr=0.5", "n_ctx=3", "augment.views=0"]
        assert main(["run", "-m", *common, *grid]) == 0
    return folder


@pytest.fixture
def results(place: Path, tmp_path: Path) -> Path:
    """Return a copy of the runs that a test may change."""
    return shutil.copytree(place / "results", tmp_path / "results")


def frame_of(results: Path) -> pd.DataFrame:
    runs = stored_runs(results)
    plan = [("zero-shot" if r.key.method == "zero_shot" else "CoOp", r.key, ("colours",)) for r in runs if r.key]
    return with_difference(planned(plan, runs, results))


def detail_of(results: Path) -> Detail:
    (detail,), notes = Details(Runs(results))(frame_of(results), SHOW)
    assert notes == []
    return detail


def kept(results: Path, method: str) -> list[Predictions]:
    folders = sorted(path.parent for path in results.rglob(f"{method}/*/result.json"))
    return [read_predictions(folder)["colours"] for folder in folders]


def test_classes_are_sorted_by_their_gain(results: Path) -> None:
    detail = detail_of(results)
    learned, (zero,) = kept(results, "coop"), kept(results, "zero_shot")
    assert len(learned) == 2 and len(detail.runs) == 2
    names = sorted(COLOURS)
    after = 100 * np.mean([recall_score(run.label, run.predicted, average=None) for run in learned], axis=0)
    before = 100 * recall_score(zero.label, zero.predicted, average=None)
    found = {gain.name: gain for gain in detail.classes}
    assert set(found) == set(names) and len(set(after - before)) > 1
    for i, name in enumerate(names):
        assert found[name].learned == pytest.approx(after[i], abs=1e-4)
        assert found[name].baseline == pytest.approx(before[i], abs=1e-4)
        assert found[name].n == int((zero.label == i).sum())
    gains = [gain.learned - gain.baseline for gain in detail.classes]
    assert gains == sorted(gains, reverse=True)


def test_reliability_is_scikit_learns_and_its_error_the_results(results: Path) -> None:
    detail = detail_of(results)
    for (label, ece, bins), method in zip(detail.reliability, ("coop", "zero_shot"), strict=True):
        runs = kept(results, method)
        sure = np.concatenate([run.confidence for run in runs])
        right = np.concatenate([run.predicted == run.label for run in runs])
        assert sure.max() < 1  # torchmetrics has a bin of its own for 1.0
        accuracy, confidence = calibration_curve(right, sure, n_bins=15)
        there = [one for one in bins if one.n]
        assert len(bins) == 15 and sum(one.n for one in bins) == len(sure)
        assert [one.accuracy for one in there] == pytest.approx(100 * accuracy)
        assert [one.confidence for one in there] == pytest.approx(100 * confidence, rel=1e-5)
        told = [
            json.loads(path.read_text())["targets"]["colours"]["ece"]
            for path in results.rglob(f"{method}/*/result.json")
        ]
        assert ece == pytest.approx(100 * np.mean(told)), label
        if len(runs) == 1:
            gaps = sum(one.n * abs((one.accuracy or 0) - (one.confidence or 0)) for one in there) / len(sure)
            assert gaps == pytest.approx(ece, abs=1e-3)


def test_confusions_are_those_of_the_matrix(results: Path) -> None:
    detail = detail_of(results)
    learned, (zero,) = kept(results, "coop"), kept(results, "zero_shot")
    names = sorted(COLOURS)
    ours = np.mean([confusion_matrix(run.label, run.predicted, labels=range(4)) for run in learned], axis=0)
    theirs = confusion_matrix(zero.label, zero.predicted, labels=range(4))
    off = ~np.eye(4, dtype=bool)
    assert len(detail.confusions) == int((ours[off] > 0).sum()) > 0
    for one in detail.confusions:
        i, j = names.index(one.label), names.index(one.predicted)
        assert i != j and one.n == theirs[i].sum()
        assert one.learned == pytest.approx(100 * ours[i, j] / one.n)
        assert one.baseline == pytest.approx(100 * theirs[i, j] / one.n)
    counts = [round(one.learned * one.n) for one in detail.confusions]
    assert counts == sorted(counts, reverse=True)


def test_examples_are_images_that_changed(results: Path, place: Path) -> None:
    detail = detail_of(results)
    first, (zero,) = kept(results, "coop")[0], kept(results, "zero_shot")
    names = sorted(COLOURS)
    shown = [(gain, example) for gain in detail.classes for example in gain.examples]
    assert shown and not detail.note
    for gain, example in shown:
        mine = np.asarray(_decoded(example.image), dtype=float)
        assert max(mine.shape) <= 112 and len(example.image) < 12_000 and example.label == gain.name
        files = [place / "noisy" / "test" / gain.name / f"{i}.png" for i in range(gain.n)]
        small = [np.asarray(Image.open(file).resize(mine.shape[1::-1]), dtype=float) for file in files]
        which = int(np.argmin([np.abs(mine - one).mean() for one in small]))
        index = np.flatnonzero(zero.label == names.index(gain.name))[which]
        assert (
            example.baseline == names[zero.predicted[index]] and example.learned == names[first.predicted[index]]
        )
        right = example.learned if gain.learned > gain.baseline else example.baseline
        assert right == example.label and example.learned != example.baseline


def _decoded(address: str) -> Image.Image:
    head, _, body = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_without_the_same_images_a_note_says_why(results: Path, place: Path) -> None:
    for path in results.rglob("config.yaml"):
        path.write_text(path.read_text().replace(str(place / "noisy"), str(place / "gone")))
    detail = detail_of(results)
    assert "gone" in detail.note and not any(gain.examples for gain in detail.classes) and detail.confusions

    other = shutil.copytree(place / "noisy", place / "gone")
    (other / "test" / "red cup" / "0.png").unlink()
    assert "not the one that the runs used" in detail_of(results).note
    shutil.rmtree(other)


def test_runs_without_predictions_still_have_classes(results: Path) -> None:
    for path in results.rglob("predictions.safetensors"):
        path.unlink()
    detail = detail_of(results)
    assert "did not keep" in detail.note and len(detail.classes) == 4 and detail.reliability == ()


def test_words_need_the_backbone(results: Path, place: Path) -> None:
    show = WordsPart(label="CoOp", where={"shots": 2})
    published = pd.DataFrame(
        columns=["label", "dataset", "backbone", "shots", "position", "word", "distance", "verified"]
    )
    (words,), notes = ReportWords(results, published, unverified=True)(frame_of(results), show)
    assert "seed1" in words.run and notes == [] and [len(near) for near in words.vectors] == [5, 5, 5]
    for near in words.vectors:
        distances = [distance for _, _, distance in near]
        assert distances == sorted(distances) and all(whole and text.isalpha() for text, whole, _ in near)

    row = {"label": "CoOp", "dataset": "colours", "backbone": "tiny", "shots": 2, "distance": 1.5, "verified": False}
    published = pd.DataFrame([row | {"position": 2, "word": "sea"}, row | {"position": 1, "word": "sky"}])
    (place / "tiny.pt").rename(place / "away.pt")
    try:
        (words,), notes = ReportWords(results, published, unverified=True)(frame_of(results), show)
    finally:
        (place / "away.pt").rename(place / "tiny.pt")
    assert words.vectors == () and words.published == (("sky", 1.5, False), ("sea", 1.5, False))
    assert "cannot be loaded here" in notes[0]
    assert ReportWords(results, published)(frame_of(results), show)[0][0].published == ()  # never checked: on request
