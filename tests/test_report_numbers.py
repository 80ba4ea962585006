"""A report's numbers against pandas: means, deviations, averages, gains, and what stands beside them."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pandas as pd
import pytest

from coop.config import group_choices
from coop.options import OPTIONS
from coop.report.figures import make_bars, make_curves
from coop.report.frame import Value, planned, with_difference
from coop.report.published import COLUMNS, Publications
from coop.report.summary import facts, missing_runs, sentences
from coop.report.tables import Grid, make_grid, shown, to_latex, to_markdown, to_text
from coop.runs.key import RunKey
from coop.runs.store import StoredRun
from coop.runs.study import CurvesPart, GainsPart

DATASETS = ("dtd", "eurosat", "food101")
SHOTS, SEEDS = (1, 4), (1, 2, 3)
METHODS = {"zero-shot": "zero_shot", "CoOp": "coop", "probe": "linear_probe"}
RESULTS = Path("results")
Gone = Sequence[tuple[str, str, int, int]]  # dataset, label, shots, seed


def key_of(dataset: str, method: str, shots: int, seed: int, **more: Any) -> RunKey:
    about = {"dataset": dataset, "dataset_template": "a {}.", "data": "x", "backbone": "rn50", "architecture": "RN50"}
    about |= {"pretrained": "openai", "precision": "fp32", "protocol": "all_classes"}
    return RunKey.from_dict(about | {"method": method, "shots": shots, "seed": seed} | more)


def run_of(key: RunKey, targets: dict[str, dict[str, float]], **more: Any) -> StoredRun:
    result = {"targets": targets, "fit": {}, "seconds": {"fit": 1.0}, "notes": [], "own_split": False} | more
    folder = RESULTS / key.dataset / key.method / f"{key.digest[:8]}"
    return StoredRun(folder, "done", key, {"split_source": "official", "finished": "2026", **result})


def study_of(
    gone: Gone = (), failed: Gone = (), **more: Any
) -> tuple[list[Any], list[StoredRun], dict[tuple[str, str, int, int], dict[str, float]]]:
    """Return a plan of zero-shot, CoOp and a probe, its finished runs with drawn numbers, and these numbers."""
    draw = random.Random(7)
    plan, runs, numbers = [], [], {}
    for label, method in METHODS.items():
        for dataset in DATASETS:
            for shots, seed in [(0, 0)] if method == "zero_shot" else [(k, s) for k in SHOTS for s in SEEDS]:
                place, key = (dataset, label, shots, seed), key_of(dataset, method, shots, seed, **more)
                plan.append((label, key.planned(), (dataset,)))
                measured = {"accuracy": draw.random(), "macro_f1": draw.random(), "ece": draw.random() / 2}
                if place in failed:
                    runs.append(StoredRun(RESULTS / "failed", "failed", key, error="no memory"))
                elif place not in gone:
                    numbers[place] = measured
                    runs.append(run_of(key, {dataset: measured | {"mean_confidence": 0.5, "n": 10}}))
    return plan, runs, numbers


def frame_of(gone: Gone = (), value: str = "accuracy") -> pd.DataFrame:
    plan, runs, _ = study_of(gone)
    return with_difference(planned(plan, runs, RESULTS), value)


def means_of(gone: Gone = (), metric: str = "accuracy") -> "pd.Series[float]":
    _, _, numbers = study_of(gone)
    rows = [(*place[:3], 100 * of[metric]) for place, of in numbers.items()]
    frame = pd.DataFrame(rows, columns=["dataset", "label", "shots", "value"])
    return frame.groupby(["dataset", "label", "shots"])["value"].mean()


def publications(rows: Sequence[tuple[Any, ...]] = (), unverified: bool = True) -> Publications:
    """Return published accuracies, rows of (label, dataset, backbone, shots, value, verified)."""
    table = [
        (label, dataset, backbone, shots, dataset, "accuracy", value, "Paper", "Table 1", "where", verified, "")
        for label, dataset, backbone, shots, value, verified in rows
    ]
    return Publications(pd.DataFrame(table, columns=list(COLUMNS)), unverified)


def grid_of(frame: pd.DataFrame, numbers: Publications | None = None, study: Sequence[str] = DATASETS) -> Grid:
    return make_grid(frame, ["dataset", "label"], ["shots"], published=numbers, study=study)


def cell(grid: Grid, row: tuple[str, ...], shots: int) -> Value:
    value = dict(grid.rows)[row][grid.columns.index("1 shot" if shots == 1 else f"{shots} shots")]
    assert value is not None
    return value


@pytest.mark.parametrize("metric", ["accuracy", "ece"])
def test_a_table_holds_what_pandas_finds(metric: str) -> None:
    grid = make_grid(frame_of(value=metric), ["dataset", "label"], ["shots"], metric, study=DATASETS)
    assert grid.columns == ("0 shots", "1 shot", "4 shots") and len(grid.rows) == 3 * 4
    means, (_, _, numbers) = means_of(metric=metric), study_of()
    for (dataset, label, shots), mean in means.items():  # type: ignore[misc]
        value = cell(grid, (dataset, label), shots)
        assert value.mean == pytest.approx(mean) and value.state == "done"
        if label == "zero-shot":
            assert (value.n, value.std, value.difference) == (1, None, None)
        else:
            found = pd.Series(
                [100 * of[metric] for place, of in numbers.items() if place[:3] == (dataset, label, shots)]
            )
            assert value.std == pytest.approx(found.std(ddof=0))
            assert value.difference == pytest.approx(mean - means[dataset, "zero-shot", 0])
            assert (value.n, value.planned, value.seeds) == (3, 3, SEEDS)
    for label, shots in (("CoOp", 1), ("probe", 4)):
        value = cell(grid, ("average", label), shots)
        assert value.mean == pytest.approx(means[:, label, shots].mean()) and (value.state, value.n) == ("done", 9)
        assert value.difference == pytest.approx((means[:, label, shots] - means[:, "zero-shot", 0]).mean())
    assert cell(grid, ("average", "zero-shot"), 0).difference is None


def test_averages_are_over_the_same_datasets() -> None:
    """Whatever is missing: an average over easier datasets would look better than it is."""
    gone = [("food101", "CoOp", shots, seed) for shots in SHOTS for seed in SEEDS] + [("dtd", "CoOp", 1, 2)]
    grid, means = grid_of(frame_of(gone)), means_of(gone)
    two = ["dtd", "eurosat"]
    for label, shots in (("CoOp", 1), ("probe", 4), ("zero-shot", 0)):
        value = cell(grid, ("average", label), shots)
        assert value.mean == pytest.approx(means[:, label, shots][two].mean())
        assert value.state == "partial" and "over 2 of 3 datasets: DTD, EuroSAT" in value.note
    partial, missing = cell(grid, ("dtd", "CoOp"), 1), cell(grid, ("food101", "CoOp"), 1)
    assert (partial.state, partial.n, partial.planned) == ("partial", 2, 3)
    assert (missing.state, missing.mean, missing.planned) == ("missing", None, 3)
    assert "averages are over 2 of 3 datasets: DTD, EuroSAT" in grid.notes


def test_average_harmonic_means_are_of_averages() -> None:
    """CoCoOp's Table 3 (a): 82.69 and 63.22 give 71.66, which is not the mean of the datasets' harmonic means."""
    base_new = {"dtd": (0.5, 0.9), "eurosat": (0.8, 0.2), "food101": (0.7, 0.6)}
    plan, runs = [], []
    for dataset, (base, new) in base_new.items():
        key = key_of(dataset, "zero_shot", 0, 0, protocol="base_to_new")
        plan.append(("zero-shot", key.planned(), ("base", "new", "harmonic_mean")))
        rest = {"macro_f1": 0.1, "ece": 0.1, "mean_confidence": 0.5, "n": 10}
        targets = {"base": {"accuracy": base, **rest}, "new": {"accuracy": new, **rest}}
        runs.append(run_of(key, targets, harmonic_mean=harmonic_mean([base, new])))
    frame = with_difference(planned(plan, runs, RESULTS))
    grid = make_grid(frame, ["dataset", "label"], ["target"], study=DATASETS)
    row = dict(grid.rows)["average", "zero-shot"]
    expected = {"base": 200 / 3, "new": 170 / 3, "harmonic_mean": harmonic_mean([200 / 3, 170 / 3])}
    assert {name: value and value.mean for name, value in zip(grid.columns, row, strict=True)} == pytest.approx(
        expected
    )
    own = dict(zip(grid.columns, dict(grid.rows)["dtd", "zero-shot"], strict=True))["harmonic_mean"]
    assert own is not None and own.mean == pytest.approx(100 * harmonic_mean([0.5, 0.9]))


def test_what_is_planned_on_some_datasets_has_no_average() -> None:
    """An ablation on one dataset neither has an average nor changes those of the others."""
    frame = frame_of()
    grid = grid_of(frame[(frame["label"] != "probe") | (frame["dataset"] == "dtd")])
    rows = [row for row, _ in grid.rows]
    assert ("average", "CoOp") in rows and ("average", "probe") not in rows
    assert (cell(grid, ("average", "CoOp"), 1).state, cell(grid, ("average", "CoOp"), 1).note) == (
        "done",
        "over 3 datasets",
    )


def test_of_two_runs_from_other_data_the_newer_counts() -> None:
    plan, runs, _ = study_of()
    old = runs[0]
    assert old.key
    again = run_of(
        key_of("dtd", "zero_shot", 0, 0, data="y"), {"dtd": {**old.targets["dtd"], "accuracy": 1.0}}, finished="2027"
    )
    for order in ([*runs, again], [again, *runs]):
        value = cell(grid_of(with_difference(planned(plan, order, RESULTS))), ("dtd", "zero-shot"), 0)
        assert (value.mean, value.n, value.planned) == (100.0, 1, 1) and "made from other data as well" in value.note


def test_a_baseline_has_the_same_shots_or_is_none() -> None:
    means = means_of()
    both = make_bars(frame_of(), GainsPart(label="CoOp", baseline="probe"), publications(), "b")
    found = {name: value.mean for name, value in both.bars}
    assert len(found) == 6
    assert found["dtd, 1 shot"] == pytest.approx(means["dtd", "CoOp", 1] - means["dtd", "probe", 1])
    assert found["dtd, 4 shots"] == pytest.approx(means["dtd", "CoOp", 4] - means["dtd", "probe", 4])
    none = make_bars(frame_of(), GainsPart(label="zero-shot", baseline="probe"), publications(), "b")
    assert {value.state for _, value in none.bars} == {"missing"}


def test_published_numbers_stand_beside_the_same_thing_only() -> None:
    rows = [
        ("CoOp", "dtd", "rn50", 1, 40.0, False), ("CoOp", "dtd", "rn50", 1, 44.0, True),
        ("CoOp", "dtd", "vit_b16", 1, 60.0, True), ("CoOp", "average", "rn50", 1, 50.0, True),
        ("ProDA", "dtd", "rn50", 4, 61.0, True),
    ]  # fmt: skip
    numbers = publications(rows)
    grid = grid_of(frame_of(), numbers)
    checked_first = [44.0, 40.0]
    assert [one.value for one in cell(grid, ("dtd", "CoOp"), 1).published] == checked_first
    assert cell(grid, ("dtd", "CoOp"), 4).published == ()
    assert [one.value for one in cell(grid, ("average", "CoOp"), 1).published] == [50.0]
    theirs = cell(grid, ("dtd", "ProDA"), 4)
    assert theirs.mean is None and theirs.planned == 0 and [one.value for one in theirs.published] == [61.0]
    assert list(numbers.rest(DATASETS)["accuracy"]) == [("CoOp", "dtd", "vit_b16", "1", "dtd")]

    checked = grid_of(frame_of(), publications(rows, unverified=False))
    assert [one.value for one in cell(checked, ("dtd", "CoOp"), 1).published] == [44.0]
    eleven = grid_of(frame_of(), publications(rows), [*DATASETS, "imagenet"])  # the paper's average has one more
    assert cell(eleven, ("average", "CoOp"), 1).published == ()
    own = frame_of().assign(own_split=True)
    assert cell(grid_of(own, publications(rows)), ("dtd", "CoOp"), 1).published == ()


def test_cells_never_pool_settings() -> None:
    frame = frame_of()
    more = frame[frame["label"] == "CoOp"].assign(backbone="vit_b16")
    grid = make_grid(pd.concat([frame, more], ignore_index=True), ["label"], ["shots"])
    assert grid.keys == ("label", "dataset", "backbone")


def test_curves_and_bars_hold_the_same_means() -> None:
    gone = [("eurosat", "CoOp", 4, seed) for seed in SEEDS]
    frame, means = frame_of(gone), means_of(gone)
    numbers = publications([("CoOp", "dtd", "rn50", 4, 66.0, True), ("zero-shot", "dtd", "rn50", 0, 42.0, True)])
    curves = make_curves(frame, CurvesPart(), numbers, DATASETS, "curves")
    assert [panel.title for panel in curves.panels] == ["average over 2 of 3 datasets", *DATASETS] and curves.log2
    lines = {line.label: line for line in curves.panels[1].lines}
    assert list(lines) == ["zero-shot", "CoOp", "probe"] and lines["zero-shot"].star and not lines["CoOp"].star
    assert {x: value.mean for x, value in lines["CoOp"].points} == pytest.approx(means["dtd", "CoOp"].to_dict())
    assert [(x, one.value) for x, one in lines["CoOp"].published] == [(4, 66.0)]

    bars = make_bars(frame, GainsPart(label="CoOp", baseline="zero-shot", where={"shots": 4}), numbers, "gains")
    gains = (means[:, "CoOp", 4] - means[:, "zero-shot", 0]).dropna().sort_values(ascending=False)
    assert [name for name, _ in bars.bars] == [*gains.index, "eurosat"]
    assert [value.mean for _, value in bars.bars[:2]] == pytest.approx(list(gains))
    _, _, found = study_of()
    by_seed = pd.Series([100 * of["accuracy"] for place, of in found.items() if place[:3] == ("dtd", "CoOp", 4)])
    assert dict(bars.bars)["dtd"].std == pytest.approx(by_seed.std(ddof=0))
    assert bars.bars[-1][1].state == "missing" and [(name, one.value) for name, one in bars.published] == [
        ("dtd", 24.0)
    ]


def test_settings_chosen_on_test_images_say_so_everywhere() -> None:
    """The warning stands with the number: in the cell, the note, the curve, the sentence; never as the best series."""
    plan, runs, _ = study_of(validation="test")
    frame = with_difference(planned(plan, runs, RESULTS))
    assert frame.loc[frame["label"] == "probe", "validation"].unique() == ["test"]
    grid = grid_of(frame)
    assert cell(grid, ("dtd", "probe"), 4).on_test and not cell(grid, ("dtd", "CoOp"), 4).on_test
    assert cell(grid, ("average", "probe"), 4).on_test and "validation=test" in cell(grid, ("average", "probe"), 4).note
    assert any("validation=test" in note and note.startswith("†") for note in grid.notes)
    line = next(line for line in to_text(grid).splitlines() if line.startswith("dtd") and "probe" in line)
    assert line.count("†") == 2 and to_latex(grid).count("dagger") >= 8
    assert "validation=test" in make_curves(frame, CurvesPart(), publications(), DATASETS, "c").notes[0]
    found = sentences(frame, "CoOp")
    assert any("probe" in one and "validation=test" in one for one in found)
    assert not any("probe is the best" in one for one in found)


def test_zero_shot_has_its_mean_per_class_accuracy_beside_its_accuracy() -> None:
    """Where both differ, in a note of every form of the table; recorded, or made from the classes' accuracies."""
    classes = {"accuracy": 0.75, "macro_f1": 0.5, "ece": 0.1, "mean_confidence": 0.5, "n": 4}
    unbalanced = classes | {"per_class_accuracy": {"cat": 1.0, "dog": 0.0, "fish": None}}
    plan, runs, _ = study_of()
    runs = [
        run_of(run.key, {"dtd": unbalanced | ({} if run.key.shots else {"mean_per_class_accuracy": 0.55})})
        if run.key and run.key.dataset == "dtd"
        else run
        for run in runs
    ]
    frame = with_difference(planned(plan, runs, RESULTS), "mean_per_class_accuracy")
    of_dtd = frame[(frame["dataset"] == "dtd") & (frame["label"] == "CoOp")]
    assert of_dtd["mean_per_class_accuracy"].unique() == [0.5] and of_dtd["difference"].round(6).unique() == [-0.05]
    (note,) = [note for note in grid_of(frame).notes if "mean per-class accuracy" in note]
    assert note.endswith("Caltech101: DTD 55.0")
    assert note in to_text(grid_of(frame)) and note in to_markdown(grid_of(frame))


def test_random_descriptors_are_averaged_like_seeds() -> None:
    plan, runs = [], []
    for number, accuracy in ((1, 0.5), (2, 0.75)):
        key = key_of("dtd", "waffle", 0, 0, descriptor_seed=number)
        plan.append(("WaffleCLIP", key.planned(), ("dtd",)))
        measured = {"accuracy": accuracy, "macro_f1": 0.5, "ece": 0.1, "mean_confidence": 0.5, "n": 4}
        runs.append(run_of(key, {"dtd": measured}))
    value = cell(grid_of(with_difference(planned(plan, runs, RESULTS)), study=["dtd"]), ("dtd", "WaffleCLIP"), 0)
    assert (value.mean, value.std, value.n) == (62.5, 12.5, 2)


def test_missing_runs_come_with_their_command() -> None:
    gone = [("food101", label, shots, seed) for label in ("CoOp", "probe") for shots in SHOTS for seed in SEEDS]
    gone += [("food101", "zero-shot", 0, 0), ("dtd", "CoOp", 4, 3)]
    plan, runs, _ = study_of(gone, failed=[("eurosat", "CoOp", 4, 3)])
    found = missing_runs(planned(plan, runs, RESULTS), "few_shot", ["backbone=rn50", "lr=0.1"])
    all_of, one, failed = sorted(found, key=lambda m: -m.count)
    assert (all_of.what, all_of.count, one.count) == ("Food101: everything", 13, 1)
    assert (failed.failed, failed.error) == (1, "no memory")
    assert all_of.command == "coop run -m +experiment=few_shot dataset=food101 backbone=rn50 lr=0.1"
    narrow = "method=coop shots=4 seed=3"
    assert one.command == f"coop run -m +experiment=few_shot dataset=dtd backbone=rn50 {narrow} lr=0.1"


def test_the_summary_says_what_the_numbers_say() -> None:
    gone = [("food101", "CoOp", 4, 3)]
    found, means = sentences(frame_of(gone), "CoOp"), means_of(gone).reorder_levels([1, 2, 0]).sort_index()
    assert found[0] == "38 of 39 runs are done; there are results on 3 of 3 datasets."
    best = means[[shots in (0, 4) for _, shots, _ in means.index]].groupby(["label", "shots"]).mean()
    assert f"{best.idxmax()[0]} is the best series: {best.max():.1f} %" in found[1]
    gains = (means["CoOp"].unstack() - means["zero-shot", 0]).stack()
    lost = gains[gains < 0]
    assert f"below zero-shot in {len(lost)} of {len(gains)} measured places" in found[2]
    assert f"({lost.min():+.1f})" in found[2]
    errors = means_of(gone, "ece").reorder_levels([1, 2, 0]).sort_index()
    assert f"from {errors['zero-shot', 0].mean():.1f} % (zero-shot) to {errors['CoOp', 4].mean():.1f} %" in found[4]


def test_the_head_says_what_was_run() -> None:
    gone = [("food101", label, shots, seed) for label in ("CoOp", "probe") for shots in SHOTS for seed in SEEDS]
    plan, runs, _ = study_of([*gone, ("food101", "zero-shot", 0, 0)])
    found = dict(facts(planned(plan, runs, RESULTS), "coop report few_shot"))
    assert found["datasets"] == "2 of 3: DTD, EuroSAT" and found["seeds"] == "1, 2, 3" and found["shots"] == "1, 4"
    assert found["backbone"] == "RN50 (openai)" and found["command"] == "coop report few_shot"
    assert "0.002" in found["learning rate"] and "min4" in found["validation"] and "probe" in found["validation"]


def test_the_head_has_no_digest_and_names_the_test_view() -> None:
    """Weights from a file are known by a digest; no random views are the test view."""
    about = {"backbone": "own", "architecture": "ViT-B-32", "pretrained": "0123456789abcdef", "augment.views": 0}
    plan, runs, _ = study_of(**about)
    found = dict(facts(planned(plan, runs, RESULTS), ""))
    assert found["backbone"] == "own (ViT-B-32)" and found["image views"] == "the test view"


def test_everything_has_the_name_that_papers_give_it() -> None:
    for name in (*OPTIONS, *group_choices("backbone"), *group_choices("dataset")):
        assert "_" not in shown("dataset", name) or name == "lit_lite", name
    grid = grid_of(frame_of())
    assert grid.title == "Accuracy by dataset and series"
    assert to_text(grid, 200).split()[:2] == ["dataset", "series"]


def test_nothing_at_all_is_a_report_too() -> None:
    plan, _, _ = study_of()
    frame = with_difference(planned(plan, [], RESULTS))
    assert {value.state for _, row in grid_of(frame).rows for value in row if value} == {"missing"}
    bars = make_bars(frame, GainsPart(label="CoOp", baseline="zero-shot"), publications(), "b")
    assert {value.mean for _, value in bars.bars} == {None}
    assert sentences(frame, "CoOp") == ["0 of 39 runs are done."]
