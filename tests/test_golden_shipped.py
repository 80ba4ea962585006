"""The proof that ships: the original codes' recorded computations and samples, reproduced wherever this runs.

The same checks with the same bars as the full set's (`COOP_TEST_ASSETS`), on the compact recordings in `golden/`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coop.clip.backbone import Backbone
from coop.data import few_shot_sample
from tests import test_golden, test_golden_methods
from tests.golden.make import CASES, COOP_CASES, HERE, SPLIT_FILES, compact_weights, digest, few_shot_cases


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return test_golden.tiny_clip(HERE)


@pytest.mark.parametrize("name", COOP_CASES)
def test_coop(tiny: Backbone, name: str) -> None:
    test_golden.test_trajectory(HERE, tiny, name)


def test_cocoop(tiny: Backbone) -> None:
    test_golden_methods.test_cocoop(HERE, tiny, "m4-batch1", batch_size=1, n_ctx=4, words=None)


def test_clip_adapter(tiny: Backbone) -> None:
    test_golden_methods.test_clip_adapter(HERE, tiny)


FEW_SHOT = json.loads((HERE / "few_shot.json").read_text())


@pytest.mark.parametrize("dataset", SPLIT_FILES)
def test_few_shot_samples(dataset: str) -> None:
    """A sample depends on the classes' order in the split alone, so the places of its images are checked."""
    about = FEW_SHOT[dataset]
    split = {
        part: [[place, label, ""] for place, label in enumerate(label for label, n in runs for _ in range(n))]
        for part, runs in about["runs"].items()
    }
    assert len(about["cases"]) == 15
    for case, parts in about["cases"].items():
        shots, seed = (int(word) for word in case.replace("-shot seed", "").split())
        for part, rows in zip(("train", "val"), few_shot_sample(split, shots, seed), strict=True):
            assert digest(",".join(str(row[0]) for row in rows)) == parts[part]["places"], (case, part)


def test_recordings_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 1.5e6


@pytest.mark.assets
def test_recordings_come_from_the_full_ones(assets: Path) -> None:
    """What ships is what was recorded, and the few-shot digests are the published ones."""
    assert few_shot_cases(assets) == FEW_SHOT
    about = json.loads((HERE / "cases.json").read_text())
    assert about == json.loads((assets / "golden" / "cases.json").read_text())
    weights, expected = (
        load_file(HERE / "tiny_clip.safetensors"),
        compact_weights(assets / "golden", about["class_names"]),
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for name in CASES:
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (HERE, assets / "golden"))
        assert ours.keys() ^ theirs.keys() <= {"features", "images"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
