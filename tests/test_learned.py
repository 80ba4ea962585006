"""Learned files: they come back as they were, and only onto the backbone that they belong to."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.errors import CoopError
from coop.learned import Classifier, Learned, image_files, load_learned, load_method
from coop.methods import METHODS
from coop.methods.base import Classes, Method
from tests.closed_folder import closed_folder
from tests.methods_plain import CLASSES, NAMES, hand_written, sample, with_context
from tests.small_towers import FAMILIES, small_backbone

LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_shot": ("zero_shot", {"template": "a drawing of a {}."}),
    "unified": ("coop", {"n_ctx": 3}),
    "class-specific": ("coop", {"n_ctx": 2, "class_specific": True, "ctx_position": "middle"}),
    "words": ("coop", {"ctx_init": "a photo of a", "ctx_position": "front"}),
}


def learned(kind: str, backbone: Backbone, classes: Classes = CLASSES) -> Any:
    name, options = LEARNED[kind]
    training = {} if name == "zero_shot" else {"epochs": 2, "batch_size": 4, "lr": 0.05}
    method: Method = METHODS[name](backbone, classes, METHODS[name].Options(**options, **training), seed=4)
    method.fit(sample(backbone, shots=2), sample(backbone, shots=1))
    return method


@pytest.mark.parametrize("kind", LEARNED)
def test_comes_back_as_it_was(kind: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    method, features = learned(kind, tiny_backbone), sample(tiny_backbone, shots=3, seed=7).test_view
    Learned.of(method).save(tmp_path / "run" / "learned.safetensors")
    again = load_method(tmp_path / "run", backbone=tiny_backbone)
    assert torch.equal(again.logits(features), method.logits(features))
    assert (again.classes, again.options, again.seed) == (method.classes, method.options, 4)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["learned.safetensors"]


def test_the_file_says_what_it_is(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Read with safetensors alone."""
    method = learned("unified", tiny_backbone)
    Learned.of(method).save(tmp_path / "learned.safetensors")
    assert torch.equal(load_file(tmp_path / "learned.safetensors")["ctx"], method.learner.ctx.detach())
    with safe_open(tmp_path / "learned.safetensors", "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert about["method"] == "coop" and about["architecture"] == "tiny" and about["seed"] == 4
    assert about["classes"]["names"] == list(NAMES) and about["weights"] == tiny_backbone.identity
    assert about["options"]["n_ctx"] == 3 and about["options"]["augment"]["views"] == 10


def test_moved_to_new_classes(tiny_backbone: Backbone) -> None:
    """A template and a unified context stand before any name; the features are those of the plain computation."""
    names = ("river", "abbey", "old bridge")
    zero_shot = learned("zero_shot", tiny_backbone).for_classes(Classes(names))
    template = hand_written(tiny_backbone, "a drawing of a {}.", names)
    torch.testing.assert_close(zero_shot.class_features(), template, rtol=1e-4, atol=1e-5)
    method = learned("unified", tiny_backbone)
    expected = with_context(tiny_backbone, method.learner.ctx.detach(), names)
    torch.testing.assert_close(method.for_classes(Classes(names)).class_features(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CoopError, match="class-specific context .* cannot be moved to others: learn a unified one"):
        learned("class-specific", tiny_backbone).for_classes(Classes(names))


def test_another_backbone_is_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    Learned.of(learned("unified", tiny_backbone)).save(tmp_path / "learned.safetensors")
    with pytest.raises(CoopError, match=r"learned on tiny .*, not on custom .*: load the backbone that it was"):
        load_method(tmp_path, backbone=small_backbone(FAMILIES["CLIP with GELU"]))


def test_changed_weights_are_noticed_when_the_backbone_is_loaded(tmp_path: Path) -> None:
    """The file names architecture and checkpoint; another checkpoint in the same place is not the one."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "weights.pt")
    backbone = load_backbone(str(tmp_path / "tiny.json"), str(tmp_path / "weights.pt"))
    Learned.of(learned("zero_shot", backbone)).save(tmp_path / "learned.safetensors")

    images = [Image.effect_noise((30, 20), sigma).convert("RGB") for sigma in (20, 90, 150)]
    images[1].save(tmp_path / "one.png")
    classifier = Classifier.load(tmp_path, device="cpu")
    given = [images[0], tmp_path / "one.png", str(tmp_path / "one.png")]
    found = classifier.probabilities(given)
    pixels = torch.stack([backbone.preprocess(images[i]) for i in (0, 1, 1)])
    encoded = torch.nn.functional.normalize(backbone.encode_images(pixels), dim=-1)
    cosines = encoded @ hand_written(backbone, "a drawing of a {}.").T
    expected = (backbone.logit_scale * cosines).softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    best = expected.argsort(dim=-1, descending=True)[:, :2].tolist()
    assert [[name for name, _ in row] for row in classifier.predict(given, top=2)] == [
        [NAMES[i] for i in row] for row in best
    ]
    assert classifier.predict([]) == []

    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CoopError, match="load the backbone that it was learned on"):
        Classifier.load(tmp_path, device="cpu")


def test_a_classifier_for_other_names(tiny_backbone: Backbone, tmp_path: Path) -> None:
    Learned.of(learned("unified", tiny_backbone)).save(tmp_path / "learned.safetensors")
    classifier = Classifier.load(tmp_path, [" river", "abbey "], backbone=tiny_backbone)
    assert classifier.class_names == ("river", "abbey")
    for names in ([], ["river", ""], ["river", "river"]):
        with pytest.raises(CoopError, match="give different names, none empty"):
            Classifier.load(tmp_path, names, backbone=tiny_backbone)
    with pytest.raises(CoopError, match=r"cannot read the image .*missing\.png"):
        classifier.predict([tmp_path / "missing.png"])
    with pytest.raises(CoopError, match="top=0: give 1 or more"):
        classifier.predict([], top=0)


@pytest.mark.parametrize("name, said", [
    ("nothing/learned.safetensors", "No such file or directory; name a run's folder or a learned file"),
    (".", r"/learned\.safetensors: No such file or directory"),
    ("pipe", "a device or a pipe"),
    ("text.safetensors", "is not a safetensors file"),
    ("empty.safetensors", "is not a safetensors file"),
    ("cut.safetensors", "is not a safetensors file"),
    ("foreign.safetensors", "holds nothing that this toolkit learned"),
    ("damaged.safetensors", "is damaged: its description cannot be read"),
    ("lacking.safetensors", "is damaged: its description cannot be read"),
    ("method.safetensors", "unknown method 'coopp': did you mean 'coop'"),
])  # fmt: skip
def test_files_that_hold_nothing_learned(name: str, said: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    Learned.of(learned("unified", tiny_backbone)).save(good)
    with safe_open(good, "pt") as file:
        about = dict(file.metadata())
    (tmp_path / "text.safetensors").write_text("words")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-20])
    lacking = {key: value for key, value in about.items() if key != "classes"}
    for kind, metadata in (
        ("foreign", None),
        ("damaged", about | {"seed": "{"}),
        ("lacking", lacking),
        ("method", about | {"method": '"coopp"'}),
    ):
        save_file({"ctx": torch.zeros(3, 32)}, tmp_path / f"{kind}.safetensors", metadata=metadata)
    with pytest.raises(CoopError, match=said) as caught:
        load_learned(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"state": {"ctx": torch.zeros(3, 31)}}, {"state": {}},
    {"state": {"ctx": torch.zeros(3, 32), "more": torch.ones(1)}},
    {"options": {"n_ctx": "many"}}, {"options": {"n_ctx": 4}}, {"options": {"ctx_position": "top"}},
])  # fmt: skip
def test_contents_that_do_not_fit(change: dict[str, Any], tiny_backbone: Backbone) -> None:
    learned_file = dataclasses.replace(Learned.of(learned("unified", tiny_backbone)), **change)
    with pytest.raises(CoopError) as caught:
        learned_file.restore(tiny_backbone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [
    {"options": {"n_ctx": 10**9}}, {"options": "x"}, {"options": []}, {"options": {"n_ctx": None}}, {"method": []},
    {"method": None}, {"precision": float("inf")}, {"precision": "int4"}, {"classes": {"names": [1, 2]}},
    {"seed": "one"},
    {"classes": {"names": "abc", "template": "a {}", "dataset": ""}}, {"classes": None}, {"architecture": 3},
    {"seed": True}, {"weights": None}, {"options": {"ctx_init": ["a"]}}, {"options": {"ctx_position": {"a": 1}}},
])  # fmt: skip
def test_hostile_descriptions_are_refused_before_anything_is_built(
    metadata: dict[str, Any], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """A context of 10^9 vectors would take gigabytes; each of these is one sentence instead."""
    path = tmp_path / "learned.safetensors"
    Learned.of(learned("unified", tiny_backbone)).save(path)
    with safe_open(path, "pt") as file:
        description = dict(file.metadata())
    for key, value in metadata.items():
        old = json.loads(description[key])
        description[key] = json.dumps(old | value if isinstance(old, dict) and isinstance(value, dict) else value)
    save_file({"ctx": torch.zeros(3, 32)}, path, metadata=description)
    with pytest.raises(CoopError) as caught:
        load_method(path, backbone=tiny_backbone)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_equal_contents_are_equal_files(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Safetensors itself writes metadata in an order that differs from process to process."""
    path = tmp_path / "learned.safetensors"
    Learned.of(learned("unified", tiny_backbone)).save(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"]) and length % 8 == 0


def test_permissions_are_those_of_any_new_file(tiny_backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    Learned.of(learned("unified", tiny_backbone)).save(tmp_path / "learned.safetensors")
    assert (tmp_path / "learned.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_values_that_are_not_finite_are_not_saved(tiny_backbone: Backbone, tmp_path: Path) -> None:
    method = learned("unified", tiny_backbone)
    with torch.no_grad():
        method.learner.ctx[0, 0] = float("nan")
    with pytest.raises(CoopError, match="not finite"):
        Learned.of(method).save(tmp_path / "learned.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["unified", "class-specific"])
def test_a_classifier_of_a_prompt_learner(kind: str, tiny_backbone: Backbone) -> None:
    """Its logits are those of the class features that the learner gives."""
    learner = learned(kind, tiny_backbone).learner
    features = sample(tiny_backbone, shots=2, seed=3).test_view
    cosines = torch.nn.functional.normalize(features, dim=-1) @ learner.class_features().detach().T
    classifier = Classifier(learner)
    expected = tiny_backbone.logit_scale * cosines
    torch.testing.assert_close(classifier.method.logits(features), expected, rtol=1e-5, atol=1e-5)
    assert classifier.class_names == NAMES


def test_kinds_of_images(tmp_path: Path) -> None:
    """A file, a PIL image, an array and a tensor of the same pixels get the same probabilities."""
    backbone = small_backbone(FAMILIES["CLIP with GELU"])
    size = backbone.model.visual.image_size
    backbone.preprocess = lambda image: to_tensor(image.resize(size if isinstance(size, tuple) else (size, size)))
    classifier = Classifier(METHODS["zero_shot"](backbone, CLASSES, METHODS["zero_shot"].Options()))
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.save(tmp_path / "one.png")
    array = np.asarray(image)
    rows = classifier.probabilities([tmp_path / "one.png", image, array, torch.from_numpy(array.copy())])
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=1e-6)
    for wrong in (array.astype(np.float32), array[:, :, 0], array.transpose(2, 0, 1)):
        with pytest.raises(CoopError, match="give uint8"):
            classifier.probabilities([wrong])
    with pytest.raises(CoopError, match="give a list"):
        classifier.predict(str(tmp_path / "one.png"))


def test_one_bad_file_does_not_lose_the_others(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Folders and CSV files name images too."""
    backbone = small_backbone(FAMILIES["CLIP with GELU"])
    size = backbone.model.visual.image_size
    backbone.preprocess = lambda image: to_tensor(image.resize(size if isinstance(size, tuple) else (size, size)))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/b.jpg", "deep/er/c.PNG"):
        Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / name)
    (tmp_path / "deep" / "bad.png").write_bytes(b"no image")
    (tmp_path / "deep" / "notes.txt").write_text("words")
    (tmp_path / "list.csv").write_text("path,more\na.png,1\ndeep/bad.png,2\n")
    files = image_files([tmp_path / "deep", tmp_path / "list.csv"])
    assert [file.name for file in files] == ["b.jpg", "bad.png", "c.PNG", "a.png", "bad.png"]
    classifier = Classifier(METHODS["zero_shot"](backbone, CLASSES, METHODS["zero_shot"].Options()))
    found = list(classifier.predict_files(files, top=2))
    assert [bool(prediction.error) for prediction in found] == [False, True, False, False, True]
    good = [prediction for prediction in found if not prediction.error]
    assert [list(p.classes) for p in good] == [
        [(name, pytest.approx(value, abs=1e-5)) for name, value in row]
        for row in classifier.predict([p.image for p in good], top=2)
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.csv").write_text("file\na.png\n")
    for place in ("empty", "wrong.csv"):
        with pytest.raises(CoopError):
            image_files([tmp_path / place])
    os.mkfifo(tmp_path / "pipe.png")
    (error,) = [prediction.error for prediction in classifier.predict_files([tmp_path / "pipe.png"])]
    assert error and "a device or a pipe" in error
    with closed_folder("closed") as place, pytest.raises(PermissionError):
        image_files([place])
