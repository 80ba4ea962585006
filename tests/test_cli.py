"""The command line from end to end, on a tiny CLIP and real files: runs, sweeps, what follows them, and mistakes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from coop.cli import main
from coop.learned import Classifier
from tests.small_place import COLOURS, make_place, words_for


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def arguments(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COOP_CACHE", str(place / "cache"))
    return words_for(place, tmp_path / "results")


def results_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("result.json"))


def test_one_run_and_all_that_follows(
    arguments: list[str], tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "shots=2", "n_ctx=3"]) == 0
    (path,) = results_of(tmp_path)
    result, folder = json.loads(path.read_text()), path.parent
    assert (folder / "config.yaml").is_file() and (folder / "sample.json").is_file()
    assert result["fit"] == {"n_ctx": 3, "steps": 3} | {k: result["fit"][k] for k in ("first_loss", "last_loss")}
    assert len(json.loads((folder / "sample.json").read_text())["train"]) == 6

    classifier = Classifier.load(folder)
    assert classifier.class_names == ("blue car", "green leaf", "red cup")
    images = sorted((place / "images" / "test").rglob("*.png"))
    truth = [sorted(COLOURS).index(image.parent.name) for image in images]
    found = classifier.probabilities(images)
    metrics = result["targets"]["colours"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, found.argmax(1)), abs=1e-6)
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, found.argmax(1), average="macro"), abs=1e-6)
    assert metrics["mean_confidence"] == pytest.approx(float(found.max(1).values.mean()), abs=1e-5)

    capsys.readouterr()
    assert main(["words", str(folder), "--top", "2", "--format", "json"]) == 0
    (words,) = json.loads(capsys.readouterr().out)
    assert words["class"] is None and [len(row) for row in words["context"]] == [2, 2, 2]
    assert main(["predict", str(folder), str(images[0]), "--classes", "sky,sea", "--format", "json"]) == 0
    (predicted,) = json.loads(capsys.readouterr().out)
    assert {name for name, _ in predicted["classes"]} == {"sky", "sea"}
    assert sum(p for _, p in predicted["classes"]) == pytest.approx(1)


def test_a_sweep_goes_on_where_it_stopped(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [*arguments, "method=zero_shot,coop", "shots=1,2", "seed=1,2"]
    assert main(["run", "-m", *grid]) == 0
    first = results_of(tmp_path)
    assert len(first) == 5 and "5 runs: 0 done already, 5 to do" in capsys.readouterr().out  # zero-shot runs once
    stamps = [path.stat().st_mtime_ns for path in first]
    shutil.rmtree(first[0].parent)
    assert main(["run", "-m", *grid]) == 0
    assert "5 runs: 4 done already, 1 to do" in capsys.readouterr().out
    assert results_of(tmp_path) == first and [path.stat().st_mtime_ns for path in first[1:]] == stamps[1:]

    assert main(["table", str(tmp_path / "results"), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dataset,backbone,method,shots,mean,std,n,difference" and len(lines) == 4


def test_equal_seeds_give_equal_results(arguments: list[str], tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        assert main(["run", *arguments, "shots=2", "augment.views=epochs", f"results={tmp_path / name}"]) == 0
        (path,) = results_of(tmp_path / name)
        results.append(json.loads(path.read_text()))
    assert results[0]["fit"] == results[1]["fit"] and results[0]["targets"] == results[1]["targets"]


def test_a_failing_run_stops_no_other(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", *arguments, "shots=1", "n_ctx=40,2", "seed=1"]) == 1
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out
    (failure,) = tmp_path.rglob("failure.json")
    named = json.loads(failure.read_text())
    assert "blue car" in named["error"] and "24" in named["error"] and named["traceback"] is None
    assert len(results_of(tmp_path)) == 1


def test_untrained_and_all_shots_are_runs(arguments: list[str], tmp_path: Path) -> None:
    assert main(["run", *arguments, "shots=all", "epochs=0", "class_specific=true", "ctx_init=a photo of a"]) == 0
    (path,) = results_of(tmp_path)
    result = json.loads(path.read_text())
    assert result["fit"] == {"n_ctx": 4, "steps": 0}
    assert len(json.loads((path.parent / "sample.json").read_text())["train"]) == 12


def test_base_to_new(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments, "shots=1", "protocol=base_to_new"]) == 0
    (path,) = results_of(tmp_path)
    result = json.loads(path.read_text())
    base, new = (result["targets"][name] for name in ("base", "new"))
    assert list(base["per_class_accuracy"]) == ["blue car", "green leaf"]
    assert list(new["per_class_accuracy"]) == ["red cup"]
    expected = 2 * base["accuracy"] * new["accuracy"] / (base["accuracy"] + new["accuracy"])
    assert result["harmonic_mean"] == pytest.approx(expected) and result["accuracy"] == base["accuracy"]
    capsys.readouterr()
    assert main(["run", *arguments, "shots=1", "protocol=base_to_new", "class_specific=true"]) == 2
    assert "class-specific" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["dataset=eurosta"], ["eurosta", "eurosat"]),
        (["method=cop"], ["cop", "coop"]),
        (["shotz=4"], ["shotz"]),
        (["shots=0"], ["shots=0"]),
        (["shots=1,2"], ["shots=1,2"]),
        (["n_ctx=many"], ["n_ctx", "many"]),
        (["n_ctx=0"], ["n_ctx=0"]),
        (["ctx_position=frnt"], ["frnt", "front"]),
        (["precision=fp8"], ["fp8", "fp32"]),
        (["device=cuda:99"], ["cuda:99"]),
        (["augment.views=-1"], ["augment.views=-1"]),
        (["kg_weight=1"], ["kg_weight", "kgcoop"]),
        (["backbone.architecture=RN5"], ["RN5", "RN50"]),
        (["backbone.architecture=RN50", "backbone.pretrained=opnai"], ["opnai", "openai"]),
        (["backbone.architecture=RN50"], ["RN50"]),
        (["dataset.root=/nowhere"], ["/nowhere"]),
        (["protocol=cross_dataset", "protocol.targets=[dtdd]"], ["dtdd", "dtd"]),
        (["n_ctx=30"], ["n_ctx=30", "24"]),
        (["lr=.inf"], ["lr"]),
        (["lr=1e30", "shots=4"], ["not finite", "lower lr"]),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    changes: Sequence[str],
    named: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *arguments, *changes]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("coop: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert all(word in err for word in named), err
    assert not results_of(tmp_path)


def test_mistakes_after_the_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    assert main(["table", str(results)]) == 2 and str(results) in capsys.readouterr().err
    assert main(["run", *arguments, "shots=1", "class_specific=true"]) == 0
    (path,) = results_of(tmp_path)
    run = str(path.parent)
    capsys.readouterr()
    for command, word in (
        (["words", run, "--class", "blue cra"], "blue car"),
        (["words", run, "--metric", "manhattan"], "euclidean"),
        (["words", str(tmp_path / "none")], "none"),
        (["predict", run, str(tmp_path / "none.png")], "none.png"),
        (["predict", run, str(path), "--classes", "a,b"], "class-specific"),
        (["predict", run, str(path)], "result.json"),
        (["table", str(results), "--rows", "metod"], "method"),
        (["table", str(results), "--where", "shots=99"], "shots=1"),
        (["table", str(results), "--format", "pdf"], "latex"),
    ):
        assert main(command) == 2, command
        err = capsys.readouterr().err
        assert word in err and len(err.strip().splitlines()) == 1, err
