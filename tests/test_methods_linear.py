"""LP++, CLAP and the cross-modal probe against their equations, spelled out in plain torch."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes
from coop.methods.class_weights import ClassWeightsMethod
from coop.methods.linear import Clap, CrossModal, LpPlusPlus
from coop.options import Augment, ClapOptions, CrossModalOptions, LpPlusPlusOptions
from tests.methods_plain import CLASSES, NAMES, encode, hand_written, leaf, sample


def part_of(data: Samples, kept: Tensor) -> Samples:
    return Samples(data.labels[kept], data.test_view[kept], data.views[:, kept])


def nothing(backbone: Backbone) -> Samples:
    return sample(backbone, shots=0)


def correct(logits: Tensor, data: Samples) -> float:
    return float((logits.argmax(dim=1) == data.labels).double().mean())


# LP++


def plain_lp_plus_plus(
    backbone: Backbone, data: Samples, bias: Tensor, steps: int, every: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return W, b, alpha after every step, by closed-form gradients: dL/dlogits = (softmax - one hot) / n."""
    f, t = F.normalize(data.views[0], dim=1), hand_written(backbone)
    n, hot, cosines = len(f), F.one_hot(data.labels, len(NAMES)).float(), f @ t.T
    w = torch.stack([f[data.labels == c].sum(dim=0) for c in range(len(NAMES))])
    first = torch.stack([cosines[data.labels == c, c].mean() for c in range(len(NAMES)) if (data.labels == c).any()])
    alpha, b = 250 * first.mean() * torch.ones(len(NAMES)), bias.clone()
    lr = 4 * n / float(torch.linalg.eigvalsh(f.double().T @ f.double()).max())
    lr_alpha = n / (4 * float(cosines.square().sum(dim=0).max()))
    m_w, m_b, summed, path = torch.zeros_like(w), torch.zeros_like(b), torch.zeros_like(alpha), []
    for k in range(steps):
        error = ((f @ w.T + b + alpha * cosines).softmax(dim=1) - hot) / n
        summed = summed + (error * cosines).sum(dim=0)
        m_w, m_b = 0.9 * m_w + error.T @ f, 0.9 * m_b + error.sum(dim=0)
        w, b = w - lr * m_w, b - lr * m_b
        if (k + 1) % every == 0:
            alpha = alpha - lr_alpha * summed
        path.append((w, b, alpha))
    return path


@pytest.mark.parametrize("missing", [None, 2])
def test_lp_plus_plus_follows_its_equations(tiny_backbone: Backbone, missing: int | None) -> None:
    whole = sample(tiny_backbone, shots=3, views=1, spread=2.0)
    kept = (whole.labels != (-1 if missing is None else missing)) & (torch.arange(len(whole)) != 1)
    data, val = part_of(whole, kept), sample(tiny_backbone, 20, seed=3, spread=3.0)
    options = LpPlusPlusOptions(steps=25, alpha_every=4)
    method, last = (LpPlusPlus(tiny_backbone, CLASSES, options) for _ in range(2))
    bias = last.state()["bias"].clone()
    assert 0 < bias.abs().max() <= 32**-0.5
    path = plain_lp_plus_plus(tiny_backbone, data, bias, steps=25, every=4)
    last.fit(data, nothing(tiny_backbone))
    for ours, theirs in zip((last.weight, last.bias, last.alpha), path[-1], strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4)

    notes = method.fit(data, val)
    f, t = F.normalize(val.test_view, dim=1), hand_written(tiny_backbone)
    found = [correct(f @ w.T + b + alpha * (f @ t.T), val) for w, b, alpha in path]
    best = max(range(25), key=lambda k: (found[k], k))
    assert len(set(found)) > 1
    assert (notes["step"], notes["val_accuracy"]) == (best + 1, pytest.approx(found[best]))
    torch.testing.assert_close(method.alpha.detach(), path[best][2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.weight.detach(), path[best][0], rtol=1e-3, atol=1e-4)


def test_lp_plus_plus_refuses_what_it_cannot_use() -> None:
    for views in (2, "epochs", "mirror"):
        with pytest.raises(CoopError, match=f"augment.views={views}"):
            LpPlusPlusOptions(augment=Augment(views=views))
    with pytest.raises(CoopError, match="alpha_every=0"):
        LpPlusPlusOptions(alpha_every=0)


# CLAP


@pytest.mark.parametrize("constraint", [True, False])
def test_clap(tiny_backbone: Backbone, constraint: bool) -> None:
    options = ClapOptions(epochs=1, constraint=constraint, warmup_epochs=0)
    method, data = Clap(tiny_backbone, CLASSES, options), sample(tiny_backbone, shots=2, views=3)
    t = encode(tiny_backbone, [CLASSES.template.format(name) for name in NAMES]).detach()
    zero_shot = tiny_backbone.logit_scale * F.normalize(t, dim=1).T
    strength = torch.zeros(len(NAMES))
    for c in range(len(NAMES)):
        own = torch.cat([view[data.labels == c] for view in data.views])
        strength[c] = constraint * (F.normalize(own, dim=1) @ zero_shot).softmax(dim=1)[:, c].mean()
    torch.testing.assert_close(
        method.logits(data.test_view), F.normalize(data.test_view, dim=1) @ zero_shot, rtol=1e-4, atol=1e-4
    )
    method.fit(data, data)  # one step, so that the weights are no longer t
    torch.testing.assert_close(method.strength, strength, rtol=1e-4, atol=1e-5)
    w = leaf(method.state()["weights"])
    assert (w - t).norm() > 1e-3
    logits = tiny_backbone.logit_scale * F.normalize(data.test_view, dim=1) @ F.normalize(w, dim=1).T
    theirs = F.cross_entropy(logits, data.labels) + (strength * (w - t).square().sum(dim=1)).sum() / len(NAMES)
    method.weights.grad = None
    ours = method.loss(data.test_view, data.labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(method.weights.grad, w.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "per_epoch", "rows"), [(4, 2, 4), (10, 1, 10), (25, 1, 25), (64, 1, 30)])
def test_clap_draws_from_all_views(tiny_backbone: Backbone, batch_size: int, per_epoch: int, rows: int) -> None:
    data = sample(tiny_backbone, shots=2, views=3)
    method = Clap(tiny_backbone, CLASSES, ClapOptions(epochs=6, batch_size=batch_size))
    batches = list(method.batches(data))
    assert [len(labels) for _, labels in batches] == [rows] * 6 * per_epoch == [rows] * len(method.rates(per_epoch))
    assert method.steps_per_epoch(data) == per_epoch
    seen = set()
    for epoch in range(6):
        drawn = []
        for inputs, labels in batches[epoch * per_epoch : (epoch + 1) * per_epoch]:
            places = (data.views[:, :, None] == inputs).all(dim=-1).nonzero()
            assert torch.equal(data.labels[places[:, 1]].sort().values, labels.sort().values)
            drawn += [(view, item) for view, item, _ in places.tolist()]
        assert len(set(drawn)) == len(drawn) == rows * per_epoch
        seen |= set(drawn)
    assert {view for view, _ in seen} == {0, 1, 2}


# The cross-modal probe


def test_cross_modal_trains_as_adamw_on_its_equation(tiny_backbone: Backbone) -> None:
    """Closed-form gradient s (softmax - one hot)^T z / B, decoupled decay, linear warm-up and a cosine by step."""
    data = sample(tiny_backbone, shots=2, views=2)
    options = CrossModalOptions(lr=0.01, weight_decay=0.1, batch_size=8, steps=9, warmup_steps=3)
    method = CrossModal(tiny_backbone, CLASSES, options)
    w = hand_written(tiny_backbone).clone()
    torch.testing.assert_close(method.weight.detach(), w, rtol=1e-4, atol=1e-5)
    method.fit(data, nothing(tiny_backbone))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    rates = [1e-5, 0.01 / 3, 0.02 / 3, *(0.01 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(6))]
    for step, (rate, (x, y)) in enumerate(zip(rates, method.batches(data), strict=True), 1):
        z = F.normalize(x, dim=1)
        error = (tiny_backbone.logit_scale * z @ w.T).softmax(dim=1) - F.one_hot(y, len(NAMES))
        grad = tiny_backbone.logit_scale * error.T @ z / len(y)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        w = w * (1 - rate * 0.1) - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(method.state()["weight"], w, rtol=1e-3, atol=1e-5)
    expected = tiny_backbone.logit_scale * F.normalize(data.test_view, dim=1) @ w.T
    torch.testing.assert_close(method.logits(data.test_view), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("texts", [True, False])
def test_cross_modal_batches_are_half_images_half_prompts(tiny_backbone: Backbone, texts: bool) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    options = CrossModalOptions(lr=0.01, weight_decay=0.0, batch_size=8, steps=20, texts=texts)
    method = CrossModal(tiny_backbone, CLASSES, options)
    method.fit(data, nothing(tiny_backbone))
    images, per_pass = 4 if texts else 8, 5 if texts else 2  # 20 views of images
    rows = []
    for inputs, labels in method.batches(data):
        assert len(inputs) == 8
        places = (data.views[:, :, None] == inputs[:images]).all(dim=-1).nonzero()
        assert torch.equal(data.labels[places[:, 1]], labels[places[:, 2]])
        rows.append({(view, item) for view, item, _ in places.tolist()})
        for prompt, label in zip(inputs[images:], labels[images:], strict=True):
            found = (method.prompts == prompt).all(dim=1).nonzero()
            assert method.prompt_labels[int(found[0])] == label
        assert len(set(labels[images:].tolist())) == 8 - images  # 4 of the 5 prompts
    for first in range(0, 20 - per_pass, per_pass):
        whole = rows[first : first + per_pass]
        assert len(set().union(*whole)) == sum(len(part) for part in whole) == images * per_pass


def test_cross_modal_keeps_the_first_best_step_of_the_first_best_setting(tiny_backbone: Backbone) -> None:
    data, val = sample(tiny_backbone, 4, 2, spread=3.0), sample(tiny_backbone, 30, seed=5, spread=3.0)
    method = CrossModal(tiny_backbone, CLASSES, CrossModalOptions(steps=60, warmup_steps=2, eval_every=25))
    notes = method.fit(data, val)
    tried = []
    for lr in (1e-3, 1e-4):
        for weight_decay in (0.0, 1e-2, 1e-4):  # a batch of 32 has 16 prompts, and there are 5
            for steps in (1, 26, 51):
                one = {"lr": lr, "weight_decay": weight_decay, "batch_size": 8}
                probe = CrossModal(tiny_backbone, CLASSES, CrossModalOptions(steps=60, warmup_steps=2, **one))
                rates = probe.rates
                probe.rates = lambda per, r=rates, s=steps: r(per)[:s]  # type: ignore[method-assign, misc]
                batches = probe.batches
                probe.batches = lambda d, b=batches, s=steps: iter(list(b(d))[:s])  # type: ignore[method-assign, misc]
                probe.fit(data, nothing(tiny_backbone))
                tried.append((correct(probe.logits(val.test_view), val), one, steps, probe.state()["weight"].clone()))
    found, one, steps, weight = max(tried, key=lambda row: row[0])
    assert len({row[0] for row in tried}) > 1
    assert (notes["val_accuracy"], notes["step"], notes["settings_tried"]) == (pytest.approx(found), steps, 18)
    assert {key: notes[key] for key in one} == one
    torch.testing.assert_close(method.state()["weight"], weight)


@pytest.mark.parametrize(
    ("classes", "texts", "sizes"), [(5, True, [8]), (5, False, [8]), (3, True, [4]), (2, False, [7])]
)
def test_cross_modal_batch_sizes_fit(tiny_backbone: Backbone, classes: int, texts: bool, sizes: list[int]) -> None:
    whole = sample(tiny_backbone, shots=2, views=2)
    data = part_of(whole, whole.labels < classes)
    method = CrossModal(tiny_backbone, Classes(NAMES[:classes]), CrossModalOptions(texts=texts))
    assert sorted({setting.batch_size for setting in method.settings(data)}) == sizes


def test_cross_modal_takes_every_sentence_of_a_class(tiny_backbone: Backbone, tmp_path: Path) -> None:
    sentences = {name: [f"a {name}.", f"the {name} there."][: 1 + i % 2] for i, name in enumerate(NAMES)}
    (tmp_path / "prompts.json").write_text(json.dumps(sentences))
    options = CrossModalOptions(template=f"file:{tmp_path / 'prompts.json'}")
    method = CrossModal(tiny_backbone, CLASSES, options)
    expected = encode(tiny_backbone, [text for name in NAMES for text in sentences[name]]).detach()
    torch.testing.assert_close(method.prompts, expected, rtol=1e-4, atol=1e-4)
    assert method.prompt_labels.tolist() == [0, 1, 1, 2, 3, 3, 4]
    means = torch.stack([expected[method.prompt_labels == c].mean(dim=0) for c in range(5)])
    torch.testing.assert_close(method.weight.detach(), F.normalize(means, dim=1), rtol=1e-4, atol=1e-4)


def test_cross_modal_refusals(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    with pytest.raises(CoopError, match="give all three"):
        CrossModal(tiny_backbone, CLASSES, CrossModalOptions()).fit(data, nothing(tiny_backbone))
    with pytest.raises(CoopError, match="batch_size of 32 .* 20 views of images and 5 prompts: give 8 or less"):
        CrossModal(tiny_backbone, CLASSES, CrossModalOptions(batch_size=32)).fit(data, data)
    with pytest.raises(CoopError, match="even number"):
        CrossModalOptions(batch_size=9)
    assert CrossModalOptions(batch_size=9, texts=False).batch_size == 9


# WiSE-FT, and what is saved


SMALL = [
    (LpPlusPlus, LpPlusPlusOptions, {"steps": 12}),
    (Clap, ClapOptions, {"epochs": 3}),
    (CrossModal, CrossModalOptions, {"steps": 3, "warmup_steps": 0, "lr": 0.01, "weight_decay": 0.0, "batch_size": 4}),
]


@pytest.mark.parametrize(("kind", "options", "given"), SMALL)
def test_wise_ft(tiny_backbone: Backbone, kind: type[ClassWeightsMethod], options: type, given: dict[str, int]) -> None:
    """With 1 the zero-shot logits, with 0 the trained ones; where logits are linear in the weights, their mixture."""
    data = sample(tiny_backbone, shots=2, views=1)
    logits = {}
    for share in (None, 0.0, 0.4, 1.0):
        method = kind(tiny_backbone, CLASSES, options(**given, wise_ft=share))
        method.fit(data, data)
        logits[share] = method.logits(data.test_view)
    t = encode(tiny_backbone, [CLASSES.template.format(n if kind is Clap else n.replace("_", " ")) for n in NAMES])
    zero_shot = tiny_backbone.logit_scale * F.normalize(data.test_view, dim=1) @ F.normalize(t.detach(), dim=1).T
    torch.testing.assert_close(logits[1.0], zero_shot, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logits[0.0], logits[None])
    assert (logits[1.0] - logits[0.0]).abs().max() > 0.1
    if kind is not Clap:
        torch.testing.assert_close(logits[0.4], 0.6 * logits[0.0] + 0.4 * zero_shot, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "options", "given"), SMALL)
def test_saves_loads_and_answers_for_some_classes(
    tiny_backbone: Backbone, kind: type[ClassWeightsMethod], options: type, given: dict[str, int]
) -> None:
    data = sample(tiny_backbone, shots=2, views=1)
    method, again = (kind(tiny_backbone, CLASSES, options(**given), seed) for seed in (1, 2))
    method.fit(data, data)
    again.load_state(method.state())
    expected = method.logits(data.test_view)
    assert torch.equal(again.logits(data.test_view), expected)
    some = again.for_classes(Classes(("yin_yang", "forest")))
    assert torch.equal(some.logits(data.test_view), expected[:, [4, 0]])
    with pytest.raises(CoopError, match="cannot be moved to other classes"):
        method.for_classes(Classes(("river",)))
