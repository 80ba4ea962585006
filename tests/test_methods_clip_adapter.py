"""CLIP-Adapter against the paper's equations in plain tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.methods.base import Classes
from coop.methods.clip_adapter import RATIOS, ClipAdapter
from coop.options import ADAPTER_BRANCHES, ClipAdapterOptions
from tests.methods_plain import CLASSES, hand_written, leaf, sample


def plain(backbone: Backbone, state: dict[str, Tensor], features: Tensor, ratio: float | Tensor) -> Tensor:
    """f* = r A_v(f) + (1 - r) f, W* = r A_t(W) + (1 - r) W, with A(x) = relu(relu(x W_1) W_2)."""

    def mixed(branch: str, x: Tensor) -> Tensor:
        if f"{branch}.up.weight" not in state:
            return x
        adapted = torch.relu(torch.relu(x @ state[f"{branch}.down.weight"].T) @ state[f"{branch}.up.weight"].T)
        return ratio * adapted + (1 - ratio) * x

    f, w = mixed("visual", features), mixed("text", hand_written(backbone))
    f, w = f / f.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    return backbone.logit_scale * f @ w.T


@pytest.mark.parametrize(("branch", "reduction"), [("visual", 4), ("text", 4), ("both", 4), ("both", 1), ("both", 16)])
def test_logits_and_first_gradient(tiny_backbone: Backbone, branch: str, reduction: int) -> None:
    assert branch in ADAPTER_BRANCHES
    options = ClipAdapterOptions(epochs=0, branch=branch, ratio=0.3, reduction=reduction)
    method = ClipAdapter(tiny_backbone, CLASSES, options)
    data = sample(tiny_backbone, shots=2)
    state = {name: leaf(tensor) for name, tensor in method.state().items()}
    assert {tuple(t.shape) for name, t in state.items() if name.endswith("down.weight")} == {(32 // reduction, 32)}
    theirs = plain(tiny_backbone, state, data.test_view, 0.3)
    torch.testing.assert_close(method.logits(data.test_view), theirs.detach(), rtol=1e-4, atol=1e-4)
    F.cross_entropy(theirs, data.labels).backward()
    method.loss(data.test_view, data.labels).backward()
    for name, parameter in method.parameters().items():
        if name != "ratio":
            torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_learned_ratio_starts_at_a_fifth_and_is_trained(tiny_backbone: Backbone) -> None:
    method = ClipAdapter(tiny_backbone, CLASSES, ClipAdapterOptions(epochs=3, ratio="learned", lr=0.1))
    data = sample(tiny_backbone, shots=2)
    state = {name: leaf(tensor) for name, tensor in method.state().items()}
    ratio = torch.sigmoid(state["ratio"])
    assert ratio.item() == pytest.approx(0.2)
    F.cross_entropy(plain(tiny_backbone, state, data.test_view, ratio), data.labels).backward()
    method.loss(data.test_view, data.labels).backward()
    torch.testing.assert_close(method.parameters()["ratio"].grad, state["ratio"].grad, rtol=1e-3, atol=1e-6)
    assert method.fit(data, data)["ratio"] != pytest.approx(0.2)


def test_a_searched_ratio_is_the_first_best_of_separate_trainings(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, shots=2, seed=1, spread=2.0), sample(tiny_backbone, shots=8, seed=2, spread=2.0)
    method = ClipAdapter(tiny_backbone, CLASSES, ClipAdapterOptions(epochs=20, lr=0.3, ratio="search"))
    notes = method.fit(train, val)
    accuracies, logits = [], []
    for ratio in RATIOS:
        alone = ClipAdapter(tiny_backbone, CLASSES, ClipAdapterOptions(epochs=20, lr=0.3, ratio=ratio))
        alone.fit(train, val)
        logits.append(alone.logits(val.test_view))
        accuracies.append(float((logits[-1].argmax(dim=1) == val.labels).float().mean()))
    assert len(set(accuracies)) > 1
    best = accuracies.index(max(accuracies))
    assert list(notes["val_accuracy_by_ratio"].values()) == pytest.approx(accuracies)
    assert notes["ratio"] == pytest.approx(RATIOS[best])
    torch.testing.assert_close(method.logits(val.test_view), logits[best])


def test_ratio_zero_is_zero_shot(tiny_backbone: Backbone) -> None:
    method = ClipAdapter(tiny_backbone, CLASSES, ClipAdapterOptions(epochs=1, branch="both", ratio=0))
    data = sample(tiny_backbone, shots=2)
    method.fit(data, data)
    zero_shot = tiny_backbone.logit_scale * F.normalize(data.test_view, dim=1) @ hand_written(tiny_backbone).T
    torch.testing.assert_close(method.logits(data.test_view), zero_shot, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.2, "search", "learned"])
def test_saves_loads_and_moves(tiny_backbone: Backbone, ratio: float | str) -> None:
    options = ClipAdapterOptions(epochs=2, lr=0.1, branch="both", ratio=ratio)
    data = sample(tiny_backbone, shots=2)
    method, again = (ClipAdapter(tiny_backbone, CLASSES, options) for _ in range(2))
    method.fit(data, data)
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    moved = method.for_classes(Classes(("abbey", "river"))).logits(data.test_view)
    whole = method.logits(data.test_view)
    torch.testing.assert_close(moved[:, 0], whole[:, CLASSES.names.index("abbey")], rtol=1e-4, atol=1e-4)


def test_refusals(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="unknown branch 'vision'"):
        ClipAdapterOptions(branch="vision")
    for ratio in (1.5, -0.1, "find"):
        with pytest.raises(CoopError, match="from 0 to 1, 'search' or 'learned'"):
            ClipAdapterOptions(ratio=ratio)
    data = sample(tiny_backbone, shots=1)
    method = ClipAdapter(tiny_backbone, CLASSES, ClipAdapterOptions(epochs=1, ratio="search"))
    with pytest.raises(CoopError, match="validation images"):
        method.fit(data, sample(tiny_backbone, shots=0))
