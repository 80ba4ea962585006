"""TaskRes against its equation, with Adam spelled out, and its released settings."""

import math

import pytest
import torch
import torch.nn.functional as F

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes
from coop.methods.task_residual import TaskRes, TaskResOptions
from coop.options import Augment
from tests.methods_plain import CLASSES, NAMES, encode, sample

PLAIN = Augment(views=0)


def raw_text(backbone: Backbone) -> torch.Tensor:
    """Return the features, not normalised, with the names as they stand."""
    with torch.no_grad():
        return encode(backbone, [CLASSES.template.format(name) for name in NAMES])


def test_trains_as_adam_with_l2_on_its_equation(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=2)
    options = TaskResOptions(epochs=4, lr=0.05, weight_decay=0.1, alpha=0.7, warmup_lr=0.01, augment=PLAIN)
    method = TaskRes(tiny_backbone, CLASSES, options)
    notes = method.fit(data, data)

    text, f = raw_text(tiny_backbone), F.normalize(data.test_view, dim=1)
    x = torch.zeros_like(text, requires_grad=True)
    m, v, losses = torch.zeros_like(text), torch.zeros_like(text), []
    rates = [0.01, *(0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(3))]
    for step, rate in enumerate(rates, 1):
        loss = F.cross_entropy(tiny_backbone.logit_scale * f @ F.normalize(text + 0.7 * x, dim=1).T, data.labels)
        (grad,) = torch.autograd.grad(loss, x)
        losses.append(loss.item())
        with torch.no_grad():
            grad = grad + 0.1 * x
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            x -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(method.state()["residual"], x.detach(), rtol=1e-3, atol=1e-5)
    assert (notes["first_loss"], notes["last_loss"]) == pytest.approx((losses[0], losses[-1]), rel=1e-4)
    expected = tiny_backbone.logit_scale * f @ F.normalize(text + 0.7 * x.detach(), dim=1).T
    torch.testing.assert_close(method.logits(data.test_view), expected, rtol=1e-4, atol=1e-4)


def test_first_gradient_is_the_finite_difference(tiny_backbone: Backbone) -> None:
    data, step = sample(tiny_backbone, shots=2), 1e-2
    method = TaskRes(tiny_backbone, CLASSES, TaskResOptions())
    method.loss(data.test_view, data.labels).backward()
    grad = method.residual.grad
    assert grad is not None
    largest = int(grad.abs().argmax())
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            method.residual.zero_().view(-1)[largest] = sign * step
            ends.append(float(method.loss(data.test_view, data.labels)))
    assert float(grad.view(-1)[largest]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wise_ft_mixes_class_weights(tiny_backbone: Backbone, share: float) -> None:
    data = sample(tiny_backbone, shots=2)
    given = {"epochs": 3, "lr": 0.05, "augment": PLAIN}
    plain, mixed = (TaskRes(tiny_backbone, CLASSES, TaskResOptions(**given, wise_ft=r)) for r in (None, share))
    plain.fit(data, data)
    mixed.fit(data, data)
    text = raw_text(tiny_backbone)
    weights = (1 - share) * (text + 0.5 * plain.state()["residual"]) + share * text
    f = F.normalize(data.test_view, dim=1)
    expected = tiny_backbone.logit_scale * f @ F.normalize(weights, dim=1).T
    torch.testing.assert_close(mixed.logits(data.test_view), expected, rtol=1e-4, atol=1e-4)


def test_answers_for_some_of_its_classes(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=2)
    method = TaskRes(tiny_backbone, CLASSES, TaskResOptions(epochs=2, augment=PLAIN))
    method.fit(data, data)
    all_logits = method.logits(data.test_view)
    some = method.for_classes(Classes(("abbey", "forest", "yin_yang")))
    assert torch.equal(some.logits(data.test_view), all_logits[:, [3, 0, 4]])
    assert torch.equal(some.for_classes(Classes(("yin_yang",))).logits(data.test_view), all_logits[:, [4]])
    with pytest.raises(CoopError, match="'river' is none of them"):
        method.for_classes(Classes(("abbey", "river")))


def test_released_settings_follow_shots_and_dataset() -> None:
    assert [TaskResOptions().resolved(shots, "dtd").epochs for shots in (1, 2, 4, 8, 16, "all")] == [100] * 3 + [
        200
    ] * 3
    assert TaskResOptions(epochs=7).resolved(1, "dtd").epochs == 7


@pytest.mark.parametrize("dataset", ["imagenet", "imagenet_a"])
def test_imagenet_has_eight_templates(tiny_backbone: Backbone, dataset: str) -> None:
    method = TaskRes(tiny_backbone, Classes(NAMES, "a photo of a {}.", dataset), TaskResOptions())
    templates = [
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.", "a photo of a {}.",
    ]  # fmt: skip
    with torch.no_grad():
        expected = torch.stack([encode(tiny_backbone, [t.format(name) for name in NAMES]) for t in templates]).mean(
            dim=0
        )
    torch.testing.assert_close(method.text, expected, rtol=1e-4, atol=1e-4)
    given = TaskRes(tiny_backbone, method.classes, TaskResOptions(template="a photo of a {}."))
    torch.testing.assert_close(given.text, raw_text(tiny_backbone), rtol=1e-4, atol=1e-4)


def test_a_new_view_in_every_epoch(tiny_backbone: Backbone) -> None:
    whole = sample(tiny_backbone, shots=2, views=3)
    data = Samples(whole.labels, whole.test_view, whole.views, fresh=True)
    method = TaskRes(tiny_backbone, CLASSES, TaskResOptions(epochs=3))
    for (inputs, labels), view in zip(method.batches(data), whole.views, strict=True):
        order = [int((view == row).all(dim=1).nonzero()[0]) for row in inputs]
        assert sorted(order) == list(range(len(whole)))
        assert torch.equal(labels, whole.labels[order])


def test_refusals() -> None:
    for wrong in (-0.1, 1.5):
        with pytest.raises(CoopError, match=f"wise_ft={wrong}"):
            TaskResOptions(wise_ft=wrong)
    with pytest.raises(CoopError, match="lr=-1"):
        TaskResOptions(lr=-1.0)
