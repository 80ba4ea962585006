"""The methods that train inside the towers: independent checks beside the recorded trajectories."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.learned import Classifier, Learned, load_method
from coop.methods import METHODS
from coop.methods.base import Classes
from coop.methods.zero_shot import ZeroShot
from coop.options import OPTIONS, ZeroShotOptions
from tests.small_towers import TOKENIZER
from tests.test_towers import random, small_clip

NAMES = ("forest", "annual crop land", "great white shark", "abbey", "yin_yang")
SETTINGS: dict[str, dict[str, Any]] = {
    "deep_text": {"epochs": 2, "depth": 2},
    "vpt": {"epochs": 2, "depth": 2, "n_ctx": 3},
    "ivlp": {"epochs": 2, "depth_text": 3, "depth_image": 2},
    "maple": {"epochs": 2, "depth": 2},
    "promptsrc": {"epochs": 3, "depth_text": 2, "depth_image": 2, "average_mean": 2.0, "average_deviation": 1.0},
    "tcp": {"epochs": 2, "layer": 1},
    "clip_lora": {"steps": 4, "place": "1-2", "weights": "qkvo"},
    "two_stage": {"steps": 6, "first_image_block": 1},
    "mma": {"epochs": 2, "first_layer": 0, "width": 4, "scale": 0.1},
    "mmrl": {"epochs": 2, "first_layer": 2, "token_width": 8, "n_tokens": 2},
}
PIXELS = [name for name in SETTINGS if OPTIONS[name].reads == "pixels"]


def backbone_of(model: Any) -> Backbone:
    steps = [transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()]
    normalise = transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return Backbone(model, transforms.Compose([*steps, normalise]), TOKENIZER)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of(small_clip())


CLASSES = Classes(NAMES)


def made(name: str, backbone: Backbone, classes: Classes = CLASSES, seed: int = 1, **options: Any) -> Any:
    settings = {"batch_size": 3, **SETTINGS[name], **options}
    if name in ("clip_lora", "two_stage") or "lr" in options:
        settings.setdefault("lr", 0.01)
    return METHODS[name](backbone, classes, OPTIONS[name](**settings), seed)


def pixels(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (*shape, 3, 16, 16), generator=generator, dtype=torch.uint8)


def sample(method: Any) -> Samples:
    """Return 10 images of 2 random views as the method reads them."""
    test_view, views = pixels(10), pixels(2, 10, seed=4)
    if method.options.reads == "final":
        encode, normalise = method.backbone.encode_images, method.backbone.normalise_pixels
        return Samples(
            torch.arange(10) % 5, encode(normalise(test_view)), torch.stack([encode(normalise(v)) for v in views])
        )
    return Samples(torch.arange(10) % 5, test_view, views)


def test_inputs(method: Any) -> Tensor:
    return sample(method).test_view[:]  # type: ignore[return-value]


test_inputs.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_fit_save_load(name: str, backbone: Backbone, tmp_path: Path) -> None:
    """The shared backbone stays as it is, what is learned comes back from a file, and moves to other classes."""
    before = backbone_of(backbone.model).identity
    method = made(name, backbone)
    data, inputs, start = sample(method), test_inputs(method), {k: v.clone() for k, v in method.state().items()}
    untrained = method.logits(inputs)
    fit = method.fit(data, data)
    logits = method.logits(inputs)
    assert backbone_of(backbone.model).identity == before
    assert fit["steps"] == {"clip_lora": 4, "two_stage": 6, "promptsrc": 9}.get(name, 6)
    assert all(not torch.equal(start[k], v) for k, v in method.state().items())
    assert not torch.equal(logits, untrained) and logits.isfinite().all()
    Learned.of(method).save(tmp_path / "learned.safetensors")
    again = load_method(tmp_path / "learned.safetensors", backbone=backbone)
    assert torch.equal(again.logits(inputs), logits)
    others = Classes(("pond", "abbey", "river"), dataset="dtd")
    moved, moved_again = method.for_classes(others), again.for_classes(others)
    assert moved.logits(inputs).shape == (10, 3)
    assert torch.equal(moved.logits(inputs), moved_again.logits(inputs))
    if name not in ("two_stage", "mmrl", "tcp"):  # a class that keeps its name keeps its logit
        torch.testing.assert_close(moved.logits(inputs)[:, 1], logits[:, 3], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIXELS)
def test_kept_rows_change_nothing(name: str, backbone: Backbone) -> None:
    states = []
    for kept_bytes in (2**30, 0):
        method = made(name, backbone)
        method.kept_bytes = kept_bytes
        method.fit(sample(method), sample(method))
        states.append(method.state())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


def zero_shot(backbone: Backbone, method: Any, inputs: Tensor) -> Tensor:
    features = inputs if method.options.reads == "final" else backbone.encode_images(backbone.normalise_pixels(inputs))
    return ZeroShot(backbone, Classes(NAMES), ZeroShotOptions()).logits(features)


def frozen_prefix(backbone: Backbone, count: int) -> list[Tensor]:
    """Return the frozen text tower's states of "a photo of a" at the input of each block, by open_clip's blocks."""
    ids = torch.tensor([backbone.vocabulary.close([*backbone.encode_words("a photo of a")[0]])])
    x = backbone.token_embedding[ids] + backbone.tower.positional_embedding[: ids.shape[1]]
    mask, states = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1), []
    for block in backbone.tower.transformer.resblocks:
        states.append(x[0, 1 : 1 + count])
        x = block(x, attn_mask=mask)
    return states


@pytest.mark.parametrize("name", ["deep_text", "tcp", "clip_lora", "two_stage", "mma"])
def test_without_a_change_a_method_is_zero_shot(name: str, backbone: Backbone) -> None:
    """Prompts that are what the frozen tower has there, and updates and adapters of zero, change no logit.

    Visual tokens and MMRL's have no such value: attention sees them.
    """
    method = made(name, backbone, **({"ctx_init": "a photo of a"} if name == "tcp" else {}))
    states = frozen_prefix(backbone, 4)
    with torch.no_grad():
        if name == "deep_text":
            method.text[1].copy_(states[1])
        if name == "tcp":
            method.meta_net["linear2"].weight.zero_()
            method.meta_net["linear2"].bias.copy_(states[1].flatten())
        if name == "mma":
            for key, parameter in method.parameters().items():
                if ".up." in key:
                    parameter.zero_()
    inputs = test_inputs(method)
    expected = zero_shot(backbone, method, inputs)
    torch.testing.assert_close(method.logits(inputs), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()) * 10)


@pytest.mark.slow
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("name", ["clip_lora", "two_stage"])
def test_merged_checkpoint(name: str, custom: bool) -> None:
    """open_clip alone, with the merged weights, gives the method's logits."""
    backbone = backbone_of(small_clip(custom))
    method = made(name, backbone)
    method.fit(sample(method), sample(method))
    others = method.for_classes(Classes(("pond", "river", "oak")))  # not the head of 2SFS
    model = small_clip(custom)
    model.load_state_dict(method.merged_state())
    inputs = test_inputs(method)
    image = F.normalize(model.eval().encode_image(backbone.normalise_pixels(inputs)), dim=-1)
    text = model.encode_text(backbone.tokenizer([f"a photo of a {n}." for n in others.classes.names]))
    expected = backbone.logit_scale * image @ F.normalize(text, dim=-1).T
    torch.testing.assert_close(others.logits(inputs), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETTINGS, "two_stage, stage 2"])
def test_gradients_against_finite_differences(name: str) -> None:
    """The directional derivative of each method's loss, in float64."""
    exact, rounded = backbone_of(small_clip(dtype=torch.float64)), backbone_of(small_clip())
    exact.encode_template = rounded.encode_template  # type: ignore[method-assign]
    exact.encode_texts = lambda texts: rounded.encode_texts(texts).double()  # type: ignore[method-assign]
    exact.encode_images = lambda images: rounded.encode_images(images).double()  # type: ignore[method-assign]
    method = made(name.split(",")[0], exact)
    if name.endswith("stage 2"):
        method.stage = 2
    if hasattr(method, "teacher"):
        method.teacher = method.teacher.double()
    parameters = method.trainable()
    for i, parameter in enumerate(parameters):
        noise = random(*parameter.shape, seed=i, dtype=torch.float64) * 0.05
        parameter.data = parameter.data.double() + noise
    inputs = random(4, 3, 16, 16, dtype=torch.float64)
    if method.options.reads == "final":
        inputs = exact.encode_images(inputs)
    labels = torch.tensor([0, 1, 2, 4])
    method.loss(inputs, labels).backward()
    direction = [random(*p.shape, seed=50 + i, dtype=torch.float64) for i, p in enumerate(parameters)]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(step * d)
            loss = method.loss(inputs, labels)
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(step * d)
        return loss

    h = 1e-6
    torch.testing.assert_close(torch.as_tensor(slope), (moved(h) - moved(-h)) / (2 * h), rtol=1e-5, atol=1e-6)


def test_selective_inference(backbone: Backbone) -> None:
    """2SFS keeps the head's rows, MMRL the mixture, for trained classes only."""
    both = Classes(("pond", "abbey", "river"))
    method = made("two_stage", backbone)
    method.fit(sample(method), sample(method))
    inputs = test_inputs(method)
    moved, text_only = method.for_classes(both), method.for_classes(Classes(("pond", "monastery", "river")))
    torch.testing.assert_close(moved.logits(inputs)[:, 1], method.logits(inputs)[:, 3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.logits(inputs)[:, 0], text_only.logits(inputs)[:, 0], rtol=1e-5, atol=1e-5)
    f = method.image_features(inputs)
    expected = backbone.logit_scale * f @ F.normalize(method.prompts(method.text_changes()), dim=-1).T
    assert not torch.allclose(method.logits(inputs), expected, atol=1e-3)  # the head is not the text

    method = made("mmrl", backbone)
    method.fit(sample(method), sample(method))
    moved = method.for_classes(both)
    f, g = method.both_features(inputs)
    t = moved.class_features()
    s, a = backbone.logit_scale, method.options.alpha
    expected = s * f @ t.T
    expected[:, 1] = a * expected[:, 1] + (1 - a) * (s * g @ t[1])
    torch.testing.assert_close(moved.logits(inputs), expected, rtol=1e-5, atol=1e-5)


def test_lora_dropout(backbone: Backbone) -> None:
    """The same masks in the forward and the recomputed pass; another seed, other noise; none at test."""
    first, second = made("clip_lora", backbone, dropout=0.5), made("clip_lora", backbone, dropout=0.5)
    for method in (first, second):
        for i, parameter in enumerate(method.trainable()):
            parameter.data = random(*parameter.shape, seed=i) * 0.1
    second.prompts.budget = 1
    inputs, labels = test_inputs(first), torch.arange(10) % 5
    losses = [method.backward(inputs, labels) for method in (first, second)]
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(first.trainable(), second.trainable(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first.backward(inputs, labels), losses[0])  # the next step draws other masks
    assert torch.equal(first.logits(inputs), second.logits(inputs))
    plain = made("clip_lora", backbone, dropout=0.0, share_prefix=False)
    plain.load_state(first.state())
    torch.testing.assert_close(plain.logits(inputs), first.logits(inputs), rtol=1e-5, atol=1e-4)


def test_lora_dropout_keeps_the_expectation(backbone: Backbone) -> None:
    """Kept entries are divided by their probability; those of q, k and v differ."""
    method = made("clip_lora", backbone, dropout=0.25)
    h, method.masks = torch.ones(4000, 32), {}
    dropped = {weight: method.dropout(("text", 1, weight))(h) for weight in "qkv"}
    for out in dropped.values():
        assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
        assert abs(float(out.mean()) - 1) < 0.01
    assert not torch.equal(dropped["q"], dropped["k"])


def test_only_one_tower(backbone: Backbone) -> None:
    """An update of one tower leaves the other's features frozen."""
    for tower in ("text", "image"):
        method = made("clip_lora", backbone, towers=tower)
        assert {name.split(".")[0] for name in method.parameters()} == {tower}
        method.fit(sample(method), sample(method))
        inputs = test_inputs(method)
        if tower == "text":
            frozen = backbone.encode_images(backbone.normalise_pixels(inputs))
            torch.testing.assert_close(method.image_features(inputs), F.normalize(frozen, dim=-1))
        else:
            text = F.normalize(backbone.encode_template("a photo of a {}.", NAMES), dim=-1)
            torch.testing.assert_close(method.class_features(), text, rtol=1e-5, atol=1e-5)


def test_promptsrc_average(backbone: Backbone) -> None:
    """The result is the Gaussian average of the epochs' ends; the released choice is one of 50 epochs, by dataset."""
    method = made("promptsrc", backbone)
    density = torch.tensor([torch.e ** (-((i - 2) ** 2) / 2) for i in (1, 2, 3)], dtype=torch.float64)
    torch.testing.assert_close(method.weights, density / density.sum())
    ends: list[dict[str, Tensor]] = []
    add = method.after_epoch

    def watched(epoch: int, val: Samples) -> None:
        ends.append({k: v.clone() for k, v in method.state().items()})
        add(epoch, val)

    method.after_epoch = watched
    method.fit(sample(method), sample(method))
    for name, value in method.state().items():
        expected = sum(float(w) * end[name] for w, end in zip(method.weights, ends, strict=True))
        torch.testing.assert_close(value, expected)
    released = {"epochs": 50, "average": "released_per_dataset"}
    early, late = (made("promptsrc", backbone, Classes(NAMES, dataset=d), **released) for d in ("ucf101", "dtd"))
    assert int(early.weights.argmax()) == 29 and int(late.weights.argmax()) == 44
    with pytest.raises(CoopError):
        made("promptsrc", backbone, Classes(NAMES, dataset="folder"), **released)
    assert late.for_classes(Classes(NAMES, dataset="folder")).logits(test_inputs(late)).shape == (10, 5)


def test_mmrl_released_settings(backbone: Backbone) -> None:
    method = made("mmrl", backbone, Classes(NAMES, dataset="eurosat"), setting="released_per_dataset")
    assert method.weight == 0.01 and method.tokens.shape == (2, 2048)
    with pytest.raises(CoopError):
        made("mmrl", backbone, setting="released_per_dataset")


def test_steps_follow_the_shots(backbone: Backbone) -> None:
    assert OPTIONS["clip_lora"]().resolved(4, "dtd").steps == 2000
    assert OPTIONS["two_stage"]().resolved("all", "dtd").steps is None
    assert [OPTIONS["tcp"]().resolved(16, d).epochs for d in ("imagenet", "dtd")] == [25, 50]
    method = made("clip_lora", backbone, steps=None, steps_per_shot=3)
    assert method.fit(sample(method), sample(method))["steps"] == 6  # two images of each class
    method = made("two_stage", backbone, steps=None, steps_per_shot=5, fraction=0.3)
    assert method.fit(sample(method), sample(method))["steps"] == 10


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deep_text", {"depth": 4}),
        ("vpt", {"depth": 4}),
        ("ivlp", {"depth_image": 4}),
        ("maple", {"depth": 4}),
        ("promptsrc", {"depth_text": 4}),
        ("tcp", {"layer": 3}),
        ("tcp", {"prompt_template": "a {} photo"}),
        ("tcp", {"ctx_init": "a photo"}),
        ("clip_lora", {"place": "up"}),
        ("clip_lora", {"place": "1-3"}),
        ("clip_lora", {"template": "imagenet7"}),
        ("two_stage", {"first_text_block": 3}),
        ("mma", {"last_layer": 4}),
        ("mmrl", {"first_layer": 4}),
        ("mmrl", {"last_layer": 9}),
    ],
)
def test_what_the_tower_does_not_have_is_refused(name: str, options: dict[str, Any], backbone: Backbone) -> None:
    with pytest.raises(CoopError):
        made(name, backbone, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vpt", {"n_ctx": 0}),
        ("ivlp", {"depth_text": 0}),
        ("promptsrc", {"average": "mean"}),
        ("promptsrc", {"average_deviation": 0.0}),
        ("tcp", {"eps": 0.0}),
        ("clip_lora", {"dropout": 1.0}),
        ("clip_lora", {"weights": "qq"}),
        ("clip_lora", {"place": "5-2"}),
        ("clip_lora", {"towers": "vision"}),
        ("two_stage", {"fraction": 1.5}),
        ("mma", {"scale": 0.0}),
        ("mmrl", {"alpha": 2.0}),
        ("mmrl", {"setting": "best"}),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(CoopError):
        OPTIONS[name](**options)


@pytest.mark.parametrize("name", PIXELS)
def test_a_resnet_has_no_visual_tokens(name: str) -> None:
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    backbone = backbone_of(small_clip(**resnet))
    with pytest.raises(CoopError):
        made(name, backbone)


@pytest.mark.parametrize("name", ["deep_text", "ivlp", "promptsrc", "tcp", "vpt"])
def test_a_depth_beyond_the_tower_is_told_what_to_give(name: str, backbone: Backbone) -> None:
    """What the message names is accepted: defaults are for towers of 12 blocks, and this one has 3."""
    given: dict[str, Any] = {}
    towers = 1 if name in ("deep_text", "tcp", "vpt") else 2
    for _ in range(towers):
        with pytest.raises(CoopError, match="beyond the (text|image) tower: give") as caught:
            METHODS[name](backbone, CLASSES, OPTIONS[name](**given))
        key, value = re.findall(r"give (\w+)=(\d+)", str(caught.value))[0]
        given[key] = int(value)
    METHODS[name](backbone, CLASSES, OPTIONS[name](**given))
    assert len(given) == towers


@pytest.mark.parametrize("name", ["deep_text", "tcp"])
def test_text_methods_work_on_a_resnet(name: str) -> None:
    backbone = backbone_of(small_clip(layers=[1, 1, 1, 1], width=8, image_size=32))
    method = made(name, backbone)
    features = random(10, 24)
    data = Samples(torch.arange(10) % 5, features, features.new_empty(0, 10, 24))
    method.fit(data, data)
    assert method.logits(features).shape == (10, 5)


@pytest.mark.parametrize("name", ["maple", "tcp"])
def test_prediction_of_images(name: str, backbone: Backbone) -> None:
    """`Classifier` gives the method what it reads of an image."""
    method = made(name, backbone)
    image = Image.fromarray(pixels(1)[0].permute(1, 2, 0).numpy())
    expected = method.logits(test_inputs(method)[:1]).softmax(dim=-1)
    torch.testing.assert_close(Classifier(method).probabilities([image]), expected, rtol=1e-4, atol=1e-6)


def test_two_runs_share_a_backbone(backbone: Backbone) -> None:
    """A run in between changes nothing in what another gives."""
    alone = made("maple", backbone)
    alone.fit(sample(alone), sample(alone))
    first, between = made("maple", backbone), made("mma", backbone)
    between.fit(sample(between), sample(between))
    first.fit(sample(first), sample(first))
    assert torch.equal(first.logits(test_inputs(first)), alone.logits(test_inputs(alone)))
    other = made("maple", backbone, seed=2)
    assert not torch.equal(other.state()["text.1"], made("maple", backbone).state()["text.1"])
