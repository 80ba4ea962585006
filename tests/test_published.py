"""Published numbers are those of the reference they were taken from: value, place, system and source."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from coop.data import dataset_descriptions
from coop.errors import CoopError
from coop.report import published as module
from coop.report.published import published, published_words, reproductions
from tests.published_reference import DATASETS, ROOT, reference_facts, rows_of

FILES = {path.stem: path for path in sorted((ROOT / "experiments" / "published").glob("*.csv"))}
STUDIES = [name for name in FILES if name not in ("words", "reproductions")]
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
        "one template": ZERO_SHOT, "7 templates": SEVEN, "80 templates": {"open_clip"}, "CoOp, M=16, end": M16,
    },
    "few_shot": {"zero-shot": ZERO_SHOT, "linear probe": PROBE, "CoOp, M=16, end": M16},
    "initialisation": {
        "a photo of a, trained": {'"a photo of a" (manual)'}, "random, trained": {"[V]1..[V]4 random N(0,0.02)"},
    },
    "prompt_or_not": {"template": ZERO_SHOT, "7 templates": SEVEN, "80 templates": {"open_clip"}},
    "robustness": {
        "zero-shot": ZERO_SHOT, "linear probe": PROBE, "CoOp, M=16, end": M16, "CoOp, M=4, end": {"CoOp M=4"},
    },
    "zero_shot_or_supervised": {
        "zero-shot": ZERO_SHOT, "linear probe": {"Table 10 (full-data linear probe, CLIP RN50)"},
    },
}  # fmt: skip
OTHERS = {  # labels of other systems that are not the reference's own name of them
    "zero-shot (CLIP's paper)": {"Table 11 (zero-shot, RN50)", "Table 11 (zero-shot)"},
    "zero-shot (Tip-Adapter's templates)": {"Zero-shot CLIP"},
    "zero-shot (APE's templates)": {"Zero-shot CLIP"},
    "zero-shot, 80 templates (open_clip)": {"open_clip"},
    "zero-shot, CLIP_benchmark's templates": {"open_clip"},
    "zero-shot, 80 templates (CLIP's notebook)": {"notebook"},
    "zero-shot CLIP over a linear probe on ResNet-50": {"Fig 5"},
    "a photo of a {}. over the class name alone": {"Sec 3.1.4"},
    "80 templates over a photo of a {}.": {"Sec 3.1.4"},
    "CoOp (quoted by Tip-Adapter)": {"CoOp"},
    "CLIP-Adapter, 7 templates": {"CLIP-Adapter"},
    **{f"{name} (CLIP-LoRA's table)": {name} for name in ("CLIP-Adapter", "Tip-Adapter-F")},
    **{f"{name} (APE's values)": {name} for name in ("CoOp", "CLIP-Adapter", "Tip-Adapter", "Tip-Adapter-F")},
}


def stands_for(study: str, label: str) -> set[str]:
    return SERIES[study].get(label) or OTHERS.get(label) or {label}


@pytest.mark.assets
@pytest.mark.parametrize("study", STUDIES)
def test_every_number_is_the_references(study: str, assets: Path) -> None:
    facts = defaultdict(list)
    for fact in reference_facts(assets / "reference" / "published"):
        facts[fact.source, round(fact.value, 2)].append(fact)
    notes = " ".join(row["note"] for row in rows_of(assets / "reference" / "published" / "a_fewshot_rn50.csv"))
    for row in rows_of(FILES[study]):
        if row["note"] == "mean of the eleven datasets":
            assert row["value"] in notes
            continue
        same = [
            fact
            for fact in facts[row["source"], float(row["value"])]
            if fact.method in stands_for(study, row["label"])
            and fact.paper in (row["paper"], "")
            and fact.backbone in (row["backbone"], "")
            and fact.dataset in (row["dataset"], "")
            and fact.shots in (row["shots"], "")
            and fact.target == row["target"]
        ]
        assert same, row


@pytest.mark.assets
def test_words_are_the_references(assets: Path) -> None:
    theirs = rows_of(assets / "reference" / "published" / "e_nearest_words.csv")
    keys = ("position", "word", "distance", "paper", "table", "source")
    assert [(row["dataset"], *(row[key] for key in keys)) for row in rows_of(FILES["words"])] == [
        (DATASETS[row["dataset"]], *(row[key] for key in keys)) for row in theirs
    ]


@pytest.mark.assets
def test_reproductions_are_the_references(assets: Path) -> None:
    keys, what, theirs = ("published", "reproduced", "source", "note"), "", set()
    for row in rows_of(assets / "reference" / "published" / "k_reproductions.csv"):
        what = what if row["what"] == "same" else row["what"]
        theirs.add((what, *(row[key] for key in keys)))
    ours = rows_of(FILES["reproductions"])
    assert {row["study"] for row in ours} <= set(STUDIES)
    missing = theirs - {(row["what"], *(row[key] for key in keys)) for row in ours}
    assert {(row["what"], *(row[key] for key in keys)) for row in ours} <= theirs
    assert [what for what, *_ in missing] == ["DOSCO RN50 CoOp P-Air/P-Cars/P-Ctech/P-Ins/P-Mam/P-Pets/P-UCF"]


@pytest.mark.parametrize("study", [*STUDIES, "words"])
def test_rows_speak_of_what_the_toolkit_knows(study: str) -> None:
    rows = rows_of(FILES[study])
    known, backbones = set(dataset_descriptions()), {path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")}
    for row in rows:
        assert row["verified"] == ("false" if "UNVERIFIED" in row["source"] else "true")
        assert row["dataset"] in known | {"average"}
        assert row["backbone"] in backbones or (row["backbone"] == "" and row["metric"] == "gain")
        assert row.get("target", "average") in known | {"average", "base", "new", "harmonic_mean"}
    keys = ("label", "dataset", "backbone", "shots", "target", "metric", "position", "source")
    assert len({tuple(row.get(key) for key in keys) for row in rows}) == len(rows)


@pytest.mark.parametrize("study", STUDIES)
def test_labels_that_claim_to_be_a_series_are_one(study: str) -> None:
    labels = [series["label"] for series in OmegaConf.load(ROOT / "experiments" / "studies" / f"{study}.yaml").series]
    ours = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(label))) for label in labels]
    said = {row["label"] for row in rows_of(FILES[study])}
    assert {label for label in said if any(one.fullmatch(label) for one in ours)} == SERIES[study].keys()


def test_published_averages_are_means() -> None:
    """Over the eleven datasets, and of base and new accuracy; the harmonic means are those of their own row."""
    for study in ("few_shot", "clip_adapter", "context_length", "base_to_new", "prompt_or_not"):
        cells: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        for row in rows_of(FILES[study]):
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
    for row in rows_of(FILES["base_to_new"]):
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
    assert set(reproductions("clip_adapter")["study"]) == {"clip_adapter"} and reproductions("demo").empty


@pytest.mark.parametrize(
    ("find", "replace", "told"),
    [
        ("58.18", "58,18", "line 2: 13 values"),
        (",58.18,", ",high,", "line 2: value is 'high'"),
        (",true,", ",yes,", "line 2: verified is 'yes'"),
        (",true,", ",false,", "line 2: source"),
        ("value", "number", "must have label, dataset"),
    ],
)
def test_a_damaged_file_is_named(
    find: str, replace: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FILES["few_shot"].read_text(encoding="utf-8").replace(find, replace, 1)
    (tmp_path / "few_shot.csv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "FOLDER", str(tmp_path))
    with pytest.raises(CoopError, match=told):
        published("few_shot")
