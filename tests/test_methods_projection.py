"""ProLIP and the linear adapter against their equation: gradients, Adam spelled out, the search, and limits."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Resize, ToTensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.learned import Classifier
from coop.methods.base import Classes
from coop.methods.projection import FeatureMap, LinearAdapter, ProLip
from coop.options import LinearAdapterOptions, ProLipOptions
from tests.methods_plain import CLASSES, hand_written, sample
from tests.test_towers import backbone_of, random, small_clip

KINDS = [(ProLip, ProLipOptions), (LinearAdapter, LinearAdapterOptions)]


def logits(backbone: Backbone, kind: type[FeatureMap], a: Tensor, h: Tensor, text: Tensor) -> Tensor:
    """Return the plain logits: h A for the projection, h A^T for the adapter."""
    x = h @ (a if kind is ProLip else a.T)
    return backbone.logit_scale * F.normalize(x, dim=1) @ text.T


def start(backbone: Backbone, kind: type[FeatureMap]) -> Tensor:
    visual: Any = backbone.model.visual
    return visual.proj.detach().clone() if kind is ProLip else torch.eye(32)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_starts_as_the_model_itself(tiny_backbone: Backbone, kind: type[FeatureMap], options: Any) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    final = tiny_backbone.encode_images(images)
    reads = tiny_backbone.encode_pre_projection(images) if options.reads == "pre_projection" else final
    method = kind(tiny_backbone, CLASSES, options())
    zero_shot = tiny_backbone.logit_scale * F.normalize(final, dim=1) @ hand_written(tiny_backbone).T
    torch.testing.assert_close(method.logits(reads), zero_shot, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_trains_as_adam_on_its_equation(tiny_backbone: Backbone, kind: type[FeatureMap], options: Any) -> None:
    data = sample(tiny_backbone, shots=2, views=3)
    method = kind(tiny_backbone, CLASSES, options(lr=0.02, penalty=0.3, steps=5))
    notes = method.fit(data, data)

    a0, text = start(tiny_backbone, kind), hand_written(tiny_backbone)
    a = a0.clone().requires_grad_()
    m, v, losses = torch.zeros_like(a0), torch.zeros_like(a0), []
    for k, view in enumerate((1, 2, 0, 1, 2)):
        scores = logits(tiny_backbone, kind, a, data.views[view], text)
        loss = F.cross_entropy(scores, data.labels) + 0.3 * (a - a0).square().sum()
        (grad,) = torch.autograd.grad(loss, a)
        losses.append(loss.item())
        with torch.no_grad():
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            rate = 0.02 * (1 + math.cos(math.pi * k / 5)) / 2
            a -= rate * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-4)
    torch.testing.assert_close(method.state()["map"], a.detach(), rtol=1e-3, atol=1e-5)
    assert (notes["first_loss"], notes["last_loss"]) == pytest.approx((losses[0], losses[-1]), rel=1e-4)
    torch.testing.assert_close(
        method.logits(data.test_view),
        logits(tiny_backbone, kind, a.detach(), data.test_view, text),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_gradient_is_the_finite_difference(tiny_backbone: Backbone, kind: type[FeatureMap], options: Any) -> None:
    data, step = sample(tiny_backbone, shots=2), 1e-3
    method = kind(tiny_backbone, CLASSES, options())
    method.penalty = 2.0
    with torch.no_grad():
        method.map.add_(0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    method.loss(data.test_view, data.labels).backward()
    grad = method.map.grad
    assert grad is not None
    place = int(grad.abs().argmax())
    ends = []
    with torch.no_grad():
        for shift in (step, -2 * step):
            method.map.view(-1)[place] += shift
            ends.append(float(method.loss(data.test_view, data.labels)))
    assert float(grad.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)


@pytest.mark.slow
def test_the_search_is_brute_force_in_the_released_order(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, 2, 2, spread=3.0), sample(tiny_backbone, 20, seed=3, spread=3.0)
    method = LinearAdapter(tiny_backbone, CLASSES, LinearAdapterOptions(steps=3))
    notes = method.fit(train, val)
    grid = list(product([10.0**-p for p in range(2, 9)], [10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 0.0]))
    found = []
    for lr, penalty in grid:
        fixed = LinearAdapter(tiny_backbone, CLASSES, LinearAdapterOptions(steps=3, lr=lr, penalty=penalty))
        fixed.fit(train, val)
        found.append(float((fixed.logits(val.test_view).argmax(dim=1) == val.labels).double().mean()))
    assert len(set(found)) > 1
    best = found.index(max(found))
    assert (notes["lr"], notes["penalty"], notes["val_accuracy"]) == pytest.approx((*grid[best], found[best]))
    assert notes["settings_tried"] == 49
    again = LinearAdapter(
        tiny_backbone, CLASSES, LinearAdapterOptions(steps=3, lr=notes["lr"], penalty=notes["penalty"])
    )
    again.fit(train, val)
    assert torch.equal(again.state()["map"], method.state()["map"])


@pytest.mark.parametrize("shots", [1, 4])
def test_without_validation_lambda_is_one_over_shots(tiny_backbone: Backbone, shots: int) -> None:
    data, none = sample(tiny_backbone, shots, 2), sample(tiny_backbone, shots=0)
    notes = LinearAdapter(tiny_backbone, CLASSES, LinearAdapterOptions(steps=2)).fit(data, none)
    assert (notes["lr"], notes["penalty"]) == (1e-5, 1 / shots)
    assert not LinearAdapterOptions(lr=1e-3, penalty=0.0).uses_validation
    assert LinearAdapterOptions(lr=1e-3).uses_validation and LinearAdapterOptions(penalty=0.0).uses_validation


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_saves_loads_and_moves(tiny_backbone: Backbone, kind: type[FeatureMap], options: Any) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    method, again = (kind(tiny_backbone, CLASSES, options(lr=0.01, penalty=0.0, steps=3)) for _ in range(2))
    method.fit(data, data)
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    names = ("river", "abbey")
    text = hand_written(tiny_backbone, names=names)
    expected = logits(tiny_backbone, kind, method.state()["map"], data.test_view, text)
    torch.testing.assert_close(
        method.for_classes(Classes(names)).logits(data.test_view), expected, rtol=1e-4, atol=1e-4
    )


def test_predicts_from_images(tiny_backbone: Backbone) -> None:
    """A classifier computes what the method reads: features before the projection."""
    preprocess = Compose([Resize((16, 16)), ToTensor()])
    backbone = Backbone(tiny_backbone.model, preprocess, tiny_backbone.tokenizer, "tiny")
    method = ProLip(backbone, CLASSES, ProLipOptions(lr=0.01, penalty=0.0, steps=3))
    data = sample(backbone, shots=2, views=2)
    method.fit(data, data)
    pictures = [Image.effect_noise((20, 20), 90).convert("RGB") for _ in range(2)]
    h = backbone.encode_pre_projection(torch.stack([preprocess(picture) for picture in pictures]))
    expected = logits(backbone, ProLip, method.state()["map"], h, hand_written(backbone)).softmax(dim=1)
    torch.testing.assert_close(Classifier(method).probabilities(pictures), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", [{}, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}], ids=["ViT", "ResNet"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_merged_checkpoint(kind: type[FeatureMap], options: Any, vision: dict[str, Any]) -> None:
    """open_clip alone, with the merged weights, gives the method's logits."""
    model = small_clip(**vision).eval()
    backbone, size = backbone_of(model), 32 if vision else 16
    method = kind(backbone, CLASSES, options())
    with torch.no_grad():
        method.map.add_(0.05 * random(*method.map.shape))
    x = random(3, 3, size, size)
    logits = method.logits(getattr(backbone, f"encode_{'images' if options.reads == 'final' else options.reads}")(x))
    merged = small_clip(**vision).eval()
    merged.load_state_dict(method.merged_state())
    image = F.normalize(merged.encode_image(x), dim=-1)
    torch.testing.assert_close(logits, backbone.logit_scale * image @ hand_written(backbone).T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged.encode_image(x), model.encode_image(x), rtol=1e-3)


def test_refusals() -> None:
    with pytest.raises(CoopError, match="steps=0"):
        ProLipOptions(steps=0)
    with pytest.raises(CoopError, match="penalty=-1"):
        ProLipOptions(penalty=-1.0)
