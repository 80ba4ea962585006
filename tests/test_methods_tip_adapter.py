"""Tip-Adapter and Tip-Adapter-F against the paper's equation and a nested-loop search."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods import tip_adapter
from coop.methods.base import Classes
from coop.methods.tip_adapter import TipAdapter, TipAdapterF
from coop.options import Augment, TipAdapterFOptions, TipAdapterOptions
from tests.methods_plain import CLASSES, NAMES, hand_written, sample


def plain(backbone: Backbone, features: Tensor, keys: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """logits_ic = s f_i . w_c + alpha sum over keys k of class c of exp(-beta (1 - f_i . k))."""
    f = features / features.norm(dim=1, keepdim=True)
    return backbone.logit_scale * f @ hand_written(backbone).T + alpha * cache(f, keys, labels, beta)


def cache(f: Tensor, keys: Tensor, labels: Tensor, beta: float) -> Tensor:
    return torch.stack([torch.exp(-beta * (1 - f @ keys[labels == c].T)).sum(dim=1) for c in range(len(NAMES))], dim=1)


def keys_of(data: Samples) -> Tensor:
    mean = sum(data.views) / len(data.views)
    return mean / mean.norm(dim=1, keepdim=True)


def test_given_numbers(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=3, views=4)
    method = TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions(alpha=2.0, beta=3.0))
    assert method.fit(data, data) == {"alpha": 2.0, "beta": 3.0}
    theirs = plain(tiny_backbone, data.test_view, keys_of(data), data.labels, 2.0, 3.0)
    torch.testing.assert_close(method.logits(data.test_view), theirs, rtol=1e-4, atol=1e-4)


def test_the_search_finds_what_nested_loops_find(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = sample(tiny_backbone, 2, 3, seed=1, spread=3.0), sample(tiny_backbone, 4, seed=2, spread=3.0)
    alphas = [0.1 * 10000 ** (i / 39) for i in range(40)]
    betas = [0.1 * 500 ** (i / 39) for i in range(40)]
    scored = []
    f = F.normalize(val.test_view, dim=1)
    prompts = tiny_backbone.logit_scale * f @ hand_written(tiny_backbone).T
    caches = {beta: cache(f, keys_of(train), train.labels, beta) for beta in betas}
    for beta, alpha in itertools.product(betas, alphas):
        logits = prompts + alpha * caches[beta]
        hits = int((logits.argmax(dim=1) == val.labels).sum())
        scored.append((hits, -F.cross_entropy(logits, val.labels).item(), alpha, beta))
    assert len({hits for hits, *_ in scored}) > 1
    hits, _, alpha, beta = max(scored, key=lambda row: row[:2])
    for elements in (1, 500, 2**24):  # one pair at a time, some, all together
        monkeypatch.setattr(tip_adapter, "ELEMENTS", elements)
        notes = TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions()).fit(train, val)
        assert (notes["alpha"], notes["beta"]) == pytest.approx((alpha, beta))
        assert notes["val_accuracy"] == pytest.approx(hits / len(val))


def test_without_views_the_test_view_is_the_key(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=2)
    method = TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions())
    method.fit(data, data)
    torch.testing.assert_close(method.state()["keys"], F.normalize(data.test_view, dim=1))


def test_fine_tuned_keys_follow_adamw_with_a_cosine_by_step(tiny_backbone: Backbone) -> None:
    data, val = sample(tiny_backbone, shots=2), sample(tiny_backbone, shots=2, seed=1)
    options = TipAdapterFOptions(epochs=5, lr=0.01, train_alpha=1.5, train_beta=2.0)
    method = TipAdapterF(tiny_backbone, CLASSES, options)
    notes = method.fit(data, val)
    keys = nn.Parameter(F.normalize(data.test_view, dim=1))
    optimizer = torch.optim.AdamW([keys], lr=0.01, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(5):
        loss = F.cross_entropy(plain(tiny_backbone, data.test_view, keys, data.labels, 1.5, 2.0), data.labels)
        if step == 0:
            assert notes["first_loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    moved = (keys.detach() - F.normalize(data.test_view, dim=1)).abs().max()
    assert moved > 1e-2
    torch.testing.assert_close(method.state()["keys"], keys.detach(), rtol=1e-3, atol=1e-4)
    theirs = plain(tiny_backbone, val.test_view, keys.detach(), data.labels, notes["alpha"], notes["beta"])
    torch.testing.assert_close(method.logits(val.test_view), theirs, rtol=1e-3, atol=1e-2)


def test_trains_with_the_pair_that_the_untrained_cache_would_take(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, 2, 3, seed=1, spread=3.0), sample(tiny_backbone, 4, seed=2, spread=3.0)
    searched = TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions()).fit(train, val)
    notes = TipAdapterF(tiny_backbone, CLASSES, TipAdapterFOptions()).fit(train, val)
    assert (notes["train_alpha"], notes["train_beta"]) == (searched["alpha"], searched["beta"])


def test_the_last_short_batch_is_trained_on(tiny_backbone: Backbone) -> None:
    data = sample(tiny_backbone, shots=3, views=2)
    method = TipAdapterF(tiny_backbone, CLASSES, TipAdapterFOptions(epochs=2, batch_size=4))
    assert method.fit(data, data)["steps"] == 2 * 4  # 15 images: three batches of 4 and one of 3


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_saves_and_loads_but_does_not_move(tiny_backbone: Backbone, kind: type[TipAdapter]) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    method, again = (kind(tiny_backbone, CLASSES, kind.Options()) for _ in range(2))
    method.fit(data, data)
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    with pytest.raises(CoopError, match="cannot be moved to other classes"):
        method.for_classes(Classes(("river",)))
    with pytest.raises(CoopError, match="does not fit"):
        kind(tiny_backbone, Classes(("river", "abbey")), kind.Options()).load_state(method.state())


def test_refusals(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="give both"):
        TipAdapterOptions(alpha=1.0)
    with pytest.raises(CoopError, match="beta=-1"):
        TipAdapterFOptions(alpha=1.0, beta=-1.0)
    with pytest.raises(CoopError, match="has no epochs"):
        TipAdapterOptions(augment=Augment("epochs"))
    with pytest.raises(CoopError, match="needs validation images"):
        TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions()).fit(sample(tiny_backbone, 1), sample(tiny_backbone, 0))
