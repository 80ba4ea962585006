"""KgCoOp and ProGrad against their papers' equations: losses and first gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.methods.base import Classes
from coop.methods.coop import CoOp
from coop.methods.regularised import KgCoOp, KgCoOpOptions, ProGrad, ProGradOptions
from tests.methods_plain import CLASSES, hand_written, leaf, sample, with_context

KINDS = {KgCoOp: KgCoOpOptions(epochs=2), ProGrad: ProGradOptions(epochs=2)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-mean_i log softmax(logits_i)[y_i]."""
    return -torch.stack([(row - row.exp().sum().log())[y] for row, y in zip(logits, labels, strict=True)]).mean()


def test_kgcoop(tiny_backbone: Backbone) -> None:
    method = KgCoOp(tiny_backbone, CLASSES, KgCoOpOptions(ctx_init=None, n_ctx=4, kg_weight=3.0))
    data, ctx = sample(tiny_backbone, shots=2), leaf(method.state()["ctx"])
    w, old = with_context(tiny_backbone, ctx), hand_written(tiny_backbone)
    f = F.normalize(data.test_view, dim=1)
    distance = (w - old).square().sum(dim=1).mean()  # the paper's, twice the released code's
    theirs = cross_entropy(tiny_backbone.logit_scale * f @ w.T, data.labels) + 3.0 * distance / 2
    ours = method.loss(data.test_view, data.labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(method.learner.ctx.grad, ctx.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_prograd(tiny_backbone: Backbone, strength: float, temperature: float) -> None:
    """Batches in which the two directions agree, and in which they do not."""
    options = ProGradOptions(ctx_init=None, n_ctx=4, prograd_lambda=strength, temperature=temperature)
    method = ProGrad(tiny_backbone, CLASSES, options)
    old, conflicts = hand_written(tiny_backbone), []
    for seed in range(6):
        data = sample(tiny_backbone, shots=1, seed=seed)
        f = F.normalize(data.test_view, dim=1)
        labels = data.labels if seed % 2 else (f @ old.T).argmin(dim=1)

        def gradient(general: bool, f: Tensor = f, labels: Tensor = labels) -> Tensor:
            ctx = leaf(method.state()["ctx"])
            logits = tiny_backbone.logit_scale * f @ with_context(tiny_backbone, ctx).T
            if general:
                p = (tiny_backbone.logit_scale * f @ old.T / temperature).softmax(dim=1)
                q = (logits / temperature).softmax(dim=1)
                loss = temperature**2 * (p * (p / q).log()).sum(dim=1).mean()
            else:
                loss = cross_entropy(logits, labels)
            loss.backward()
            assert ctx.grad is not None
            return ctx.grad

        g_d, g_g = gradient(general=False), gradient(general=True)
        cosine = F.cosine_similarity(g_d.flatten(), g_g.flatten(), dim=0)
        conflicts.append(bool(cosine < 0))
        direction = g_g / g_g.norm()
        expected = g_d - strength * (g_d * direction).sum() * direction if conflicts[-1] else g_d
        method.learner.ctx.grad = None
        loss = method.backward(data.test_view, labels)
        logits = tiny_backbone.logit_scale * f @ with_context(tiny_backbone, method.state()["ctx"]).T
        torch.testing.assert_close(loss, cross_entropy(logits, labels).detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.learner.ctx.grad, expected, rtol=1e-3, atol=1e-4)
    assert True in conflicts and False in conflicts


@pytest.mark.parametrize("kind", KINDS)
def test_saves_loads_and_moves(tiny_backbone: Backbone, kind: type[CoOp]) -> None:
    data = sample(tiny_backbone, shots=2)
    method, again = (kind(tiny_backbone, CLASSES, KINDS[kind]) for _ in range(2))
    notes = method.fit(data, data)
    assert notes["n_ctx"] == 4 and notes["steps"] == 2
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    others = Classes(("river", "abbey"))
    f = F.normalize(data.test_view, dim=1)
    theirs = tiny_backbone.logit_scale * f @ with_context(tiny_backbone, method.state()["ctx"], others.names).T
    torch.testing.assert_close(method.for_classes(others).logits(data.test_view), theirs, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(CoopError, match="kg_weight=-1"):
        KgCoOpOptions(kg_weight=-1.0)
    with pytest.raises(CoopError, match="temperature=0"):
        ProGradOptions(temperature=0.0)
    with pytest.raises(CoopError, match="prograd_lambda=-0.5"):
        ProGradOptions(prograd_lambda=-0.5)
