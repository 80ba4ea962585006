"""The table against the same numbers worked out by hand."""

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coop.errors import CoopError
from coop.report.render import render
from coop.report.table import Table, make_table, select, with_difference
from coop.runs.store import read_results

ACCURACY = {("dtd", 1): [0.30, 0.34, 0.41], ("dtd", 4): [0.50, 0.52, 0.57], ("pets", 1): [0.7, 0.72, 0.71]}
ZERO = {"dtd": 0.25, "pets": 0.68}


def write(folder: Path, dataset: str, method: str, shots: int, seed: int, accuracy: float, **options: Any) -> None:
    about = {"dataset": dataset, "data": "x", "dataset_template": "a {}.", "backbone": "rn50", "architecture": "RN50"}
    about |= {"pretrained": "openai", "precision": "fp32", "method": method, "protocol": "all_classes"}
    about |= {"shots": shots, "seed": seed, **options}
    metrics = {"accuracy": accuracy, "macro_f1": accuracy, "ece": 0.1, "mean_confidence": 0.5, "n": 10}
    result = {"identity": about, "own_split": dataset == "pets", "fit": {}, "targets": {dataset: metrics}}
    place = folder / dataset / f"{method}-{shots}-{seed}-{len(list(folder.rglob('result.json')))}"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(result | {"accuracy": accuracy}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for (dataset, shots), values in ACCURACY.items():
        for seed, value in enumerate(values, start=1):
            write(tmp_path, dataset, "coop", shots, seed, value, n_ctx=16, epochs=50 * shots)
    for dataset, value in ZERO.items():
        write(tmp_path, dataset, "zero_shot", 0, 0, value, template=None)
    return tmp_path


def table_of(results: Path, **options: Any) -> Table:
    return make_table(with_difference(read_results(results)), **options)


def test_means_spreads_and_differences(results: Path) -> None:
    table = table_of(results)
    assert table.rows == ["dataset", "backbone", "method"] and table.columns == ["shots"]
    cells = {(cell["dataset"], cell["method"], cell["shots"]): cell for cell in table.cells.to_dict("records")}
    for (dataset, shots), values in ACCURACY.items():
        cell = cells[dataset, "coop", shots]
        assert cell["mean"] == pytest.approx(100 * statistics.fmean(values)) and cell["n"] == 3
        assert cell["std"] == pytest.approx(100 * statistics.pstdev(values))
        assert cell["difference"] == pytest.approx(100 * (statistics.fmean(values) - ZERO[dataset]))
    both = statistics.fmean([*ACCURACY["dtd", 1], *ACCURACY["pets", 1]])
    assert cells["average", "coop", 1]["mean"] == pytest.approx(100 * both)
    assert ("average", "coop", 4) not in cells  # pets has no such run: an average over fewer would mislead
    assert table.notes == ["pets: own split, not the official one"]


def test_an_ensemble_is_no_baseline(results: Path) -> None:
    write(results, "dtd", "zero_shot", 0, 0, 0.9, template="imagenet7")
    cells = table_of(results, rows=["dataset", "method", "template"]).cells
    difference = cells[(cells["dataset"] == "dtd") & (cells["shots"] == 1)]["difference"].item()
    assert difference == pytest.approx(100 * (statistics.fmean(ACCURACY["dtd", 1]) - 0.25))


def test_settings_are_never_pooled(results: Path) -> None:
    write(results, "dtd", "coop", 1, 1, 0.1, n_ctx=4, epochs=50)
    assert "n_ctx" in table_of(results).rows
    with pytest.raises(CoopError, match=r"n_ctx \(16, 4\).*--rows"):
        table_of(results, rows=["dataset", "method"])
    with pytest.raises(CoopError, match="did you mean 'n_ctx'"):
        table_of(results, rows=["n_ctxs"])


def test_selection_keeps_the_baseline(results: Path) -> None:
    frame = select(with_difference(read_results(results)), ["method=coop", "dataset=dtd"])
    assert make_table(frame).cells["difference"].notna().all()
    with pytest.raises(CoopError, match="method=coop, zero_shot"):
        select(with_difference(read_results(results)), ["method=cop"])


def test_formats(results: Path) -> None:
    table = table_of(results)
    text = render(table, "text", 200)
    assert "35.0 ±4.5 (+10.0) n=3" in text.replace("  ", " ") and "own split" in text
    read = pd.read_csv(io.StringIO(render(table, "csv")))
    assert len(read) == len(table.cells) and read["mean"].tolist() == pytest.approx(
        table.cells["mean"].tolist(), abs=1e-3
    )
    markdown, latex = render(table, "markdown"), render(table, "latex")
    assert markdown.splitlines()[0].count("|") == 7 and r"\toprule" in latex and r"zero\_shot" in latex


def test_a_damaged_result_is_named(results: Path) -> None:
    (path, *_) = results.rglob("result.json")
    path.write_text('{"identity": ')
    with pytest.raises(CoopError, match=path.parent.name):
        read_results(results)
