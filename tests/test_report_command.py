"""`coop report` from end to end: a part of the few-shot study on a tiny CLIP, and what stands in the written files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coop.cli import main
from tests.small_place import make_place, words_for


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Do the zero-shot run and three of the four runs of each CoOp series; return what the study was asked with."""
    folder = make_place(tmp_path_factory.mktemp("study"))
    overrides = [text for text in words_for(folder, folder / "results") if not text.startswith("augment")]
    overrides += ["augment.views=0", "method=zero_shot,coop", "shots=1,2", "seed=1,2", "n_ctx=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOP_CACHE", str(folder / "cache"))
        assert main(["run", "-m", "+experiment=few_shot", *overrides]) == 0
    for path in (folder / "results").glob("colours/tiny/coop/shots2-seed2-*"):
        shutil.rmtree(path)
    return overrides


def results_of(arguments: list[str]) -> Path:
    return next(Path(text.removeprefix("results=")) for text in arguments if text.startswith("results="))


def test_page_tables_and_figures(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert main(["report", "few_shot", *arguments, "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == str(out / "index.html") and said.err == ""
    assert (
        "<title>Few-shot learning" in (out / "index.html").read_text() and "missing" in (out / "index.html").read_text()
    )

    table = pd.read_csv(out / "tables" / "table.csv")
    runs = [json.loads(path.read_text()) for path in results_of(arguments).rglob("result.json")]
    assert len(runs) == 1 + 4 * 3
    for row in table[table["state"] != "missing"].to_dict("records"):
        found = [
            json.loads((results_of(arguments) / run / "result.json").read_text()) for run in row["runs"].split(" ")
        ]
        assert row["mean"] == pytest.approx(100 * np.mean([run["accuracy"] for run in found]), abs=1e-3)
        assert len(found) == row["n"]
    states = table.set_index(["label", "column"])["state"]
    assert states["zero-shot", "0 shots"] == "done" and states["CoOp, M=16, end", "2 shots"] == "partial"
    gains = pd.read_csv(out / "tables" / "gains.csv")
    means = table.set_index(["label", "column"])["mean"]
    gain = means["CoOp, M=16, end", "2 shots"] - means["zero-shot", "0 shots"]  # 16 were not asked for
    assert gains["name"].tolist() == ["colours"] and gains["mean"].item() == pytest.approx(gain, abs=1e-3)

    for name in ("curves", "gains"):
        heads = [(out / "figures" / f"{name}.{form}").read_bytes()[:5] for form in ("png", "pdf", "svg")]
        assert heads == [b"\x89PNG\r", b"%PDF-", b"<svg "]
    assert r"\toprule" in (out / "tables" / "table.tex").read_text()
    words = pd.read_csv(out / "tables" / "words.csv")
    assert words.empty or set(words["rank"]) == {1, 2, 3, 4, 5}


@pytest.mark.slow
def test_a_second_report_takes_the_place_of_the_first(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "mine.svg").write_text("not of the report")
    assert main(["report", "few_shot", *arguments, "--output", str(out)]) == 0
    first = sorted(out.rglob("*.*"))
    untrained = [text for text in arguments if text.startswith(("dataset", "backbone", "results"))]
    untrained.append("method=zero_shot")
    assert main(["report", "few_shot", *untrained, "--output", str(out)]) == 0
    second = sorted(out.rglob("*.*"))
    assert set(second) < set(first) and out / "figures" / "mine.svg" in second
    assert not [path for path in second if path.name.startswith("gains") or path.suffix == ".tmp"]


def test_nothing_done_is_an_error_with_the_command(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    grid = [text for text in arguments if not text.startswith("results=")]
    where = ["--output", str(tmp_path / "report")]
    assert main(["report", "few_shot", *grid, f"results={tmp_path / 'empty'}", *where]) == 2
    err = capsys.readouterr().err
    assert "nothing" in err and "coop run -m +experiment=few_shot" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_a_results_folder_has_a_report(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every finished run is in it, a damaged one is named, and runs can be chosen."""
    results = shutil.copytree(results_of(arguments), tmp_path / "mine")
    (damaged,) = results.glob("colours/tiny/zero_shot/*/result.json")
    damaged.write_text("{")
    assert main(["report", str(results), "--output", str(tmp_path / "report")]) == 0
    assert damaged.parent.name in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "report" / "tables" / "accuracy.csv")
    assert table["n"].sum() == len(list(results.rglob("result.json"))) - 1 == 12
    assert damaged.parent.name in (tmp_path / "report" / "index.html").read_text()
    assert main(["report", str(results), "shots=1", "--output", str(tmp_path / "report")]) == 0
    assert set(pd.read_csv(tmp_path / "report" / "tables" / "accuracy.csv")["column"]) == {"1 shot"}


def test_mistakes_are_one_sentence(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command, told in (
        (["few_shots"], "few_shot"),
        (["few_shot", f"results={tmp_path / 'none'}"], "none"),
        (["few_shot", *arguments, "--output", str(tmp_path / "file")], "give the name of a folder"),
        (["few_shot", "shotz=1", f"results={tmp_path}"], "shotz"),
    ):
        assert main(["report", *command]) == 2
        err = capsys.readouterr().err
        assert told in err and len(err.strip().splitlines()) == 1, err
