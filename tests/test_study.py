"""Studies: their runs against counts by hand from the papers, and their state against what lies on disk."""

import json
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf

from coop.cli import main
from coop.errors import CoopError
from coop.runs.grid import composer, study_cells
from coop.runs.study import Study, load_study, plan, read_study, study_names

ELEVEN = {
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
}  # fmt: skip
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}


def counted(study: Study, *overrides: str) -> Counter[str]:
    return Counter(cell.label for cell in study_cells(study, overrides))


def test_few_shot_is_figure_3() -> None:
    study = load_study("few_shot")
    cells = study_cells(study)
    assert {cell.about["dataset"] for cell in cells} == ELEVEN
    per_series = 11 * 5 * 3  # datasets, shots, seeds
    labels = Counter(cell.label for cell in cells)
    assert labels == {"zero-shot": 11} | {series.label: per_series for series in study.series[1:]}
    assert len(study.series) == 6 and all(cell.about["backbone"] == "rn50" for cell in cells)
    epochs = {(c.about["dataset"] == "imagenet", c.about["shots"]): c.about.get("epochs") for c in cells}
    assert epochs[False, 1] == 50 and epochs[False, 2] == epochs[False, 4] == 100
    assert epochs[False, 8] == epochs[False, 16] == 200 and epochs[True, 16] == 50


def test_overrides_take_the_place_of_grids() -> None:
    study = load_study("few_shot")
    few = ["dataset=dtd,eurosat", "shots=1,16", "seed=1", "backbone=vit_b16,vit_b32"]
    assert counted(study, *few) == {"zero-shot": 4} | {series.label: 8 for series in study.series[1:]}
    cells = study_cells(study, [*few, "method=coop", "n_ctx=4"])
    assert {cell.about["n_ctx"] for cell in cells} == {4} and len(cells) == 4 * 8
    assert {cell.about["method"] for cell in study_cells(study, ["method=zero_shot,linear_probe"])} == {
        "zero_shot",
        "linear_probe",
    }
    for overrides, told in ((["method=cocoop"], "coop"), (["shotz=1"], "shotz"), (["dataset=dtdd"], "dtdd")):
        with pytest.raises(CoopError, match=told):
            study_cells(study, overrides)


@pytest.mark.parametrize(
    "job",
    [
        ["dataset=dtd", "backbone=rn50", "method=clip_adapter", "shots=3", "dataset.root=/x"],
        ["backbone=custom", "backbone.architecture=A", "dataset=imagenet", "protocol=cross_dataset"],
        ["method=cocoop", "protocol=domain_generalisation", "protocol.targets=[dtd]", "augment.views=epochs"],
    ],
)
def test_quick_composition_is_hydra_s(job: list[str]) -> None:
    with composer() as quick:
        for _ in range(2):  # the second is a copy of what the first kept
            assert OmegaConf.to_yaml(quick(job)) == OmegaConf.to_yaml(compose("config", overrides=job))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("name: small", "name: other"), "other"),
        (("series:", "serees:"), "serees"),
        (("title: A small one", "titel: x"), "titel"),
        (("label: b", "label: a"), "'a'"),
        (("shots: [1, 2]", "shots: []"), "shots"),
        (("shots: [1, 2]", "shots: [1, 2"), "small.yaml"),
        (("{kind: curves}", "{sort: curves}"), "kind"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    text = """
name: small
title: A small one
reproduces: nothing
about: nothing
grid: {dataset: dtd, backbone: rn50}
series:
  - {label: a, grid: {method: zero_shot, template: [null, "{}"]}}
  - {label: b, grid: {method: coop, shots: [1, 2]}}
show: [{kind: curves}]
"""
    path = tmp_path / "small.yaml"
    path.write_text(text)
    assert counted(read_study(path)) == {"a": 2, "b": 2}
    path.write_text(text.replace(*change))
    with pytest.raises(CoopError, match=told) as caught:
        read_study(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_studies_list_the_choices() -> None:
    with pytest.raises(CoopError, match="did you mean 'few_shot'.*demo"):
        load_study("fewshot")
    assert {"few_shot", "demo"} <= set(study_names())


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
    there = sorted(path.parent for path in results.rglob("result.json"))
    failed = sorted(path.parent for path in results.rglob("failure.json"))
    assert len(there) == 4 and len(failed) == 2
    cells = study_cells(load_study("demo"), [*tiny, "n_ctx=2,22"])
    frame = plan(cells, results)
    assert frame["state"].value_counts().to_dict() == {"missing": 20 - 6, "done": 4, "failed": 2}
    assert sorted(results / run for run in frame.loc[frame["state"] == "done", "run"]) == there
    assert sorted(results / run for run in frame.loc[frame["state"] == "failed", "run"]) == failed
    for row in frame[frame["state"] == "done"].itertuples():
        result = json.loads((results / row.run / "result.json").read_text())
        assert row.accuracy == result["targets"]["fashion_mnist"]["accuracy"] and row.n == 1000
        assert row.seconds == pytest.approx(sum(result["seconds"].values()))
        assert (row.shots, row.seed) == (result["identity"]["shots"], result["identity"]["seed"])
    assert frame.loc[frame["state"] == "failed", "error"].str.contains("n_ctx=22").all()


def test_runs_by_hand_are_the_study_s_runs(results: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one = ["dataset=fashion_mnist", "method=coop", "shots=4", "seed=1", "n_ctx=2"]
    assert main(["run", *tiny, *one, f"results={results}"]) == 0
    assert "done already" in capsys.readouterr().out


def test_a_dataset_that_is_not_there_stops_no_other(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["dataset=dtd,fashion_mnist,eurosat", "method=zero_shot", *tiny, f"results={tmp_path}"]
    assert main(["run", "-m", "+experiment=demo", *asked]) == 1
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(":")[0] for line in left_out] == ["dtd", "eurosat"]
    assert all(f"coop data prepare {name}" in line for name, line in zip(("dtd", "eurosat"), left_out, strict=True))
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert main(["run", "-m", *asked, 'template="my {}"']) == 2 and "dtd" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("result.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["+experiment=demo"], "coop run -m +experiment=demo"),
        (["-m", "+experiment=dmo"], "did you mean 'demo'"),
        (["-m", "+experiment=demo,few_shot"], "one study"),
        (["-m", "+experiment=demo", "sample_file=x.json"], "sample_file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and len(err.strip().splitlines()) == 1


def test_the_configurations_of_a_study_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "--cfg", "+experiment=demo", "method=coop", "shots=4"]) == 0
    assert [part.count("shots: 4") for part in capsys.readouterr().out.split("---\n")] == [1, 1, 1]
