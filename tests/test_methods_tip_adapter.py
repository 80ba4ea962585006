"""Tip-Adapter, APE and their trained forms against the papers' equations and nested-loop searches."""

import itertools
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.config import run_config
from coop.errors import CoopError
from coop.features import Samples
from coop.methods import tip_adapter
from coop.methods.base import Classes
from coop.methods.tip_adapter import Ape, ApeT, TipAdapter, TipAdapterF
from coop.options import (
    ApeOptions,
    ApeTOptions,
    Augment,
    CacheOptions,
    MethodOptions,
    TipAdapterFOptions,
    TipAdapterOptions,
    method_options,
)
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


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF, Ape, ApeT])
def test_saves_and_loads_and_answers_for_its_own_classes(tiny_backbone: Backbone, kind: type[TipAdapter]) -> None:
    data = sample(tiny_backbone, shots=2, views=2)
    method, again = (kind(tiny_backbone, CLASSES, kind.Options()) for _ in range(2))
    method.fit(data, data)
    again.load_state(method.state())
    assert torch.equal(again.logits(data.test_view), method.logits(data.test_view))
    some = method.for_classes(Classes(("abbey", "forest"))).logits(data.test_view)
    both = [NAMES.index("abbey"), NAMES.index("forest")]
    assert torch.equal(some, method.logits(data.test_view)[:, both])
    with pytest.raises(CoopError, match="cannot be moved to other classes"):
        method.for_classes(Classes(("river",)))
    with pytest.raises(CoopError, match="does not fit"):
        kind(tiny_backbone, Classes(("river", "abbey")), kind.Options()).load_state(method.state())


def released_search(
    prompts: Tensor, affinity: Tensor, values: Tensor, labels: Tensor, grid: list[list[float]], weights: Tensor
) -> tuple[float, ...]:
    """The released loops: beta, alpha, gamma; a setting is taken where it is strictly better. `weights` are D."""
    best, found = -1, (0.0, 0.0, 0.0)
    for beta, alpha, gamma in itertools.product(*grid):
        cached = torch.exp(-(beta - beta * affinity)) @ (values * torch.exp(gamma * weights)[:, None])
        hits = int(((prompts + alpha * cached).argmax(dim=1) == labels).sum())
        if hits > best:
            best, found = hits, (alpha, beta, gamma)
    return found


def released_grid(scale: list[float], step: list[int]) -> list[list[float]]:
    low = [0.1, 0.1, 0.0]
    return [[i * (scale[j] - low[j]) / step[j] + low[j] for i in range(step[j])] for j in range(len(scale))]


def test_the_released_setting(tiny_backbone: Backbone) -> None:
    """By hand: keys from the first ten views, an epoch's own view after them, the epoch best on validation."""
    epochs = 4
    given = {"setting": "released", "lr": 0.1, "epochs": epochs}
    options = method_options(TipAdapterFOptions, given, "oxford_flowers")
    assert (options.train_alpha, options.train_beta, options.keep) == (10.0, 1.0, "best")
    assert (options.search_scale, options.search_step) == ([50.0, 50.0], [200, 20])
    assert options.augment.views == "epochs" and options.augment.scale == 0.5 and options.epoch_views == 10 + epochs
    options = replace(options, train_alpha=5.0, search_scale=[9.0, 5.0], search_step=[6, 5])
    random = sample(tiny_backbone, 3, options.epoch_views, seed=1, spread=3.0)
    train, val = replace(random, fresh=True), sample(tiny_backbone, 6, seed=51, spread=3.0)
    method = TipAdapterF(tiny_backbone, CLASSES, options)
    notes = method.fit(train, val)

    keys = nn.Parameter(F.normalize(train.views[:10].mean(dim=0), dim=1))
    optimizer = torch.optim.AdamW([keys], lr=0.1, eps=1e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    accuracies, kept = [], []
    for epoch in range(epochs):
        loss = F.cross_entropy(
            plain(tiny_backbone, train.views[10 + epoch], keys, train.labels, 5.0, 1.0), train.labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        found = plain(tiny_backbone, val.test_view, keys.detach(), train.labels, 5.0, 1.0).argmax(dim=1)
        accuracies.append(float((found == val.labels).float().mean()))
        kept.append(keys.detach().clone())
    best = accuracies.index(max(accuracies))
    assert len(set(accuracies)) > 1 and best != epochs - 1  # so that the last epoch would be another answer
    assert notes["best_epoch"] == best and notes["best_epoch_accuracy"] == pytest.approx(accuracies[best])
    torch.testing.assert_close(method.keys.detach(), kept[best], rtol=1e-3, atol=1e-4)
    f, one_hot = F.normalize(val.test_view, dim=1), F.one_hot(train.labels).float()
    alpha, beta, _ = released_search(
        tiny_backbone.logit_scale * f @ hand_written(tiny_backbone).T, f @ kept[best].T, one_hot, val.labels,
        [*released_grid([9.0, 5.0], [6, 5]), [0.0]], torch.zeros(len(train)),
    )  # fmt: skip
    searched = plain(tiny_backbone, val.test_view, kept[best], train.labels, alpha, beta).argmax(dim=1)
    better = float((searched == val.labels).float().mean()) >= accuracies[best]
    assert (notes["alpha"], notes["beta"]) == pytest.approx((alpha, beta) if better else (5.0, 1.0))


def released(kind: type[MethodOptions], dataset: str, **given: Any) -> Any:
    return method_options(kind, {"setting": "released", **given}, dataset)


def test_the_released_setting_knows_eleven_datasets() -> None:
    assert released(TipAdapterFOptions, "eurosat").epochs == 100
    assert released(TipAdapterFOptions, "dtd").epochs == 20
    assert TipAdapterFOptions().resolved(16, "eurosat").epochs == 20
    assert released(TipAdapterOptions, "dtd").search_scale == [13.0, 13.0]
    with pytest.raises(CoopError, match="eleven datasets, not my_own: give search_scale, search_step"):
        released(TipAdapterOptions, "my_own")
    own = released(TipAdapterOptions, "my_own", search_scale=[3.0, 3.0], search_step=[5, 5])
    assert own.search_scale == [3.0, 3.0] and own.augment == Augment(10, 0.5)
    with pytest.raises(CoopError, match="depends on the dataset"):
        TipAdapterOptions(setting="released")


def test_the_released_setting_of_ape() -> None:
    """The values of two of the released files, by hand: 700 and 900 of 1,024 channels, 500 on ImageNet."""
    ape, ape_t = released(ApeOptions, "eurosat"), released(ApeTOptions, "eurosat")
    assert (ape.search_scale, ape.search_step, ape.channels) == ([30.0, 5.0, 1.5], [200, 20, 20], 0.68359375)
    assert (ape.similarity_weight, ape.variance_weight, ape.augment) == (0.9, 0.1, Augment(10, 0.5))
    assert (ape_t.search_scale, ape_t.channels, ape_t.epochs) == ([30.0, 5.0], 0.87890625, 200)
    assert (ape_t.similarity_weight, ape_t.keep, ape_t.augment) == (0.2, "best", Augment("epochs", 0.5))
    large = released(ApeTOptions, "imagenet")
    assert (large.lr, large.train_alpha, large.train_beta, large.channels) == (1e-4, 2.0, 1.0, 500 / 1024)
    assert released(ApeOptions, "imagenet").search_step == [200, 20, 5]


@pytest.mark.parametrize("kind", [TipAdapterOptions, TipAdapterFOptions, ApeOptions, ApeTOptions])
def test_given_keys_win_over_the_released_setting(kind: type[CacheOptions]) -> None:
    """Every released value, replaced alone, stays as given, and all others stay as released."""
    whole = asdict(released(kind, "dtd"))
    other = {"augment.views": 3, "augment.scale": 0.25, "search_scale": [2.0] * kind.n_searched, "keep": "last",
             "search_step": [4] * kind.n_searched, "train_alpha": 0.5, "train_beta": 0.5, "epochs": 7, "key_views": 2,
             "channels": 0.5, "similarity_weight": 0.5, "variance_weight": 0.5, "lr": 0.5, "eps": 0.5}  # fmt: skip
    keys = [key for key in other if key.split(".")[0] in whole]
    for key in keys:
        found = asdict(released(kind, "dtd", **{key: other[key]}))
        head, _, rest = key.partition(".")
        expected = {**whole, head: {**whole[head], rest: other[key]} if rest else other[key]}
        assert found == expected != whole
    own = released(kind, "my_own", **{key: other[key] for key in keys})
    assert asdict(own) == asdict(released(kind, "dtd", **{key: other[key] for key in keys}))
    assert method_options(kind, asdict(own)) == own  # as a result or a learned file gives them back


def test_a_run_takes_the_released_setting_of_its_dataset() -> None:
    keys = {"dataset": "eurosat", "method": "tip_adapter_f", "setting": "released", "augment.views": 4}
    options: Any = run_config(keys).options
    assert (options.epochs, options.augment, options.keep) == (100, Augment(4, 0.5), "best")


@pytest.mark.parametrize("options, uses", [
    (TipAdapterOptions(), True), (TipAdapterOptions(alpha=1.0, beta=1.0), False),
    (TipAdapterFOptions(), True), (TipAdapterFOptions(alpha=1.0, beta=1.0), False),
    (TipAdapterFOptions(train_alpha=1.0, train_beta=1.0), True),
    (TipAdapterFOptions(alpha=1.0, beta=1.0, train_alpha=1.0, train_beta=1.0), False),
    (TipAdapterFOptions(alpha=1.0, beta=1.0, train_alpha=1.0, train_beta=1.0, keep="best"), True),
    (method_options(TipAdapterFOptions, {"setting": "released", "alpha": 1.0, "beta": 1.0}, "dtd"), True),
    (ApeOptions(), True), (ApeOptions(alpha=1.0, beta=1.0, gamma=0.1), False), (ApeTOptions(), True),
])  # fmt: skip
def test_validation_is_used_where_something_is_chosen(
    tiny_backbone: Backbone, options: TipAdapterOptions, uses: bool
) -> None:
    """A method that says that it needs no validation images is fitted without them; the others refuse."""
    assert options.uses_validation == uses
    kinds = {TipAdapterOptions: TipAdapter, TipAdapterFOptions: TipAdapterF, ApeOptions: Ape, ApeTOptions: ApeT}
    if not isinstance(options, ApeOptions):
        options = replace(options, search_scale=[5.0, 5.0], search_step=[4, 4])
    method = kinds[type(options)](tiny_backbone, replace(CLASSES, dataset="dtd"), options)
    train, none = sample(tiny_backbone, shots=2, views=12), sample(tiny_backbone, shots=0)
    if uses:
        with pytest.raises(CoopError, match="validation images"):
            method.fit(train, none)
    else:
        method.fit(train, none)


def ape_plain(backbone: Backbone, train: Samples, w0: float, w1: float, q: int, keys_too: bool) -> list[int]:
    """The criterion in loops: pairs of members of different classes, and the variance over the prompts."""
    text, keys = hand_written(backbone), keys_of(train)
    members = [(c, text[c]) for c in range(len(NAMES))]
    members += [(int(label), key) for label, key in zip(train.labels, keys, strict=True)] if keys_too else []
    products = [a * b for (i, a), (j, b) in itertools.product(members, members) if i != j]
    similarity = sum(products) / len(products)  # type: ignore[operator]
    criterion = -w0 * similarity + w1 * text.var(dim=0)
    return sorted(range(len(criterion)), key=lambda j: -float(criterion[j]))[:q]


def test_ape(tiny_backbone: Backbone) -> None:
    train, val = sample(tiny_backbone, 3, 4, seed=1, spread=2.0), sample(tiny_backbone, 6, seed=2, spread=3.0)
    options = ApeOptions(
        channels=0.5, similarity_weight=0.7, variance_weight=0.3, search_scale=[7.0, 5.0, 1.0], search_step=[5, 4, 3]
    )
    method = Ape(tiny_backbone, CLASSES, options)
    notes = method.fit(train, val)
    chosen = ape_plain(tiny_backbone, train, 0.7, 0.3, 16, True)
    assert method.channels.tolist() == chosen != ape_plain(tiny_backbone, train, 0.7, 0.3, 16, False)
    f, keys, text = F.normalize(val.test_view, dim=1), keys_of(train), hand_written(tiny_backbone)
    g, k, u = (F.normalize(x[:, chosen], dim=1) for x in (f, keys, text))
    p = (k @ u.T).softmax(dim=1)
    y = F.one_hot(train.labels).double()
    divergence = torch.tensor([
        sum(float(y[i, c]) * math.log2((float(y[i, c]) + 1e-6) / (float(p[i, c]) + 1e-6)) for c in range(len(NAMES)))
        for i in range(len(train))
    ])  # fmt: skip
    prompts = tiny_backbone.logit_scale * f @ text.T
    grid = released_grid([7.0, 5.0, 1.0], [5, 4, 3])
    expected = released_search(prompts, g @ k.T, y.float(), val.labels, grid, divergence)
    assert (notes["alpha"], notes["beta"], notes["gamma"]) == pytest.approx(expected)
    assert notes["tried"] == 60
    alpha, beta, gamma = expected
    cached = torch.exp(-beta * (1 - g @ k.T)) @ (y.float() * torch.exp(gamma * divergence)[:, None])
    torch.testing.assert_close(method.logits(val.test_view), prompts + alpha * cached, rtol=1e-4, atol=1e-4)


def test_ape_trained(tiny_backbone: Backbone) -> None:
    """Full batches against the equation with autograd, for classes of unequal numbers of shots."""
    whole = sample(tiny_backbone, shots=3, views=2, spread=2.0)
    some = torch.arange(len(whole)) != 4
    train = Samples(whole.labels[some], whole.test_view[some], whole.views[:, some])
    pair = {"train_alpha": 2.0, "train_beta": 3.0, "alpha": 2.0, "beta": 3.0}
    options = ApeTOptions(epochs=4, lr=0.05, channels=0.25, augment=Augment(0), **pair)  # type: ignore[arg-type]
    no_views = replace(train, views=train.views[:0])
    method = ApeT(tiny_backbone, CLASSES, options)
    notes = method.fit(no_views, sample(tiny_backbone, shots=0))
    text, f = hand_written(tiny_backbone), F.normalize(train.test_view, dim=1)
    chosen = ape_plain(tiny_backbone, train, 0.2, 0.8, 8, False)
    r, v = nn.Parameter(torch.zeros(len(NAMES), 8)), nn.Parameter(torch.ones(len(train)))

    def logits(x: Tensor) -> Tensor:
        spread = torch.zeros(len(NAMES), 32)
        spread[:, chosen] = r
        keys = f + spread[train.labels]
        cached = torch.exp(-3.0 * (1 - x @ keys.T)) @ (v[:, None] * F.one_hot(train.labels))
        return tiny_backbone.logit_scale * x @ (text + spread).T + 2.0 * cached

    optimizer = torch.optim.AdamW([r, v], lr=0.05, eps=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for step in range(4):
        loss = F.cross_entropy(logits(f), train.labels)
        if step == 0:
            assert notes["first_loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert r.detach().abs().max() > 1e-2 and (v.detach() - 1).abs().max() > 1e-2
    torch.testing.assert_close(method.state()["residual"], r.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.state()["value_weights"], v.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.logits(train.test_view), logits(f).detach(), rtol=1e-3, atol=1e-2)


def test_refusals(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="give both"):
        TipAdapterOptions(alpha=1.0)
    with pytest.raises(CoopError, match="beta=-1"):
        TipAdapterFOptions(alpha=1.0, beta=-1.0)
    with pytest.raises(CoopError, match="has no epochs"):
        TipAdapterOptions(augment=Augment("epochs"))
    with pytest.raises(CoopError, match="search_scale and search_step"):
        TipAdapterOptions(search_scale=[7.0, 3.0])
    with pytest.raises(CoopError, match="give 3 numbers"):
        ApeOptions(search_scale=[7.0, 3.0], search_step=[2, 2])
    with pytest.raises(CoopError, match="channels=0"):
        ApeOptions(channels=0.0)
    with pytest.raises(CoopError, match="alpha, beta and gamma"):
        ApeOptions(alpha=1.0, beta=1.0)
    with pytest.raises(CoopError, match="unknown setting"):
        TipAdapterOptions(setting="publised")
    with pytest.raises(CoopError, match="needs validation images"):
        TipAdapter(tiny_backbone, CLASSES, TipAdapterOptions()).fit(sample(tiny_backbone, 1), sample(tiny_backbone, 0))
