"""CoCoOp against plain loops over images, with the whole text tower run for each."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.encode import PromptEncoder
from coop.errors import CoopError
from coop.methods.base import Classes
from coop.methods.cocoop import CoCoOp, CoCoOpOptions
from tests.methods_plain import CLASSES, NAMES, leaf, sample, with_context

OPTIONS = CoCoOpOptions(epochs=1, batch_size=3, ctx_init=None, n_ctx=3)


def plain(backbone: Backbone, state: dict[str, Tensor], features: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    """t_i(x) = [V_1 + pi(x)] .. [V_M + pi(x)] [CLASS_i], one image at a time."""
    rows = []
    for f in F.normalize(features, dim=-1):
        hidden = torch.relu(state["meta_net.linear1.weight"] @ f + state["meta_net.linear1.bias"])
        pi = state["meta_net.linear2.weight"] @ hidden + state["meta_net.linear2.bias"]
        w = with_context(backbone, state["ctx"] + pi, names)
        rows.append(backbone.logit_scale * (w @ f))
    return torch.stack(rows)


def test_logits_and_first_gradient(tiny_backbone: Backbone) -> None:
    method, data = CoCoOp(tiny_backbone, CLASSES, OPTIONS), sample(tiny_backbone, shots=1)
    state = {name: leaf(tensor) for name, tensor in method.state().items()}
    theirs = plain(tiny_backbone, state, data.test_view)
    torch.testing.assert_close(method.logits(data.test_view), theirs.detach(), rtol=1e-4, atol=1e-4)
    assert theirs.detach().std(dim=0).max() > 1e-2  # images do get different class features
    F.cross_entropy(theirs, data.labels).backward()
    method.loss(data.test_view, data.labels).backward()
    for name, parameter in method.parameters().items():
        assert parameter.grad is not None and state[name].grad is not None
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("contexts_at_once", [0, 1, 2])
def test_a_small_budget_changes_nothing_but_memory(tiny_backbone: Backbone, contexts_at_once: int) -> None:
    method, data = CoCoOp(tiny_backbone, CLASSES, OPTIONS), sample(tiny_backbone, shots=1)
    encoder = method.learner.encoder
    method.loss(data.test_view, data.labels).backward()
    expected = {name: parameter.grad for name, parameter in method.parameters().items()}
    rows = tiny_backbone.learned_rows(NAMES, 3, "end", False)
    per_token = 2**30 / PromptEncoder(tiny_backbone.tower, rows, budget=2**30).limit
    tokens = encoder.tokens * contexts_at_once or encoder.tokens // 2
    method.learner.encoder = PromptEncoder(tiny_backbone.tower, rows, budget=int(1.01 * tokens * per_token))
    assert (len(method.learner.encoder.chunks) > 1) == (contexts_at_once == 0)
    for parameter in method.parameters().values():
        parameter.grad = None
    method.loss(data.test_view, data.labels).backward()
    for name, parameter in method.parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_moves_both_and_lowers_the_loss(tiny_backbone: Backbone) -> None:
    method, data = CoCoOp(tiny_backbone, CLASSES, replace(OPTIONS, epochs=4)), sample(tiny_backbone, shots=3)
    before, start = method.state(), {name: tensor.clone() for name, tensor in method.state().items()}
    first = float(F.cross_entropy(method.logits(data.test_view), data.labels))
    notes = method.fit(data, data)
    assert notes["steps"] == 4 * 5
    assert all(not torch.equal(before[name], start[name]) for name in ("ctx", "meta_net.linear2.weight"))
    assert float(F.cross_entropy(method.logits(data.test_view), data.labels)) < first


def test_saves_loads_and_moves(tiny_backbone: Backbone) -> None:
    method, data = CoCoOp(tiny_backbone, CLASSES, OPTIONS), sample(tiny_backbone, shots=3)
    method.fit(data, data)
    again = CoCoOp(tiny_backbone, CLASSES, OPTIONS)
    assert not torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    others = Classes(("river", "annual crop land"))
    moved = method.for_classes(others).logits(data.test_view)
    theirs = plain(tiny_backbone, method.state(), data.test_view, others.names)
    torch.testing.assert_close(moved, theirs, rtol=1e-4, atol=1e-4)


def test_refuses_class_specific_contexts_and_foreign_states(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="class_specific=false"):
        CoCoOpOptions(class_specific=True)
    method = CoCoOp(tiny_backbone, CLASSES, OPTIONS)
    with pytest.raises(CoopError, match="meta_net"):
        method.load_state({"ctx": torch.zeros(3, 32)})


def test_the_seed_is_all_the_randomness(tiny_backbone: Backbone) -> None:
    first = CoCoOp(tiny_backbone, CLASSES, OPTIONS, seed=3).state()
    torch.rand(5)
    second = CoCoOp(tiny_backbone, CLASSES, OPTIONS, seed=3).state()
    other = CoCoOp(tiny_backbone, CLASSES, OPTIONS, seed=4).state()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and not torch.equal(tensor, other[name])
