"""Studies: their runs against counts by hand from the papers, what is refused, and their state on disk."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from coop.cli import _duration, main
from coop.config import run_config
from coop.errors import CoopError
from coop.runs.key import RunKey
from coop.runs.store import stored_runs, write_failure, write_result
from coop.runs.study import (
    Study,
    TimeLeft,
    load_study,
    match_runs,
    planned_runs,
    read_study,
    study_names,
    time_left,
)

ELEVEN = {
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
}  # fmt: skip
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
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


def counted(study: Study, *overrides: str) -> Counter[str]:
    return Counter(run.label for run in planned_runs(study, overrides))


def option(key: RunKey, name: str) -> Any:
    return key.columns().get(name)


def test_few_shot_is_figure_3() -> None:
    study = load_study("few_shot")
    runs = planned_runs(study)
    assert {run.key.dataset for run in runs} == ELEVEN
    per_series = 11 * 5 * 3  # datasets, shots, seeds
    assert counted(study) == {"zero-shot": 11} | {series.label: per_series for series in study.series[1:]}
    assert len(study.series) == 6 and all(run.key.backbone == "rn50" for run in runs) and study.size() == len(runs)
    epochs = {(run.key.dataset == "imagenet", run.key.shots): option(run.key, "epochs") for run in runs}
    assert epochs[False, 1] == 50 and epochs[False, 2] == epochs[False, 4] == 100
    assert epochs[False, 8] == epochs[False, 16] == 200 and epochs[True, 16] == 50


SLOW = {"methods": pytest.mark.slow}  # of thousands of runs


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in study_names()])
def test_a_study_runs_the_papers_grid(name: str) -> None:
    study = load_study(name)
    runs = planned_runs(study)
    assert len(runs) == study.size()
    if name not in GRIDS:
        pytest.skip("not counted by hand here")
    assert Counter(run.label for run in runs) == GRIDS[name]
    for run in runs:
        key = run.key
        if key.method == "coop" and name not in ("demo", "initialisation"):
            assert key.dataset != "imagenet" and key.shots != 1 or option(key, "epochs") == 50
            assert option(key, "lr") == 0.002 and option(key, "batch_size") == 32
        if name in ("base_to_new", "cross_dataset") and key.method != "zero_shot":
            assert (option(key, "ctx_init"), option(key, "n_ctx"), key.shots) == ("a photo of a", None, 16)
    reported = {run.reported for run in runs}
    if name == "robustness":
        assert reported == {("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r", "average")}
    elif name == "base_to_new":
        assert reported == {("base", "new", "harmonic_mean")}
    elif name == "cross_dataset":
        assert {(len(some), some[0], some[-1]) for some in reported} == {(12, "imagenet", "average")}
    else:
        assert reported == {(run.key.dataset,) for run in runs}


def test_the_ablations_go_round_the_default() -> None:
    runs = [run for run in planned_runs(load_study("clip_adapter")) if run.label.startswith("CLIP-Adapter by")]
    ratios, reductions = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (1, 2, 4, 8, 16, 32)
    assert {(option(run.key, "ratio"), option(run.key, "reduction")) for run in runs} == {
        *((ratio, 4) for ratio in ratios),
        *((0.2, reduction) for reduction in reductions),
    }
    words = planned_runs(load_study("prompt_or_not"), ["dataset=dtd", "backbone=rn50"])
    assert {run.label: option(run.key, "template") for run in words} == {
        "class name alone": "{}",
        "template": None,
        "7 templates": "imagenet7",
        "80 templates": "imagenet80",
    }


def test_overrides_take_the_place_of_grids() -> None:
    study = load_study("few_shot")
    few = ["dataset=dtd,eurosat", "shots=1,16", "seed=1", "backbone=vit_b16,vit_b32"]
    assert counted(study, *few) == {"zero-shot": 4} | {series.label: 8 for series in study.series[1:]}
    runs = planned_runs(study, [*few, "method=coop", "n_ctx=4"])
    assert {option(run.key, "n_ctx") for run in runs} == {4} and len(runs) == 4 * 8
    chosen = planned_runs(study, ["method=zero_shot,linear_probe"])
    assert {run.key.method for run in chosen} == {"zero_shot", "linear_probe"}
    for overrides, named in (
        (["method=cocoop"], "coop"),
        (["shotz=1"], "shots"),
        (["dataset=dtdd"], "dtd"),
        (["ratio=0.5"], "ratio"),
        (["method=zero_shot", "lr=1"], "lr"),
        (["sample_file=x.json"], "sample_file"),
    ):
        with pytest.raises(CoopError, match=named):
            planned_runs(study, overrides)


def test_a_run_s_overrides_ask_for_that_run() -> None:
    """Each alone, as words of the command line."""
    from coop.runs.grid import single

    for name in ("prompt_or_not", "initialisation", "demo"):
        for run in planned_runs(load_study(name), ["dataset=dtd"]):
            assert RunKey.of(run_config(single(run.overrides))) == run.key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("name: small", "name: other"), "other"),
        (("series:", "serees:"), "serees"),
        (("title: A small one", "titel: x"), "titel"),
        (("label: 'b of {shots}'", "label: a"), "'a'"),
        (("shots: [1, 2]}", "shots: []}"), "shots"),
        (("shots: [1, 2]}", "shots: [1, 2"), "small.yaml"),
        (("shots: [1, 2]}", "shotz: [1, 2]}"), "shots"),
        (("method: coop", "method: cop"), "'coop'"),
        (("{kind: curves", "{sort: curves"), "kind"),
        (("kind: curves", "kind: curvs"), "'curves'"),
        (("x: shots", "y: shots"), "'y'"),
        (("x: shots", "x: shoots"), "'shots'"),
        (("x: shots", "average: perhaps"), "average"),
        (("x: shots", "value: acuracy"), "'accuracy'"),
        (("dataset: dtd}}", "datasets: dtd}}"), "'dataset'"),
        (("label: a, baseline", "label: c, baseline"), "'c'"),
        (("baseline: b of 1", "baseline: of 1"), "'of 1'"),
        (("over: target", "over: targets"), "'target'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    text = """
name: small
title: A small one
reproduces: nothing
about: nothing
grid: {dataset: dtd, backbone: rn50}
series:
  - {label: a, grid: {method: zero_shot, template: [null, "{}"]}}
  - {label: 'b of {shots}', grid: {method: coop, shots: [1, 2]}}
show:
  - {kind: curves, x: shots, where: {shots: [1, 2], dataset: dtd}}
  - {kind: gains, label: a, baseline: b of 1, over: target}
"""
    path = tmp_path / "small.yaml"
    path.write_text(text)
    assert counted(read_study(path)) == {"a": 2, "b of 1": 1, "b of 2": 1}
    path.write_text(text.replace(*change))
    with pytest.raises(CoopError, match=named) as caught:
        read_study(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_studies_list_the_choices() -> None:
    with pytest.raises(CoopError, match="did you mean 'few_shot'.*demo"):
        load_study("fewshot")
    assert {"few_shot", "demo"} <= set(study_names())


def timed(seconds: float | None, **values: Any) -> tuple[RunKey, float | None]:
    return RunKey.of(run_config({"dataset": "dtd", "shots": 1, "seed": 1, **values})), seconds


def test_time_left_is_that_of_the_same_kind() -> None:
    done = [timed(10.0), timed(20.0, seed=2), timed(7.0, method="clip_adapter", shots=4)]
    assert time_left(done) == TimeLeft(0.0, 0, 0)
    assert time_left([*done, timed(None, seed=3)]) == TimeLeft(15.0, 1, 0)  # the mean over seeds
    scaled = time_left([*done, timed(None, method="clip_adapter", shots=16)])
    assert scaled.seconds == pytest.approx(7.0 * 16 * 200 / (4 * 100)) and scaled.estimated == 1
    strange = [timed(None, dataset="eurosat"), timed(None, method="kgcoop"), timed(None, shots="all")]
    assert time_left([*done, *strange]) == TimeLeft(0.0, 0, 3)
    assert [_duration(s) for s in (45.0, 120.0, 3600.0, 7200.0)] == [
        "45 seconds",
        "2.0 minutes",
        "1.0 hours",
        "2.0 hours",
    ]


@pytest.mark.slow
def test_the_command_lists_and_describes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in study_names()) and "\x1b" not in listed
    monkeypatch.setenv("COLUMNS", "60")
    for command in (["study"], ["study", "clip_adapter"], ["study", "few_shot", "--status"]):
        assert main(command) == 0
        narrow = capsys.readouterr().out
        assert "…" not in narrow, "a word is cut"
        table = narrow[narrow.index("─") :].splitlines()
        assert max(map(len, itertools.takewhile(str.strip, table))) <= 60
    monkeypatch.delenv("COLUMNS")
    assert main(["study", "demo"]) == 0
    out = capsys.readouterr().out
    assert "coop run -m +experiment=demo" in out and "Figure 3" in out and "11 runs" in out
    for wrong, named in ((["study", "dem"], "demo"), (["study", "--status"], "NAME"), (["study", "demo", "a=1"], "a")):
        assert main(wrong) == 2
        assert named in capsys.readouterr().err


def test_studies_and_their_state_need_no_torch(tmp_path: Path) -> None:
    """Importing it takes longer than all of these commands."""
    code = f"""
import sys
from coop.cli import main
place = ["results={tmp_path}", "data_root={tmp_path}"]
assert main(["study"]) == main(["study", "few_shot"]) == 0
assert "hydra" not in sys.modules, "no words were parsed"
assert main(["study", "few_shot", "--status", *place]) == 0
assert main(["run", "-m", "--cfg", "shots=1,2"]) == main(["run", "--help-keys"]) == 0
assert main(["run", "shot=1"]) == 2
assert not {{"torch", "open_clip", "matplotlib", "sklearn", "pandas"}} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def result_of(dataset: str, seconds: float, finished: str) -> dict[str, Any]:
    metrics: dict[str, Any] = dict.fromkeys(("accuracy", "macro_f1", "ece", "mean_confidence"), 0.5)
    return {
        "targets": {dataset: {**metrics, "n": 2, "per_class_accuracy": {}}},
        "seconds": {"fit": seconds},
        "fit": {},
        "versions": {},
        "own_split": False,
        "notes": [],
        "split_source": "x",
        "weights": "x",
        "finished": finished,
    }


def test_status_counts_what_lies_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs leave: two are done, one failed, and a damaged one is listed."""
    runs = planned_runs(load_study("demo"), ["dataset=dtd,fashion_mnist", "backbone=lit_lite"])
    kept = [replace(run.key, data="x") for run in runs if run.key.dataset == "dtd" and run.key.shots == 4]
    write_failure(tmp_path / "0", kept[0], MemoryError("no memory"), None)
    for number, key in enumerate(kept[1:], 1):
        write_result(tmp_path / str(number), key, result_of("dtd", 60.0, f"2026-01-0{number}"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    place = [f"results={tmp_path}", f"data_root={tmp_path / 'none'}"]
    assert main(["study", "demo", "dataset=dtd,fashion_mnist", "backbone=lit_lite", *place, "--status"]) == 0
    out = capsys.readouterr().out
    assert "2 done, 19 missing, 1 failed, of 22 runs" in out
    row = next(line for line in out.splitlines() if "CoOp" in line and "dtd" in line)
    assert row.split()[-4:] == ["dtd", "2", "6", "1"]
    assert "failed: no memory" in out and str(tmp_path / "0") in out and f"damaged: {tmp_path / 'bad'}" in out
    assert "no data for 9 runs on dtd" in out and "coop data prepare dtd" in out
    minutes = (60 + 3 * 60 * 1 * 50 / (4 * 100) + 3 * 60 * 16 * 200 / (4 * 100)) / 60
    assert f"about {minutes:.1f} minutes for 7 runs" in out and "no estimate for 13 runs" in out
    assert math.isclose(minutes, 25.375)


def test_the_newest_result_counts(tmp_path: Path) -> None:
    (run,) = planned_runs(load_study("demo"), ["shots=1", "seed=1", "method=coop"])
    for name, finished in (("new", "2026-02-01"), ("old", "2026-01-01")):
        write_result(tmp_path / name, replace(run.key, data=name), result_of("fashion_mnist", 1.0, finished))
    write_failure(tmp_path / "z", replace(run.key, data="z"), ValueError("x"), None)
    (found,) = match_runs([run], stored_runs(tmp_path))
    assert found is not None and found.folder == tmp_path / "new"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides for quick runs on a tiny CLIP; of the datasets only the bundled sample is there."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "tiny.pt")
    model = [f"backbone.architecture={folder / 'tiny.json'}", f"backbone.pretrained={folder / 'tiny.pt'}"]
    place = [f"cache={folder / 'cache'}", f"data_root={folder / 'none'}"]
    return ["backbone=custom", "backbone.name=tiny", *model, *place, "epochs=1", "workers=0", "augment.views=0"]


@pytest.fixture(scope="module")
def results(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do a part of the demo's runs; a context of 22 vectors leaves no room for a name and fails."""
    folder = tmp_path_factory.mktemp("study")
    grid = ["shots=1,4", "seed=1", "n_ctx=2,22", f"results={folder}"]
    assert main(["run", "-m", "+experiment=demo", *tiny, *grid]) == 1
    return folder


def test_state_is_what_lies_on_disk(results: Path, tiny: list[str]) -> None:
    stored = stored_runs(results)
    assert Counter(run.state for run in stored) == {"done": 4, "failed": 2}
    planned = planned_runs(load_study("demo"), [*tiny, "n_ctx=2,22"])
    found = match_runs(planned, stored)
    assert Counter(run.state if run else "missing" for run in found) == {"missing": 20 - 6, "done": 4, "failed": 2}
    for plan, run in zip(planned, found, strict=True):
        if run and run.state == "failed":
            assert "n_ctx=22" in str(run.error)
        elif run:
            content = json.loads((run.folder / "result.json").read_text())
            assert run.accuracies["fashion_mnist"] == content["targets"]["fashion_mnist"]["accuracy"]
            assert content["targets"]["fashion_mnist"]["n"] == 1000 and content["key"]["seed"] == plan.key.seed


def test_runs_by_hand_are_the_study_s_runs(results: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one = ["dataset=fashion_mnist", "method=coop", "shots=4", "seed=1", "n_ctx=2"]
    assert main(["run", *tiny, *one, f"results={results}"]) == 0
    assert "done already" in capsys.readouterr().out


def test_a_run_is_found_where_an_older_version_named_its_folder_otherwise(
    results: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its result has `identity` for `key`, and no `validation`."""
    run = next(run for run in stored_runs(results) if run.state == "done" and run.key and run.key.method == "coop")
    assert run.key is not None
    content = json.loads((run.folder / "result.json").read_text())
    identity = content.pop("key")
    content["identity"] = {k: v for k, v in identity.items() if k not in ("validation", "sample", "augment.scale")}
    old = run.key.folder(tmp_path).with_name("shots1-seed1-0123abcd")
    old.mkdir(parents=True)
    (old / "result.json").write_text(json.dumps(content))
    words = ["dataset=fashion_mnist", "method=coop", f"shots={run.key.shots}", "seed=1", "n_ctx=2"]
    assert main(["run", *tiny, *words, f"results={tmp_path}"]) == 0
    assert f"done already: {old}" in capsys.readouterr().out


def test_a_dataset_that_is_not_there_stops_no_other(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a study and in a plain sweep."""
    for words in (["+experiment=demo"], ['template="my {}",null']):
        results = tmp_path / str(len(words[0]))
        asked = ["dataset=dtd,fashion_mnist,eurosat", "method=zero_shot", *own_words(tiny), f"results={results}"]
        assert main(["run", "-m", *words, *asked]) == 1
        left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert [line.split(":")[0] for line in left_out] == ["dtd", "eurosat"]
        assert all(f"coop data prepare {name}" in line for name, line in zip(("dtd", "eurosat"), left_out, strict=True))
        assert len(list(results.rglob("result.json"))) == 2
    other = ["dataset=fashion_mnist", "method=coop", "sample_file=nowhere.json", *own_words(tiny)]
    assert main(["run", "-m", *other, f"results={tmp_path / 'other'}"]) == 1
    out = capsys.readouterr().out
    assert "nowhere.json" in out and "coop data prepare" not in out  # which would not help


def own_words(words: list[str]) -> list[str]:
    """Return the words that zero-shot uses."""
    return [word for word in words if not word.startswith(("epochs", "augment"))]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["+experiment=demo"], "coop run -m +experiment=demo"),
        (["-m", "+experiment=dmo"], "did you mean 'demo'"),
        (["-m", "+experiment=demo,few_shot"], "one study"),
        (["-m", "+experiment="], "one study"),
        (["-m", "+experiment=demo", "sample_file=x.json"], "sample_file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    err = capsys.readouterr().err
    assert named in err and len(err.strip().splitlines()) == 1


def test_the_configurations_of_a_study_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "--cfg", "+experiment=demo", "method=coop", "shots=4"]) == 0
    assert [part.count("shots: 4") for part in capsys.readouterr().out.split("---\n")] == [1, 1, 1]
