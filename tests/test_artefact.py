"""What a run learned, on disk: it comes back as it was, and only onto the backbone that it belongs to."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coop.clip.backbone import Backbone, load_backbone
from coop.errors import CoopError
from coop.learned import Classifier, Learned, load_learned, load_method
from coop.methods import METHODS
from coop.methods.base import Classes, Method
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
    assert about["options"]["n_ctx"] == 3 and about["options"]["augment"] == {"views": 10}


def test_moved_to_new_classes(tiny_backbone: Backbone) -> None:
    """A template and a unified context stand before any name; the features are those of the plain computation."""
    names = ("river", "abbey", "old bridge")
    zero_shot = learned("zero_shot", tiny_backbone).for_classes(Classes(names))
    template = hand_written(tiny_backbone, "a drawing of a {}.", names)
    torch.testing.assert_close(zero_shot.class_features, template, rtol=1e-4, atol=1e-5)
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
    ("nothing/learned.safetensors", "there is no learned.safetensors here; name a run's folder or a learned file"),
    (".", "there is no learned.safetensors here"),
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
    artefact = dataclasses.replace(Learned.of(learned("unified", tiny_backbone)), **change)
    with pytest.raises(CoopError) as caught:
        artefact.restore(tiny_backbone)
    assert "\n" not in str(caught.value)
