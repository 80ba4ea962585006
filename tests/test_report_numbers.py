"""A report's numbers against pandas: means, spreads, averages, gains, and what stands beside them."""

import random
from collections.abc import Sequence
from statistics import harmonic_mean
from typing import Any

import pandas as pd
import pytest

from coop.report.beside import Beside
from coop.report.cells import records_of
from coop.report.content import Grid, Value
from coop.report.grids import make_grid
from coop.report.missing import missing_runs
from coop.report.panels import make_bars, make_curves
from coop.report.published import COLUMNS
from coop.report.summary import summary

DATASETS = ("dtd", "eurosat", "food101")
SHOTS, SEEDS = (1, 4), (1, 2, 3)
TABLE = {"rows": ["dataset", "label"], "columns": ["shots"]}
CURVES = {"x": "shots", "panel": "dataset", "average": True}
BARS = {"label": "CoOp", "baseline": "zero-shot", "over": "dataset", "where": {"shots": 4}}


def plan_of(gone: Sequence[tuple[str, str, int, int]] = ()) -> pd.DataFrame:
    """Return a plan of zero-shot, CoOp and a probe; `gone` are the (dataset, label, shots, seed) without a result."""
    draw = random.Random(7)
    rows: list[dict[str, Any]] = []
    for label, method in (("zero-shot", "zero_shot"), ("CoOp", "coop"), ("probe", "linear_probe")):
        for dataset in DATASETS:
            for shots, seed in [(0, 0)] if method == "zero_shot" else [(k, s) for k in SHOTS for s in SEEDS]:
                place = (dataset, label, shots, seed)
                row = {"label": label, "dataset": dataset, "backbone": "rn50", "precision": "fp32", "method": method}
                row |= {"protocol": "all_classes", "shots": shots, "seed": seed, "template": None, "target": dataset}
                row |= {"C": None, "n_ctx": 16 if method == "coop" else None, "epochs": 50 * shots, "seconds": 1.0}
                row |= {"overrides": (f"dataset={dataset}", label, str(shots), str(seed)), "notes": (), "error": None}
                row |= {"state": "missing", "run": None, "own_split": None}
                row |= dict.fromkeys(("accuracy", "macro_f1", "ece", "mean_confidence", "n"))
                if place not in gone:
                    measured = {"accuracy": draw.random(), "macro_f1": draw.random(), "ece": draw.random() / 2}
                    row |= measured | {"mean_confidence": 0.5, "n": 10, "state": "done", "own_split": False}
                    row["run"] = "/".join(map(str, place))
                rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def numbers(rows: Sequence[tuple[Any, ...]] = ()) -> Beside:
    """Return published accuracies, rows of (label, dataset, backbone, shots, value, verified)."""
    table = [
        (label, dataset, backbone, shots, dataset, "accuracy", value, "Paper", "Table 1", "where", verified, "")
        for label, dataset, backbone, shots, value, verified in rows
    ]
    return Beside(pd.DataFrame(table, columns=list(COLUMNS)))


def cell(grid: Grid, row: tuple[str, ...], column: str) -> Value:
    value = dict(grid.rows)[row][grid.columns.index(column)]
    assert value is not None
    return value


@pytest.mark.parametrize("metric", ["accuracy", "ece"])
def test_a_table_holds_what_pandas_finds(metric: str) -> None:
    plan = plan_of()
    grid = make_grid(records_of(plan, metric), TABLE | {"value": metric}, numbers(), DATASETS, "table")
    assert grid.columns == ("0 shots", "1 shot", "4 shots") and len(grid.rows) == 3 * 4
    frame = plan.astype({metric: float})
    means = 100 * frame.groupby(["dataset", "label", "shots"])[metric].mean()
    stds = 100 * frame.groupby(["dataset", "label", "shots"])[metric].std(ddof=0)
    for (dataset, label, shots), mean in means.items():  # type: ignore[misc]
        value = cell(grid, (dataset, label), "1 shot" if shots == 1 else f"{shots} shots")
        assert value.mean == pytest.approx(mean) and value.state == "done"
        if label != "zero-shot":
            assert value.std == pytest.approx(stds[dataset, label, shots])
            assert value.difference == pytest.approx(mean - means[dataset, "zero-shot", 0])
            assert (value.n, value.planned, value.seeds) == (3, 3, SEEDS)
    for label, shots in (("CoOp", 1), ("probe", 4)):
        value = cell(grid, ("average", label), "1 shot" if shots == 1 else f"{shots} shots")
        assert value.mean == pytest.approx(means[:, label, shots].mean()) and value.state == "done"
        assert value.difference == pytest.approx((means[:, label, shots] - means[:, "zero-shot", 0]).mean())
    assert cell(grid, ("average", "zero-shot"), "0 shots").difference is None


def test_averages_are_over_the_same_datasets() -> None:
    """Whatever is missing: an average over easier datasets would look better than it is."""
    plan = plan_of([("food101", "CoOp", shots, seed) for shots in SHOTS for seed in SEEDS] + [("dtd", "CoOp", 1, 2)])
    grid = make_grid(records_of(plan), TABLE, numbers(), DATASETS, "table")
    means = 100 * plan.astype({"accuracy": float}).groupby(["dataset", "label", "shots"])["accuracy"].mean()
    two = ["dtd", "eurosat"]
    for label, shots in (("CoOp", 1), ("probe", 4), ("zero-shot", 0)):
        value = cell(grid, ("average", label), "1 shot" if shots == 1 else f"{shots} shots")
        assert value.mean == pytest.approx(means[:, label, shots][two].mean())
        assert value.state == "partial" and "over 2 of 3 datasets: dtd, eurosat" in value.note
    partial, gone = cell(grid, ("dtd", "CoOp"), "1 shot"), cell(grid, ("food101", "CoOp"), "1 shot")
    assert (partial.state, partial.n, partial.planned) == ("partial", 2, 3)
    assert (gone.state, gone.mean, gone.planned) == ("missing", None, 3)


def test_average_harmonic_means_are_of_averages() -> None:
    """CoCoOp's Table 3 (a): 82.69 and 63.22 give 71.66, which is not the mean of the datasets' harmonic means."""
    plan = plan_of().query("label == 'zero-shot'")
    base_new = {"dtd": (0.5, 0.9), "eurosat": (0.8, 0.2), "food101": (0.7, 0.6)}
    rows = []
    for row in plan.assign(protocol="base_to_new").to_dict("records"):
        base, new = base_new[row["dataset"]]
        measured = {"base": base, "new": new, "harmonic_mean": harmonic_mean([base, new])}
        rows += [row | {"target": target, "accuracy": value} for target, value in measured.items()]
    show = {"rows": ["dataset", "label"], "columns": ["target"]}
    grid = make_grid(records_of(pd.DataFrame(rows, dtype=object)), show, numbers(), DATASETS, "table")
    averages = {name: cell(grid, ("average", "zero-shot"), name).mean for name in ("base", "new", "harmonic_mean")}
    assert averages == pytest.approx(
        {"base": 200 / 3, "new": 170 / 3, "harmonic_mean": harmonic_mean([200 / 3, 170 / 3])}
    )
    assert cell(grid, ("dtd", "zero-shot"), "harmonic_mean").mean == pytest.approx(100 * harmonic_mean([0.5, 0.9]))


def test_what_is_planned_on_some_datasets_has_no_average() -> None:
    """An ablation on one dataset neither has an average nor changes those of the others."""
    plan = plan_of()
    records = records_of(plan[(plan["label"] != "probe") | (plan["dataset"] == "dtd")])
    rows = [row for row, _ in make_grid(records, TABLE, numbers(), DATASETS, "table").rows]
    assert ("average", "CoOp") in rows and ("average", "probe") not in rows
    value = cell(make_grid(records, TABLE, numbers(), DATASETS, "table"), ("average", "CoOp"), "1 shot")
    assert value.state == "done" and value.note == "over 3 datasets"


def test_a_baseline_has_the_same_shots_or_is_none() -> None:
    plan = plan_of()
    means = 100 * plan.astype({"accuracy": float}).groupby(["dataset", "label", "shots"])["accuracy"].mean()
    both = make_bars(records_of(plan), {"label": "CoOp", "baseline": "probe", "over": "dataset"}, numbers(), "b")
    found = {name: value.mean for name, value in both.bars}
    assert len(found) == 6
    assert found["dtd, 1 shot"] == pytest.approx(means["dtd", "CoOp", 1] - means["dtd", "probe", 1])
    assert found["dtd, 4 shots"] == pytest.approx(means["dtd", "CoOp", 4] - means["dtd", "probe", 4])
    none = make_bars(records_of(plan), {"label": "zero-shot", "baseline": "probe", "over": "dataset"}, numbers(), "b")
    assert {value.state for _, value in none.bars} == {"missing"}


def test_published_numbers_stand_beside_the_same_thing_only() -> None:
    beside = numbers(
        [
            ("CoOp", "dtd", "rn50", 1, 40.0, False),
            ("CoOp", "dtd", "rn50", 1, 44.0, True),
            ("CoOp", "dtd", "vit_b16", 1, 60.0, True),
            ("CoOp", "average", "rn50", 1, 50.0, True),
            ("ProDA", "dtd", "rn50", 4, 61.0, True),
        ]
    )
    records = records_of(plan_of())
    grid = make_grid(records, TABLE, beside, DATASETS, "table")
    assert [one.value for one in cell(grid, ("dtd", "CoOp"), "1 shot").published] == [
        44.0,
        40.0,
    ]  # the checked one first
    assert cell(grid, ("dtd", "CoOp"), "4 shots").published == ()
    assert [one.value for one in cell(grid, ("average", "CoOp"), "1 shot").published] == [50.0]
    theirs = cell(grid, ("dtd", "ProDA"), "4 shots")
    assert theirs.mean is None and theirs.planned == 0 and [one.value for one in theirs.published] == [61.0]
    (rest,) = beside.rest(DATASETS)
    assert [row for row, _ in rest.rows] == [("vit_b16", "dtd", "CoOp")]

    eleven = make_grid(records, TABLE, beside, [*DATASETS, "imagenet"], "table")  # the paper's average has one more
    assert cell(eleven, ("average", "CoOp"), "1 shot").published == ()
    own = [{**record, "own_split": True} for record in records]
    assert cell(make_grid(own, TABLE, beside, DATASETS, "t"), ("dtd", "CoOp"), "1 shot").published == ()


def test_cells_never_pool_settings() -> None:
    plan = plan_of()
    more = plan[plan["label"] == "CoOp"].assign(backbone="vit_b16")
    grid = make_grid(records_of(pd.concat([plan, more])), {"rows": ["label"], "columns": ["shots"]}, numbers(), (), "t")
    assert grid.keys == ("label", "dataset", "backbone")


def test_curves_and_bars_hold_the_same_means() -> None:
    plan = plan_of([("eurosat", "CoOp", 4, seed) for seed in SEEDS])
    records = records_of(plan)
    beside = numbers([("CoOp", "dtd", "rn50", 4, 66.0, True), ("zero-shot", "dtd", "rn50", 0, 42.0, True)])
    curves = make_curves(records, CURVES, beside, DATASETS, "curves")
    means = 100 * plan.astype({"accuracy": float}).groupby(["dataset", "label", "shots"])["accuracy"].mean()
    assert [panel.title for panel in curves.panels] == ["average over 2 of 3 datasets", *DATASETS] and curves.log2
    lines = {line.label: line for line in curves.panels[1].lines}
    assert [line.label for line in curves.panels[1].lines] == ["zero-shot", "CoOp", "probe"]
    assert lines["zero-shot"].star and not lines["CoOp"].star
    assert {x: value.mean for x, value in lines["CoOp"].points} == pytest.approx(means["dtd", "CoOp"].to_dict())
    assert [(x, one.value) for x, one in lines["CoOp"].published] == [(4, 66.0)]

    bars = make_bars(records, BARS, beside, "gains")
    gains = (means[:, "CoOp", 4] - means[:, "zero-shot", 0]).dropna().sort_values(ascending=False)
    assert [name for name, _ in bars.bars] == [*gains.index, "eurosat"]
    assert [value.mean for _, value in bars.bars[:2]] == pytest.approx(list(gains))
    by_seed = (
        100 * plan.astype({"accuracy": float}).query("label == 'CoOp' and shots == 4 and dataset == 'dtd'")["accuracy"]
    )
    assert dict(bars.bars)["dtd"].std == pytest.approx(by_seed.std(ddof=0))
    assert bars.bars[-1][1].state == "missing" and [(name, one.value) for name, one in bars.published] == [
        ("dtd", 24.0)
    ]


def test_missing_runs_come_with_their_command() -> None:
    gone = [("food101", label, shots, seed) for label in ("CoOp", "probe") for shots in SHOTS for seed in SEEDS]
    plan = plan_of([*gone, ("food101", "zero-shot", 0, 0), ("dtd", "CoOp", 4, 3), ("eurosat", "CoOp", 4, 3)])
    plan.loc[(plan["dataset"] == "eurosat") & (plan["state"] == "missing"), ["state", "error"]] = [
        "failed",
        "no memory",
    ]
    whole, one, failed = sorted(
        missing_runs(records_of(plan), "few_shot", ["backbone=rn50", "lr=0.1"]), key=lambda m: -m.count
    )
    assert (whole.what, whole.count, one.count, failed.failed, failed.error) == (
        "food101: everything",
        13,
        1,
        1,
        "no memory",
    )
    assert whole.command == "coop run -m +experiment=few_shot dataset=food101 backbone=rn50 lr=0.1"
    narrow = "method=coop shots=4 seed=3"
    assert one.command == f"coop run -m +experiment=few_shot dataset=dtd backbone=rn50 {narrow} lr=0.1"


def test_the_summary_says_what_the_numbers_say() -> None:
    plan = plan_of([("food101", "CoOp", 4, 3)])
    told = summary(records_of(plan), "CoOp")
    frame = plan.astype({"accuracy": float, "ece": float})
    means = 100 * frame.groupby(["label", "shots", "dataset"])["accuracy"].mean()
    assert told[0] == "38 of 39 runs are done; there are results on 3 of 3 datasets."
    most = means[[label != "CoOp" or shots == 4 for label, shots, _ in means.index]]
    best = most[[shots in (0, 4) for _, shots, _ in most.index]].groupby("label").mean()
    assert f"{best.idxmax()} is the best series: {best.max():.1f} %" in told[1]
    gains = (means["CoOp"].unstack() - means["zero-shot", 0]).stack()
    lost = gains[gains < 0]
    assert f"below zero-shot in {len(lost)} of {len(gains)} measured places" in told[2]
    assert f"({lost.min():+.1f})" in told[2]
    errors = 100 * frame.groupby(["label", "shots", "dataset"])["ece"].mean()
    assert f"from {errors['zero-shot', 0].mean():.1f} % (zero-shot) to {errors['CoOp', 4].mean():.1f} %" in told[4]


def test_nothing_at_all_is_a_report_too() -> None:
    plan = plan_of()
    plan = plan.assign(state="missing", accuracy=None, macro_f1=None, ece=None, mean_confidence=None, run=None)
    records = records_of(plan)
    grid = make_grid(records, TABLE, numbers(), DATASETS, "table")
    assert {value.state for _, row in grid.rows for value in row if value} == {"missing"}
    assert {v.mean for _, v in make_bars(records, BARS, numbers(), "b").bars} == {None}
    assert summary(records, "CoOp") == ["0 of 39 runs are done."]
