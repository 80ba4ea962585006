"""Published numbers are those of the reference they were taken from: value, place, system and source."""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from coop.data import dataset_descriptions
from coop.errors import CoopError
from coop.report import published as module
from coop.report.published import published, published_words, reproductions
from tests.published_reference import DATASETS, ROOT, public_source, reference_facts, rows_of

FOLDER = ROOT / "experiments" / "published"
STUDIES = sorted({row["study"] for row in rows_of(FOLDER / "shown.csv")})
SYSTEMS = {row["system"]: row for row in rows_of(FOLDER / "systems.csv")}
VALUES = rows_of(FOLDER / "values.csv")
KEYS = ("dataset", "backbone", "shots", "target", "metric")
ELEVEN = list(DATASETS.values())[:11]
ZERO_SHOT = {"Zero-shot CLIP", "CLIP", "Hand-crafted prompt"}
SEVEN = {"Prompt ensembling (7 selected templates)", "Zero-shot CLIP (7-template)"}
M16 = {"CoOp", "CoOp M=16", "CoOp M=16 end"}
PROBE = {"Linear probe CLIP", "Linear-probe CLIP"}
SERIES = {  # the labels that claim to be a series of the study, and the reference's names for it
    "backbones": {"zero-shot": ZERO_SHOT, "CoOp, M=16, end": M16},
    "base_to_new": {"zero-shot": ZERO_SHOT, "CoOp": {"CoOp"}, "CoCoOp": {"CoCoOp"}, "KgCoOp": {"KgCoOp"}},
    "clip_adapter": {
        "zero-shot": ZERO_SHOT, "linear probe": PROBE, "CoOp, M=16, end": M16, "CLIP-Adapter": {"CLIP-Adapter"},
    },
    "context_length": {"CoOp, M=4, end": {"CoOp M=4"}, "CoOp, M=16, end": M16},
    "cross_dataset": {"CoOp": {"CoOp"}, "CoCoOp": {"CoCoOp"}},
    "ensembling": {
        "one template": ZERO_SHOT, "7 templates": SEVEN, "CoOp, M=16, end": M16,
        "80 templates": {"zero-shot, 80 templates"},
    },
    "few_shot": {"zero-shot": ZERO_SHOT, "linear probe": PROBE, "CoOp, M=16, end": M16},
    "initialisation": {
        "a photo of a, trained": {'"a photo of a" (manual)'}, "random, trained": {"[V]1..[V]4 random N(0,0.02)"},
    },
    "prompt_or_not": {"template": ZERO_SHOT, "7 templates": SEVEN, "80 templates": {"zero-shot, 80 templates"}},
    "robustness": {
        "zero-shot": ZERO_SHOT, "linear probe": PROBE, "CoOp, M=16, end": M16, "CoOp, M=4, end": {"CoOp M=4"},
    },
    "zero_shot_or_supervised": {
        "zero-shot": ZERO_SHOT, "linear probe": {"linear probe"},
    },
}  # fmt: skip


@pytest.mark.assets
def test_every_number_is_the_references(assets: Path) -> None:
    """With its source, and unverified only where no source of the reference verifies it."""
    facts = defaultdict(list)
    for fact in reference_facts(assets / "reference" / "published"):
        facts[round(fact.value, 2)].append(fact)
    notes = " ".join(row["note"] for row in rows_of(assets / "reference" / "published" / "a_fewshot_rn50.csv"))
    for row in VALUES:
        system = SYSTEMS[row["system"]]
        source = row["source"] or system["source"]
        if row["note"] == "mean of the eleven datasets":
            assert row["value"] in notes
            continue
        same = [
            fact
            for fact in facts[float(row["value"])]
            if fact.paper.removesuffix(", as relisted by GDA-CLIP") in (system["paper"], "")
            and fact.table.removeprefix("CoOp ") in (system["table"], "")
            and fact.method in (system["method"], "")
            and fact.backbone in (row["backbone"], "")
            and fact.dataset in (row["dataset"], "")
            and fact.shots in (row["shots"], "")
            and fact.target == row["target"]
        ]
        assert same, row
        sources = {fact.source for fact in same}
        assert set(source.split("; ")) <= sources or source in sources, row
        assert ("UNVERIFIED" in source) == all("UNVERIFIED" in one for one in sources), row


def test_each_number_stands_once() -> None:
    keys = [(row["system"], *(row[key] for key in KEYS)) for row in VALUES]
    assert len(set(keys)) == len(keys)
    assert {row["system"] for row in VALUES} == SYSTEMS.keys()
    shown = [(row["study"], row["label"], row["system"]) for row in rows_of(FOLDER / "shown.csv")]
    assert len(set(shown)) == len(shown) and {system for *_, system in shown} <= SYSTEMS.keys()


@pytest.mark.assets
def test_words_are_the_references(assets: Path) -> None:
    theirs = rows_of(assets / "reference" / "published" / "e_nearest_words.csv")
    keys = ("position", "word", "distance", "paper", "table", "source")
    assert [(row["dataset"], *(row[key] for key in keys)) for row in rows_of(FOLDER / "words.csv")] == [
        (DATASETS[row["dataset"]], *(row[key] for key in keys)) for row in theirs
    ]


@pytest.mark.assets
def test_reproductions_are_the_references(assets: Path) -> None:
    keys, what, theirs = ("published", "reproduced", "source", "note"), "", set()
    for row in rows_of(assets / "reference" / "published" / "k_reproductions.csv"):
        what = what if row["what"] == "same" else row["what"]
        theirs.add((what, *(public_source(row[key]) if key == "source" else row[key] for key in keys)))
    ours = rows_of(FOLDER / "reproductions.csv")
    assert {study for row in ours for study in row["studies"].split()} <= set(STUDIES)
    missing = theirs - {(row["what"], *(row[key] for key in keys)) for row in ours}
    assert {(row["what"], *(row[key] for key in keys)) for row in ours} <= theirs
    assert [what for what, *_ in missing] == ["DOSCO RN50 CoOp P-Air/P-Cars/P-Ctech/P-Ins/P-Mam/P-Pets/P-UCF"]


def test_rows_name_what_the_toolkit_knows() -> None:
    known, backbones = set(dataset_descriptions()), {path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")}
    for row in [*VALUES, *rows_of(FOLDER / "words.csv")]:
        assert row["dataset"] in known | {"average"}
        assert row["backbone"] in backbones or (row["backbone"] == "" and row["metric"] == "gain")
        assert row.get("target", "average") in known | {"average", "base", "new", "harmonic_mean"}
    studies = {path.stem for path in (ROOT / "experiments" / "studies").glob("*.yaml")}
    assert set(STUDIES) <= studies


@pytest.mark.parametrize("study", STUDIES)
def test_labels_that_claim_to_be_a_series_are_one(study: str) -> None:
    labels = [series["label"] for series in OmegaConf.load(ROOT / "experiments" / "studies" / f"{study}.yaml").series]
    methods_named = [re.escape(label).replace(r"\{method\}", r"\w+") for label in labels]
    ours = [re.compile(re.sub(r"\\{\w+\\}", ".+", label)) for label in methods_named]
    methods = defaultdict(set)
    for row in rows_of(FOLDER / "shown.csv"):
        if row["study"] == study and any(one.fullmatch(row["label"]) for one in ours):
            methods[row["label"]].add(SYSTEMS[row["system"]]["method"])
    assert methods.keys() == SERIES.get(study, {}).keys()
    assert all(found <= SERIES[study][label] for label, found in methods.items())


def records(study: str) -> list[dict[str, str]]:
    rows = published(study).astype(str).to_dict("records")
    return [{str(key): str(value) for key, value in row.items()} for row in rows]


def test_published_averages_are_means() -> None:
    """Over the eleven datasets, and of base and new accuracy; the harmonic means are those of their own row."""
    for study in ("few_shot", "clip_adapter", "context_length", "base_to_new", "prompt_or_not"):
        cells: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        for row in records(study):
            if row["target"] != "harmonic_mean" and row["label"] in SERIES[study]:
                where = row["target"] if study == "base_to_new" else ""
                cells[row["label"], row["backbone"], row["shots"], where][row["dataset"]] = float(row["value"])
        whole = {key: some for key, some in cells.items() if some.keys() == {*ELEVEN, "average"}}
        assert whole, study
        for (_, backbone, *_), some in whole.items():
            rounding = 0.06 if study != "base_to_new" and backbone == "vit_b16" else 0.0101  # printed to one decimal
            assert some["average"] == pytest.approx(sum(some[name] for name in ELEVEN) / 11, abs=rounding)


def test_corrected_harmonic_means_check() -> None:
    values: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in records("base_to_new"):
        if row["paper"].startswith("CoCoOp"):
            assert values[row["label"], row["dataset"]].setdefault(row["target"], float(row["value"])) == float(
                row["value"]
            )
    assert len(values) == 3 * 12
    for value in values.values():
        expected = 2 * value["base"] * value["new"] / (value["base"] + value["new"])
        assert value["harmonic_mean"] == pytest.approx(expected, abs=0.0101)


def test_readers_give_types() -> None:
    rows = published("few_shot")
    (star,) = rows[(rows["label"] == "zero-shot") & (rows["dataset"] == "dtd")].to_dict("records")
    assert (star["shots"], star["value"], star["verified"]) == (0, 42.32, True)
    assert set(published("zero_shot_or_supervised")["shots"]) == {0, "all"}
    assert published("demo").empty and list(published("demo").columns) == list(module.COLUMNS)
    words = published_words()
    assert words["distance"].isna().sum() == (words["word"] == "N/A (non-Latin)").sum() > 0
    assert len(reproductions("clip_adapter")) == 5 and reproductions("demo").empty


@pytest.mark.parametrize(
    ("name", "find", "replace", "said"),
    [
        ("values", ",90.47,", ",90,47,", "line 2: 10 values"),
        ("values", ",90.47,", ",high,", "line 2: value is 'high'"),
        ("values", ",accuracy,", ",precision,", "line 2: metric is 'precision'"),
        ("values", "value", "number", "must have system, dataset"),
        ("values", "APE result notebook plot data: APE,", "nobody,", "'nobody', which systems.csv"),
        ("shown", "shots=16", "colour=16", "'colour=16' is not of the form"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, find: str, replace: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    text = (FOLDER / f"{name}.csv").read_text(encoding="utf-8").replace(find, replace, 1)
    (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "FOLDER", str(tmp_path))
    with pytest.raises(CoopError, match=said):
        published("backbones")
