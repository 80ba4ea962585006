"""The table against the same numbers worked out by hand."""

import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coop.cli import main
from coop.errors import CoopError
from coop.report.frame import measured, select, with_difference
from coop.report.tables import Grid, cell_frame, make_table, render, to_csv, to_latex, to_text
from coop.runs.store import stored_runs

ACCURACY = {("dtd", 1): [0.30, 0.34, 0.41], ("dtd", 4): [0.50, 0.52, 0.57], ("pets", 1): [0.7, 0.72, 0.71]}
ZERO = {"dtd": 0.25, "pets": 0.68}


def write(folder: Path, dataset: str, method: str, shots: int, seed: int, accuracy: Any, **options: Any) -> Path:
    key = {
        "dataset": dataset,
        "data": f"images of {dataset}",
        "dataset_template": "a {}.",
        "backbone": "rn50",
        "architecture": "RN50",
    }
    key |= {"pretrained": "openai", "precision": "fp32", "method": method, "protocol": "all_classes"}
    key |= {"shots": shots, "seed": seed, **options}
    metrics = {"accuracy": accuracy, "macro_f1": 0.5, "ece": 0.1, "mean_confidence": 0.5, "n": 10}
    result = {"key": key, "own_split": dataset == "pets", "fit": {}, "notes": [], "versions": {}, "seconds": {}}
    result |= {"targets": {dataset: metrics | {"per_class_accuracy": {}}}, "split_source": "", "weights": ""}
    place = folder / dataset / f"{method}-{shots}-{seed}-{len(list(folder.rglob('result.json')))}"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(result | {"finished": ""}))
    return place


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for (dataset, shots), values in ACCURACY.items():
        for seed, value in enumerate(values, start=1):
            write(tmp_path, dataset, "coop", shots, seed, value, n_ctx=16, epochs=50 * shots)
    for dataset, value in ZERO.items():
        write(tmp_path, dataset, "zero_shot", 0, 0, value, template=None)
    return tmp_path


def frame_of(results: Path) -> pd.DataFrame:
    return with_difference(measured(stored_runs(results), results))


def table_of(results: Path, **options: Any) -> Grid:
    return make_table(frame_of(results), **options)


def test_means_deviations_and_differences(results: Path) -> None:
    table = table_of(results)
    assert table.keys == ("dataset", "backbone", "method")
    cells = {(cell["dataset"], cell["method"], cell["shots"]): cell for cell in cell_frame(table).to_dict("records")}
    for (dataset, shots), values in ACCURACY.items():
        cell = cells[dataset, "coop", shots]
        assert cell["mean"] == pytest.approx(100 * statistics.fmean(values)) and (cell["n"], cell["datasets"]) == (3, 1)
        assert cell["std"] == pytest.approx(100 * statistics.pstdev(values))
        assert cell["difference"] == pytest.approx(100 * (statistics.fmean(values) - ZERO[dataset]))
    both = statistics.fmean([*ACCURACY["dtd", 1], *ACCURACY["pets", 1]])
    average = cells["average", "coop", 1]
    assert average["mean"] == pytest.approx(100 * both) and (average["n"], average["datasets"]) == (6, 2)
    assert ("average", "coop", 4) not in cells  # pets has no such run: an average over fewer would mislead
    assert "pets: own split, not the official one" in table.notes
    assert table.notes[1].endswith("settings are the same for all datasets"), "their images are no setting"
    single = cells["dtd", "zero_shot", 0]
    assert (single["n"], single["std"], single["difference"]) == (1, None, None) or pd.isna(single["std"])


@pytest.mark.parametrize("lr, said", [(0.1, "lr, which differ between datasets"), (0.2, "same for all datasets")])
def test_settings_that_differ_between_datasets_are_named(lr: float, said: str, tmp_path: Path) -> None:
    """Other datasets have other data; that is no setting."""
    write(tmp_path, "dtd", "coop", 1, 1, 0.5, data="x", lr=0.2)
    write(tmp_path, "pets", "coop", 1, 1, 0.5, data="y", lr=lr)
    (note,) = [note for note in table_of(tmp_path).notes if "same for all datasets" in note]
    assert note.endswith(said) and "data, " not in note


def test_an_ensemble_is_no_baseline(results: Path) -> None:
    write(results, "dtd", "zero_shot", 0, 0, 0.9, template="imagenet7")
    cells = cell_frame(table_of(results, rows=["dataset", "method", "template"]))
    difference = cells[(cells["dataset"] == "dtd") & (cells["shots"] == 1)]["difference"].item()
    assert difference == pytest.approx(100 * (statistics.fmean(ACCURACY["dtd", 1]) - 0.25))


def test_settings_are_never_pooled(results: Path) -> None:
    write(results, "dtd", "coop", 1, 1, 0.1, n_ctx=4, epochs=50)
    assert "n_ctx" in table_of(results).keys
    with pytest.raises(CoopError, match=r"n_ctx \(4, 16, null\).*--rows.*--where n_ctx=16"):
        table_of(results, rows=["dataset", "method"])
    with pytest.raises(CoopError, match="did you mean 'n_ctx'"):
        table_of(results, rows=["n_ctxs"])


@pytest.mark.parametrize("other", [{"data": "y"}, {"protocol": "cross_dataset", "targets": {"a": "1"}}])
def test_other_data_is_no_other_seed(other: dict[str, Any], tmp_path: Path) -> None:
    """Own folders of one name, or other targets: seeds apart, and no baseline for each other."""
    same = {"protocol": "cross_dataset", "targets": {"a": "1", "b": "2"}} if "targets" in other else {}
    write(tmp_path, "dtd", "zero_shot", 0, 0, 0.1, **same)
    write(tmp_path, "dtd", "coop", 1, 1, 0.5, **same)
    write(tmp_path, "dtd", "coop", 1, 2, 0.9, **other)
    with pytest.raises(CoopError, match="over targets" if same else "over data"):
        table_of(tmp_path, rows=["dataset", "method", "protocol"])
    cells = cell_frame(table_of(tmp_path))
    trained = cells[cells["method"] == "coop"]
    assert sorted(zip(trained["mean"], trained["n"], trained["difference"].isna(), strict=True)) == [
        (50, 1, False),
        (90, 1, True),
    ]


def test_the_advice_of_a_refused_table_can_be_followed(results: Path) -> None:
    """What --rows method proposes gives a table: with two templates, it is the one that no run names (null)."""
    for name in ZERO:
        write(results, name, "zero_shot", 0, 0, 0.9, template="imagenet7")
    chosen = select(frame_of(results), ["dataset=dtd"])
    with pytest.raises(CoopError) as raised:
        make_table(chosen, ["method"])
    advice = re.search(r"--where (\w+=\w+)", str(raised.value))
    assert advice and advice[1] == "template=null"
    assert cell_frame(make_table(select(chosen, [advice[1]]), ["method"]))["n"].tolist() == [3, 3, 1]


def test_selection(results: Path) -> None:
    frame = select(frame_of(results), ["method=coop", "dataset=dtd"])
    assert cell_frame(make_table(frame))["difference"].notna().all()
    with pytest.raises(CoopError, match="method=coop, zero_shot"):
        select(frame_of(results), ["method=cop"])
    write(results, "dtd", "zero_shot", 0, 0, 0.9, template="a {}, a type of texture.")
    assert len(select(frame_of(results), ["template=a {}, a type of texture."])) == 1
    assert len(select(frame_of(results), ["template=null", "method=zero_shot"])) == 2


def test_formats(results: Path) -> None:
    table = table_of(results)
    assert "35.0 ±4.5 (+10.0) n=3" in render(table, "text", 200) and "own split" in render(table, "text", 200)
    read = pd.read_csv(io.StringIO(render(table, "csv")))
    assert read["mean"].tolist() == pytest.approx(cell_frame(table)["mean"].tolist(), abs=1e-3)
    markdown, latex = render(table, "markdown"), render(table, "latex")
    assert markdown.splitlines()[0].count("|") == 7 and r"\toprule" in latex and "lllrrr" in latex
    assert r"\textbf{" not in latex, "a number alone is not the best of its column"
    assert r"35.0 $\pm$4.5 (+10.0) {\scriptsize $n{=}3$}" in latex and " n=" not in latex
    assert "& CoOp &" in latex and r"\_" not in latex.split(r"\bottomrule")[0]
    write(results, "dtd", "kgcoop", 4, 1, 0.2)
    latex = render(table_of(results), "latex")
    assert latex.count(r"\textbf{") == 1 and r"\textbf{53.0 $\pm$2.9" in latex


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_splits_no_word(results: Path, width: int) -> None:
    table = table_of(results)
    text = render(table, "text", width)
    assert max(map(len, text.splitlines())) <= width
    wide = set(to_text(table).split())
    assert set(text.split()) <= wide | {"shots", "0", "1", "4"}


def test_latex_is_plain_text_whatever_names_hold(results: Path) -> None:
    """Every special character of TeX is escaped: compared with the rules of TeX itself, by removing escapes."""
    nasty = "z$b^c~d{e}f\\g&h%i#j_k"
    write(results, nasty, "zero_shot", 0, 0, 0.5, template=None)
    line = next(line for line in to_latex(table_of(results)).splitlines() if line.startswith("z"))
    cell = line.split(" & ")[0]
    escapes = {r"\textasciitilde": "~", r"\textasciicircum": "^", r"\textbackslash": "\\"}
    for escape, plain in escapes.items():
        assert cell.count(escape) == 1
        cell = re.sub(re.escape(escape) + r"(\{\}|\s)?", lambda _, c=plain: c, cell)  # type: ignore[misc]
    assert re.sub(r"\\([$&%#_{}])", r"\1", cell).replace(" ", "") == nasty


def test_csv_runs_nothing_in_a_spreadsheet(results: Path) -> None:
    for name in ("=1+1", "+1", "-1", "@SUM(A1)"):
        write(results, name, "zero_shot", 0, 0, 0.5, template=None)
    write(results, "dtd", "coop", 1, 9, 0.1, n_ctx=16, epochs=50)
    text = render(table_of(results), "csv")
    assert not re.search(r"(^|,)\"?[=+@]", text, re.M) and "'=1+1" in text and "'-1" in text
    frame = pd.read_csv(io.StringIO(to_csv(pd.DataFrame({"a": [-1.5, 2.0], "b": ["-x", "y"]}))))
    assert frame["a"].tolist() == [-1.5, 2.0] and frame["b"].tolist() == ["'-x", "y"]


@pytest.mark.parametrize(
    "accuracy", [99, -3, None, "0.5", float("nan"), True], ids=["99", "-3", "null", "text", "nan", "true"]
)
def test_what_is_no_fraction_never_becomes_a_number(
    results: Path, accuracy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged run is named with its reason; the rest is shown as if it were not there."""
    before = render(table_of(results), "csv")
    place = write(results, "dtd", "coop", 1, 4, accuracy, n_ctx=16, epochs=50)
    assert main(["table", str(results), "--format", "csv"]) == 0
    said = capsys.readouterr()
    assert said.out == before and place.name in said.err and len(said.err.splitlines()) == 1


def test_damaged_files_are_named_and_the_rest_is_shown(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = sorted(results.rglob("result.json"))
    for text in ('{"key": ', "[]", "{}", "[" * 100_000):
        path.write_text(text)
        assert main(["table", "--results", str(results)]) == 0
        said = capsys.readouterr()
        assert path.parent.name in said.err and "pets" in said.out


def test_two_folders_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(results), "--results", "other"]) == 2
    assert "two folders" in capsys.readouterr().err


def test_the_table_loads_no_model_library(results: Path) -> None:
    code = f"import sys; from coop.cli import main; main(['table', {str(results)!r}]); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = {name.split(".")[0] for name in out.splitlines()[-1].split()}
    assert not loaded & {"torch", "open_clip", "sklearn", "matplotlib", "altair", "vl_convert", "jinja2"}


def test_the_table_of_recorded_results_is_that_of_the_first_design(tmp_path: Path) -> None:
    """80 runs on three datasets: every mean, deviation, n and difference, in the same order.

    By intent a single run has no deviation (it had 0), zero-shot no difference to itself, and there are averages.
    """
    golden = Path(__file__).parent / "golden"
    for line in (golden / "report_results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        place = tmp_path / record["folder"]
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(record["result"]))
    new = pd.read_csv(io.StringIO(render(table_of(tmp_path), "csv")))
    old = pd.read_csv(golden / "report_table.csv")
    old.loc[old["n"] == 1, "std"] = float("nan")
    old.loc[(old["method"] == "zero_shot") & old["template"].isna(), "difference"] = float("nan")
    kept = new[new["dataset"] != "average"].reset_index(drop=True)[list(old.columns)]
    pd.testing.assert_frame_equal(kept, old, check_dtype=False, atol=1e-9)
    average = new[(new["dataset"] == "average") & (new["target"] == "own test set")].set_index(["method", "shots"])
    own = old[(old["target"] == old["dataset"]) & (old["method"] == "coop")].groupby("shots")["mean"].mean()
    assert average.loc["coop", "mean"].to_dict() == pytest.approx(own.to_dict(), abs=1e-4)
    assert set(average["datasets"]) == {3}
