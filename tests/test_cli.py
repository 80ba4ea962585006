"""The command line from end to end, on a tiny CLIP and real files: runs, sweeps, what follows them, and mistakes."""

import json
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

import coop
from coop.cli import main
from coop.config import run_config
from coop.errors import CoopError
from coop.learned import Classifier, load_learned
from coop.runs.grid import single
from coop.runs.run import TUNED_ON_TEST, Resources, prepare
from coop.runs.store import stored_runs
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
    coarse = "the test part of 'colours' has 15 images: one more right is 6.7 points of accuracy"
    assert [note for note in result["notes"] if "points" in note] == [coarse]
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
    for command, ending, begins in (
        (["predict", str(folder), str(images[0])], "csv", "image,rank,class,probability,error\n"),
        (["words", str(folder)], "json", "[\n"),
        (["table", str(tmp_path / "results")], "tex", "\\begin{tabular}"),
        (["table", str(tmp_path / "results")], "md", "| dataset"),
        (["table", str(tmp_path / "results")], "txt", "dataset "),
    ):
        assert main([*command, "--output", str(tmp_path / f"out.{ending}")]) == 0
        assert (tmp_path / f"out.{ending}").read_text().startswith(begins)
    capsys.readouterr()
    for ending, command in (("xlsx", "table"), ("json", "table"), ("tex", "words")):
        where = str(folder) if command == "words" else str(tmp_path / "results")
        assert main([command, where, "--output", str(tmp_path / f"not.{ending}")]) == 2
        assert "--format" in capsys.readouterr().err and not (tmp_path / f"not.{ending}").exists()


def test_a_sweep_goes_on_where_it_stopped(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [*arguments, "method=zero_shot,coop", "shots=1,2", "seed=1,2"]
    assert main(["run", "-m", *grid]) == 0
    first = results_of(tmp_path)
    assert len(first) == 5 and "5 runs: 0 done already, 5 to do" in capsys.readouterr().out  # zero-shot runs once
    stamps = [path.stat().st_mtime_ns for path in first]
    shutil.rmtree(first[0].parent)
    attempt = first[1].parent / ".attempt"  # of a process that was killed right after its result
    attempt.touch()
    assert main(["run", "-m", *grid]) == 0
    assert not attempt.exists()
    assert "5 runs: 4 done already, 1 to do" in capsys.readouterr().out
    assert results_of(tmp_path) == first and [path.stat().st_mtime_ns for path in first[1:]] == stamps[1:]
    first[0].write_text("{}")
    assert main(["run", "-m", *grid]) == 1
    out = capsys.readouterr().out
    assert "4 done, 0 failed, 1 with a damaged result" in out and str(first[0].parent) in out
    assert first[0].read_text() == "{}"


def test_equal_seeds_give_equal_results(arguments: list[str], tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        assert main(["run", *arguments, "shots=2", "augment.views=epochs", f"results={tmp_path / name}"]) == 0
        (path,) = results_of(tmp_path / name)
        results.append(json.loads(path.read_text()))
    assert results[0]["fit"] == results[1]["fit"] and results[0]["targets"] == results[1]["targets"]


def test_a_failing_run_stops_no_other(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", *arguments, "shots=1", "n_ctx=40,2", "seed=1,2"]) == 1
    out = capsys.readouterr().out
    assert "2 done, 2 failed" in out
    assert out.count("blue car") == 1 and "failed: as [1/4]" in out, "a reason is told once"
    failure, _ = tmp_path.rglob("failure.json")
    named = json.loads(failure.read_text())
    assert "blue car" in named["error"] and "24" in named["error"] and named["traceback"] is None
    assert len(results_of(tmp_path)) == 2


def test_the_demo_without_its_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coop.clip.lit_lite.TRUNK_PACKAGE", "a_package_that_is_not_installed")
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    assert main(["demo", "--results", str(tmp_path / "demo")]) == 2
    out, err = capsys.readouterr()
    assert "coop-clip[demo]" in err and len(err.splitlines()) == 1 and "failed" not in out
    assert not (tmp_path / "demo").exists()


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
        (["n_ctx=1000000000000"], ["n_ctx=1000000000000", "24"]),
        (["method=tcp", "layer=1", "n_ctx=1000000000000"], ["n_ctx=1000000000000", "24"]),
        (["lr=.inf"], ["lr"]),
        pytest.param(["lr=1e30", "shots=4"], ["not finite", "lower lr"], marks=pytest.mark.slow),
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
    if changes[0].startswith(("backbone", "device", "dataset")) and named != ["RN50"]:  # that one has to be loaded
        assert not (tmp_path / "results").exists(), "a wrong name leaves nothing"


def test_a_command_that_there_is_not_has_its_closest_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "tabel"]) == 2
    assert "unknown command 'tabel': did you mean 'table'?" in capsys.readouterr().err


def test_mistakes_after_the_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments, "shots=1", "class_specific=true"]) == 0
    (path,) = results_of(tmp_path)
    run = str(path.parent)
    capsys.readouterr()
    for command, word in (
        (["words", run, "--class", "blue cra"], "blue car"),
        (["words", run, "--metric", "manhattan"], "euclidean"),
        (["words", str(tmp_path / "none")], "none"),
        (["predict", run, str(path), "--classes", "a,b"], "class-specific"),
    ):
        assert main(command) == 2, command
        err = capsys.readouterr().err
        assert word in err and len(err.strip().splitlines()) == 1, err


def test_a_run_from_python_is_the_command_s(arguments: list[str], tmp_path: Path) -> None:
    assert main(["run", *arguments, "shots=2", "n_ctx=3"]) == 0
    values = single([*arguments, "shots=2", "n_ctx=3", f"results={tmp_path / 'python'}"])
    result = coop.run(**values)
    (theirs,) = results_of(tmp_path / "results")
    ours = Path(result["folder"])
    assert result["targets"] == json.loads(theirs.read_text())["targets"]
    assert (ours.name, ours / "result.json") == (theirs.parent.name, results_of(tmp_path / "python")[0])
    before = (ours / "result.json").stat().st_mtime_ns
    assert coop.run(**values) == result and (ours / "result.json").stat().st_mtime_ns == before
    with pytest.raises(CoopError, match="shots"):
        coop.run(**{**values, "shot": 1})
    assert all(getattr(coop, name) is not None for name in coop.__all__)


@pytest.mark.slow
def test_validation_is_part_of_what_a_run_is(
    arguments: list[str], tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are counted by hand: 4, 2 and 5 of each of three classes are train, val and test.

    What was chosen on the test images is said of that run alone: in the sweep, the table and with its predictions.
    """
    words = [word for word in arguments if not word.startswith("epochs=")]
    rules = {"none": 0, "min4": 3, "shots": 3, "full": 6, "test": 15}
    asked = f"validation={','.join(rules)}"
    alpha = ["alpha=1", "beta=1"]
    assert main(["run", "-m", *words, "method=tip_adapter", "shots=1", asked]) in (0, 1)
    printed = capsys.readouterr()
    swept = printed.out + printed.err
    found = {run.key.validation: run for run in stored_runs(tmp_path / "results") if run.key and run.state == "done"}
    assert found.keys() - {"none"} == rules.keys() - {"none"}
    for rule, run in found.items():
        assert run.validation["rule"] == rule and run.validation["images"] == rules[str(rule)]
        assert (TUNED_ON_TEST in run.notes) is (rule == "test")
        lines = [line for line in swept.splitlines() if f"validation-{rule}" in line and " %" in line]
        assert all(("chosen on the test images" in line) is (rule == "test") for line in lines)
        assert lines or rule in ("none", "min4")
        image = str(next((place / "images").rglob("*.png")))
        assert main(["predict", str(run.folder), image]) == 0
        assert ("chosen on its test images" in capsys.readouterr().err) is (rule == "test")
    assert main(["table", str(tmp_path / "results")]) == 0
    assert "†" in capsys.readouterr().out
    assert main(["run", *words, "method=tip_adapter", "shots=1", *alpha, f"results={tmp_path / 'fixed'}"]) == 0
    (fixed,) = stored_runs(tmp_path / "fixed")
    assert fixed.validation == {"rule": None, "images": 0, "settings_tried": 1}
    words += ["method=tip_adapter", "validation=held_out", f"results={tmp_path / 'held_out'}"]
    assert main(["run", *words, "shots=3"]) == 0
    (held_out,) = stored_runs(tmp_path / "held_out")
    assert held_out.validation["images"] == 3
    assert load_learned(held_out.folder).state["keys"].shape[0] == 6
    assert main(["run", *words, "shots=1"]) == 2


def test_own_folders_are_tested_on_under_names_of_their_own(
    arguments: list[str], tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test images of one target have other labels, so that its accuracy is another one."""
    for name, moved in (("one", 0), ("two", 1)):
        for part in ("train", "test"):
            names = sorted(COLOURS)
            for i, label in enumerate(names):
                source = place / "images" / part / label
                shutil.copytree(source, tmp_path / name / "cars" / part / names[(i + moved) % 3])
    targets = f"protocol.targets=[{tmp_path}/one/cars,{tmp_path}/two/cars]"
    assert main(["run", *arguments, "shots=2", "protocol=cross_dataset", targets]) == 0
    out = capsys.readouterr().out
    (run,) = stored_runs(tmp_path / "results")
    assert list(run.targets) == ["colours", "cars", "two-cars"] and run.key is not None
    assert [name for name, digest in run.key.targets if digest] == ["cars", "two-cars"]
    assert run.accuracies["cars"] == run.accuracies["colours"]
    assert run.summary["average"] == pytest.approx((run.accuracies["cars"] + run.accuracies["two-cars"]) / 2)
    assert "two-cars" in out and "average" in out


def test_a_backbone_that_cannot_be_loaded_is_tried_once(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    config = run_config(single([*arguments, f"backbone.pretrained={tmp_path / 'damaged.pt'}"]))
    resources, errors = Resources(), []
    for _ in range(2):
        with pytest.raises(CoopError) as caught:
            resources.backbone(config)
        errors.append(caught.value)
    assert errors[0] is errors[1]


def test_a_sweep_is_prepared_where_there_is_no_gpu(arguments: list[str]) -> None:
    """On a cluster's login node; the processes that do the runs look for the device."""
    config = run_config(single([*arguments, "device=cuda:99"]))
    assert not prepare(config, Resources()).folder.exists()


def test_a_sweep_that_finds_no_room_stops_and_loses_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may be longer than 300 bytes for a while: what the system then refuses is not the runs' failure."""
    grid = ["run", "-m", *arguments, "shots=1", "seed=1,2,3"]
    assert main([*grid[:-1], "seed=1"]) == 0
    (first,) = results_of(tmp_path)
    before = first.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        code = main(grid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert code == 1 and "stopped: 1 of 3 runs are done" in out
    assert len(err.strip().splitlines()) == 1 and "File too large" in err and str(tmp_path) in err
    assert first.read_bytes() == before and not list(tmp_path.rglob("failure.json"))
    assert not list(tmp_path.rglob(".*.tmp"))
    assert main(grid) == 0 and len(results_of(tmp_path)) == 3


@pytest.mark.slow
def test_an_interruption_of_the_configuration_is_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at each of many calls within OmegaConf, whose clean-up may raise an error of its own instead."""

    def interrupted_at(call: int, title: str) -> int:
        calls = 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            if event == "call" and "omegaconf" in frame.f_code.co_filename:
                calls += 1
                if calls == call:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(profile)
        try:
            code = main(["run", "--cfg", *arguments, f"dataset.title={title}", f"lr={0.1 + call / 1e6}"])
        finally:
            sys.setprofile(None)
        assert code == 130 or calls < call
        return calls

    total = interrupted_at(10**9, "all")
    for call in range(1, total, total // 80):
        reached = interrupted_at(call, str(call)) >= call
        assert ("interrupted" in capsys.readouterr().err) is reached, call
        assert reached or call > total // 2


def test_logits_that_are_not_finite_are_no_result(arguments: list[str], tmp_path: Path, place: Path) -> None:
    state = torch.load(place / "tiny.pt", weights_only=True)
    state["text_projection"] = torch.full_like(state["text_projection"], float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    words = [w for w in arguments if not w.startswith(("epochs", "augment", "backbone.pretrained"))]
    assert main(["run", *words, f"backbone.pretrained={tmp_path / 'nan.pt'}", "method=zero_shot"]) == 2
    assert not results_of(tmp_path)
