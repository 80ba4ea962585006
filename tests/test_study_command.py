"""`coop study`, the grids of all studies, and the time that is left."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from coop.cli import main
from coop.runs.grid import study_cells
from coop.runs.remaining import Remaining, remaining
from coop.runs.status import duration
from coop.runs.study import Cell, load_study, study_names

LEARNED = ("CoOp", "CoCoOp", "KgCoOp", "ProGrad, M=4")
GRIDS = {  # runs of each series, counted by hand: datasets x backbones x options x shots x seeds
    "backbones": {"zero-shot": 11 * 8, "CoOp, M=16, end": 11 * 8 * 3},
    "base_to_new": {"zero-shot": 11} | dict.fromkeys(LEARNED, 11 * 3),
    "clip_adapter": {"zero-shot": 11}
    | dict.fromkeys(("linear probe", "CoOp, M=16, end", "CLIP-Adapter"), 11 * 5 * 3)
    | dict.fromkeys(("CLIP-Adapter by ratio", "CLIP-Adapter by bottleneck"), 2 * 6 * 3),
    "context_length": {f"CoOp, M={m}, {at}": 11 * 3 for m in (4, 8, 16) for at in ("end", "middle")},
    "cross_dataset": {"zero-shot": 1} | dict.fromkeys(LEARNED, 3),
    "demo": {"zero-shot": 1, "zero-shot, 7 templates": 1, "CoOp, M=16, end": 3 * 3},
    "ensembling": dict.fromkeys(("one template", "7 templates", "80 templates"), 4) | {"CoOp, M=16, end": 4 * 3},
    "initialisation": dict.fromkeys(("random, untrained", "random, trained", "a photo of a, trained"), 11 * 3)
    | {"a photo of a, untrained": 11},
    "nearest_words": {"CoOp, M=16, end": 5},
    "prompt_or_not": dict.fromkeys(("class name alone", "template", "7 templates", "80 templates"), 11 * 6),
    "robustness": {"zero-shot": 4} | dict.fromkeys(("linear probe", "CoOp, M=16, end", "CoOp, M=4, end"), 4 * 3),
    "zero_shot_or_supervised": {"zero-shot": 11, "linear probe": 11},
}


def test_every_study_is_counted() -> None:
    assert {*GRIDS, "few_shot"} == set(study_names())


@pytest.mark.parametrize("name", GRIDS)
def test_a_study_runs_the_papers_grid(name: str) -> None:
    cells = study_cells(load_study(name))
    assert Counter(cell.label for cell in cells) == GRIDS[name]
    for cell in cells:
        about = cell.about
        if about["method"] == "coop" and name not in ("demo", "initialisation"):
            assert about["epochs"] == (50 if about["dataset"] == "imagenet" or about["shots"] == 1 else about["epochs"])
            assert about["lr"] == 0.002 and about["batch_size"] == 32
        if name in ("base_to_new", "cross_dataset") and about["method"] != "zero_shot":
            assert (about["ctx_init"], about["n_ctx"], about["shots"]) == ("a photo of a", None, 16)
    targets = {cell.targets for cell in cells}
    if name == "robustness":
        assert targets == {("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r", "average")}
    elif name == "base_to_new":
        assert targets == {("base", "new", "harmonic_mean")}
    elif name == "cross_dataset":
        assert {(len(some), some[0], some[-1]) for some in targets} == {(12, "imagenet", "average")}
    else:
        assert targets == {(cell.about["dataset"],) for cell in cells}


def test_the_ablations_go_round_the_default() -> None:
    cells = [cell for cell in study_cells(load_study("clip_adapter")) if cell.label.startswith("CLIP-Adapter")]
    runs = {(c.about["ratio"], c.about["reduction"]) for c in cells if c.label != "CLIP-Adapter"}
    ratios, reductions = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 4, 8, 16, 32)
    assert runs == {(ratio, 4) for ratio in ratios} | {(0.2, reduction) for reduction in reductions}
    words = study_cells(load_study("prompt_or_not"), ["dataset=dtd", "backbone=rn50"])
    assert {c.label: c.about["template"] for c in words} == {
        "class name alone": "{}",
        "template": None,
        "7 templates": "imagenet7",
        "80 templates": "imagenet80",
    }


def run(seconds: float | None, **about: object) -> tuple[Cell, str, float | None]:
    whole = {"dataset": "dtd", "method": "coop", "shots": 1, "epochs": 50, "seed": 1} | about
    return Cell("x", whole, ("dtd",), ()), "missing" if seconds is None else "done", seconds


def test_time_left_is_that_of_the_same_kind() -> None:
    done = [run(10.0), run(20.0, seed=2), run(7.0, method="clip_adapter", shots=4, epochs=100)]
    assert remaining(done) == Remaining(0.0, 0, 0)
    assert remaining([*done, run(None, seed=3)]) == Remaining(15.0, 1, 0)  # the mean over seeds
    scaled = remaining([*done, run(None, method="clip_adapter", shots=16, epochs=200)])
    assert scaled.seconds == pytest.approx(7.0 * 16 * 200 / (4 * 100)) and scaled.estimated == 1
    strange = [run(None, dataset="eurosat"), run(None, method="kgcoop"), run(None, shots="all", epochs=200)]
    assert remaining([*done, *strange]) == Remaining(0.0, 0, 3)
    assert [duration(s) for s in (45.0, 120.0, 3600.0, 7200.0)] == [
        "45 seconds",
        "2.0 minutes",
        "1.0 hours",
        "2.0 hours",
    ]


def test_the_command_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in study_names()) and "\x1b" not in listed
    assert main(["study", "demo"]) == 0
    out = capsys.readouterr().out
    assert "coop run -m +experiment=demo" in out and "Figure 3" in out and "11 runs" in out
    for wrong, told in ((["study", "dem"], "demo"), (["study", "--status"], "NAME"), (["study", "demo", "a=1"], "a")):
        assert main(wrong) == 2
        assert told in capsys.readouterr().err


def test_status_counts_what_lies_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = study_cells(load_study("demo"), ["dataset=dtd,fashion_mnist", "backbone=lit_lite"])
    kept = [cell for cell in cells if cell.about["dataset"] == "dtd" and cell.about["shots"] == 4]
    for number, cell in enumerate(kept):  # what a run leaves: two are done, one failed
        folder = tmp_path / "dtd" / "lit_lite" / "coop" / str(number)
        folder.mkdir(parents=True)
        identity = {**cell.about, "data": "x"}
        metrics = dict.fromkeys(("accuracy", "macro_f1", "ece", "mean_confidence"), 0.5) | {"n": 2}
        result = {"identity": identity, "targets": {"dtd": metrics}, "seconds": {"fit": 60.0}, "own_split": False}
        failure = {"identity": identity, "error": "no memory", "traceback": None}
        result |= {"notes": [], "finished": f"2026-01-0{number + 1}"}
        name, content = ("result.json", result) if number else ("failure.json", failure)
        (folder / name).write_text(json.dumps(content))
    place = [f"results={tmp_path}", f"data_root={tmp_path / 'none'}"]
    assert main(["study", "demo", "dataset=dtd,fashion_mnist", "backbone=lit_lite", *place, "--status"]) == 0
    out = capsys.readouterr().out
    assert "2 done, 19 missing, 1 failed, of 22 runs" in out
    row = next(line for line in out.splitlines() if "CoOp" in line and "dtd" in line)
    assert row.split()[-4:] == ["dtd", "2", "6", "1"]
    assert "failed: no memory" in out and str(tmp_path / "dtd" / "lit_lite" / "coop" / "0") in out
    assert "no data for 9 runs on dtd" in out and "coop data prepare dtd" in out
    minutes = (60 + 3 * 60 * 1 * 50 / (4 * 100) + 3 * 60 * 16 * 200 / (4 * 100)) / 60
    assert f"about {minutes:.1f} minutes for 7 runs" in out and "no estimate for 13 runs" in out
    assert math.isclose(minutes, 25.375)
