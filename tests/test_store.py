"""What a run is, and what lies in its folder: keys, names of folders, results of this and older versions, damage."""

import dataclasses
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coop.config import run_config
from coop.errors import CoopError
from coop.options import OPTIONS
from coop.runs.key import RunKey, safe_name
from coop.runs.store import (
    FAILURE,
    RESULT,
    Predictions,
    read_predictions,
    stored_runs,
    write_failure,
    write_predictions,
    write_result,
)
from tests.closed_folder import closed_folder

R = Path("R")


def key_of(**values: Any) -> RunKey:
    return RunKey.of(run_config({"dataset": "dtd", **values}))


def result() -> dict[str, Any]:
    """Return what a run with one test set of two images writes."""
    metrics: dict[str, Any] = dict.fromkeys(("accuracy", "macro_f1", "ece", "mean_confidence"), 0.5)
    return {
        "accuracy": 0.5,
        "targets": {"dtd": {**metrics, "n": 2, "per_class_accuracy": {"a": 1.0, "b": None}}},
        "fit": {"steps": 3},
        "validation": {"rule": None, "images": 0, "settings_tried": 1},
        "seconds": {"fit": 1.5},
        "split_source": "split.json",
        "own_split": False,
        "notes": ["a note"],
        "weights": "abc",
        "versions": {"coop": "1"},
        "finished": "2026-01-01T00:00:00+00:00",
    }


@pytest.mark.parametrize("method", OPTIONS)
def test_a_key_comes_back_as_it_was_written(method: str) -> None:
    key = replace(key_of(method=method), data="d" * 64, targets=(("x", "1"), ("y", None)), sample="s")
    written = json.loads(json.dumps(key.as_dict()))
    assert RunKey.from_dict(written) == key and RunKey.from_dict(written).digest == key.digest
    assert hash(RunKey.from_dict(written)) == hash(key)
    assert all(not isinstance(value, dict) for name, value in written.items() if name != "targets")
    assert {"data", "targets"} & key.columns().keys() == set() and key.columns()["sample"] == "s"


def test_keys_are_equal_where_the_results_are() -> None:
    assert key_of(lr=0.01, seed=2) == key_of(seed=2, lr=0.01) != key_of(seed=3, lr=0.01)
    assert key_of(epochs=200) == key_of()  # the protocol's number, asked for
    assert key_of(method="tip_adapter", validation="full") != key_of(method="tip_adapter")
    assert key_of().validation is None and key_of(method="tip_adapter").validation == "min4"
    with_data = replace(key_of(), data="a", targets=(("x", "1"),))
    other_data = replace(key_of(), data="b", targets=(("x", "2"),))
    assert with_data != other_data and with_data.planned() == other_data.planned() != key_of()
    assert replace(with_data, sample="s").planned() != with_data.planned()


def old_identity(**changed: Any) -> dict[str, Any]:
    """Return what the first version wrote of a run of coop, word for word."""
    return {
        "dataset": "dtd", "data": "8749", "dataset_template": "{} texture.", "backbone": "lit_lite",
        "architecture": "lit_lite", "pretrained": "9bfe", "precision": "fp32", "method": "coop",
        "protocol": "all_classes", "shots": 4, "seed": 1, "epochs": 5, "lr": 0.002, "batch_size": 32, "momentum": 0.9,
        "weight_decay": 0.0005, "warmup_epochs": 1, "warmup_lr": 1e-05, "augment.views": 2, "n_ctx": 16,
        "ctx_position": "end", "class_specific": False, "ctx_init": None, **changed,
    }  # fmt: skip


def test_keys_of_older_versions_are_read() -> None:
    values = {"dataset": "dtd", "shots": 4, "epochs": 5, "augment.views": 2}
    key = replace(RunKey.of(run_config(values)), data="8749", pretrained="9bfe")
    assert RunKey.from_dict(old_identity()) == key
    old = old_identity(method="tip_adapter", alpha=None, beta=None, template=None)
    assert RunKey.from_dict(old).validation == "min4"  # the only rule there was
    assert RunKey.from_dict(old_identity(targets={"x": "1", "a": "2"})).targets == (("a", "2"), ("x", "1"))
    assert RunKey.from_dict(old_identity(targets=["x"])).targets == (("x", None),)  # a planned one's, in a failure


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"method": "zero_shot"}, "dtd/lit_lite/zero_shot/default"),
        ({"method": "zero_shot", "template": "imagenet7"}, "dtd/lit_lite/zero_shot/template-imagenet7"),
        ({}, "dtd/lit_lite/coop/shots16-seed1"),
        ({"epochs": 7, "shots": "all"}, "dtd/lit_lite/coop/shotsall-seed1-epochs-7"),
        ({"ctx_init": "a photo of a"}, "dtd/lit_lite/coop/shots16-seed1-ctx_init-a_photo_of_a"),
        ({"augment.views": 0, "class_specific": True}, "coop/shots16-seed1-augment.views-0-class_specific-true"),
        ({"method": "tip_adapter", "validation": "test"}, "tip_adapter/shots16-seed1-validation-test"),
        ({"protocol": "base_to_new", "precision": "bf16"}, "coop/shots16-seed1-bf16-base_to_new"),
    ],
)
def test_a_folder_is_named_by_what_the_run_is(values: dict[str, Any], name: str) -> None:
    folder = key_of(**values).folder(R)
    assert re.search(f"/{re.escape(name)}-[0-9a-f]{{8}}$", f"/{folder}")


def test_an_ensemble_of_many_runs_has_a_short_name() -> None:
    keys = [key_of(method="prompt_ensemble", runs=[f"/results/{i}/{'x' * 50}" for i in range(n)]) for n in (20, 21)]
    names = [key.folder(R).name for key in keys]
    assert all(len(name) < 60 for name in names) and names[0].startswith("runs-20") and names[1].startswith("runs-21")


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_no_name_leaves_its_folder(dataset: str, backbone: str, words: str) -> None:
    options = dataclasses.replace(key_of().options, ctx_init=words or None)  # type: ignore[type-var]
    folder = replace(key_of(), dataset=dataset, backbone=backbone, options=options).folder(R)
    assert len(folder.relative_to(R).parts) == 4 and not {"..", "."} & set(folder.parts)
    assert all(len(part.encode()) <= 100 and "/" not in part and "\0" not in part for part in folder.parts)


def test_long_names_stay_apart() -> None:
    assert safe_name("a" * 200) != safe_name("a" * 201) and len(safe_name("é" * 200).encode()) <= 60


def test_a_run_is_stored_and_found(tmp_path: Path) -> None:
    done, failed = key_of(), key_of(seed=2)
    write_result(done.folder(tmp_path), done, result())
    write_failure(failed.folder(tmp_path), failed, ValueError("no\nroom"), None)
    runs = {run.key: run for run in stored_runs(tmp_path)}
    assert {key: run.state for key, run in runs.items()} == {done: "done", failed: "failed"}
    run = runs[done]
    assert run.accuracies == {"dtd": 0.5} and run.fit == {"steps": 3} and run.notes == ("a note",)
    assert run.validation["settings_tried"] == 1 and run.seconds == {"fit": 1.5} and not run.own_split
    assert runs[failed].error == "no\nroom" and runs[failed].result == {}
    with pytest.raises(CoopError, match="no results folder"):
        stored_runs(tmp_path / "none")


@pytest.mark.parametrize("place", ["accuracy", "seconds", "fit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_result_has_numbers_that_are_not_finite(tmp_path: Path, place: str, value: float) -> None:
    broken = result()
    (broken["targets"]["dtd"] if place == "accuracy" else broken[place])[place] = value
    with pytest.raises(CoopError, match=place):
        write_result(tmp_path, key_of(), broken)
    assert not list(tmp_path.iterdir())


def damaged(path: str, value: Any) -> bytes:
    """Return a result.json in which one value is another one."""
    content: Any = {"key": key_of().as_dict(), **result()}
    *before, last = path.split("/")
    inner = content
    for name in before:
        inner = inner[name]
    inner[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        damaged("key", {}),
        damaged("key", []),
        damaged("key", "x"),
        damaged("key/method", "no such method"),
        damaged("key/method", ["coop"]),
        damaged("key/dataset", 5),
        damaged("key/shots", "many"),
        damaged("key/seed", -1),
        damaged("key/lr", "fast"),
        damaged("key/lr", [1]),
        damaged("key/targets", {"x": 5}),
        damaged("targets", {}),
        damaged("targets", []),
        damaged("targets", {"dtd": 0.5}),
        damaged("targets/dtd/accuracy", 99.0),
        damaged("targets/dtd/accuracy", -0.03),
        damaged("targets/dtd/accuracy", None),
        damaged("targets/dtd/accuracy", "0.5"),
        damaged("targets/dtd/accuracy", float("nan")),
        damaged("targets/dtd/accuracy", True),
        damaged("targets/dtd/n", 0),
        damaged("targets/dtd/n", 1.5),
        damaged("targets/dtd/per_class_accuracy", [1]),
        damaged("targets/dtd/per_class_accuracy", {"a": 2}),
        damaged("harmonic_mean", 1.5),
        damaged("seconds", {"fit": "long"}),
        damaged("seconds", {"fit": float("inf")}),
        damaged("notes", [1]),
        damaged("fit", None),
        damaged("own_split", "no"),
        damaged("finished", 5),
    ],
    ids=range(38),
)
def test_a_damaged_result_hides_no_other(tmp_path: Path, content: bytes) -> None:
    write_result(tmp_path / "good", key_of(), result())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / RESULT).write_bytes(content)
    bad, good = stored_runs(tmp_path)
    assert good.state == "done"
    assert bad.state == "damaged" and bad.error and RESULT in bad.error and len(bad.error) < 1200


def test_what_cannot_be_opened_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a" / RESULT).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FAILURE).symlink_to("nowhere")
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / RESULT)
    assert [run.state for run in stored_runs(tmp_path)] == ["damaged"] * 3


def test_a_folder_that_cannot_be_read_is_damaged() -> None:
    with closed_folder("closed") as results:
        (run,) = stored_runs(results)
        assert (run.state, run.folder, run.error) == ("damaged", results / "closed", "Permission denied")


def test_predictions_come_back(tmp_path: Path) -> None:
    paths = ("a/1.png", "ü/\udcff.png", "b c.png")
    label, confidence = np.array([0, 1, 1], dtype=np.int32), np.array([0.5, 0.25, 1], dtype=np.float32)
    write_predictions(tmp_path, {"dtd": Predictions(label, label[::-1].copy(), confidence, paths)})
    found = read_predictions(tmp_path)["dtd"]
    assert found.paths == paths and found.predicted.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(found.confidence, confidence)
    assert read_predictions(tmp_path / "none") == {}
    (tmp_path / "predictions.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CoopError, match="damaged"):
        read_predictions(tmp_path)


def test_an_edited_prompt_file_is_another_run(tmp_path: Path) -> None:
    """The file's content is part of what a run is; without one nothing is written."""
    prompts = tmp_path / "prompts.json"
    keys = []
    for text in ("a cat", "a small cat"):
        prompts.write_text(json.dumps({"cat": [text]}))
        keys.append(RunKey.of(run_config({"method": "zero_shot", "template": f"file:{prompts}"})))
    assert keys[0] != keys[1] and keys[0].digest != keys[1].digest
    assert RunKey.from_dict(keys[0].as_dict()) == keys[0]
    assert "prompts" not in RunKey.of(run_config({"method": "zero_shot"})).as_dict()
