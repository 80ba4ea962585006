"""The protocol's schedule, batches and views, stated with PyTorch's own schedulers and loaders."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR
from torch.utils.data import DataLoader

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.coop import CoOp
from coop.options import Augment, CoOpOptions, Training, protocol_epochs
from coop.train import cosine_by_step, epoch_batches, learning_rates, sgd, steps_per_epoch, train
from tests.methods_plain import CLASSES, sample, with_context


def scheduled(epochs: int, lr: float, warmup: int, warmup_lr: float) -> list[float]:
    """Return each epoch's rate by PyTorch's schedulers, the cosine counting from the end of the warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedulers = [ConstantLR(optimizer, warmup_lr / lr, warmup), CosineAnnealingLR(optimizer, epochs)]
    scheduler = SequentialLR(optimizer, schedulers, [warmup]) if warmup else schedulers[1]
    if not warmup:
        optimizer.param_groups[0]["lr"] = lr
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR calls its members in a way that they warn about
            scheduler.step()
    return rates


@pytest.mark.parametrize("epochs, lr, warmup, warmup_lr", [
    (50, 0.002, 1, 1e-5), (200, 0.002, 1, 1e-5), (7, 0.1, 3, 1e-3), (5, 0.01, 0, 1e-5), (1, 0.002, 1, 1e-5),
])  # fmt: skip
def test_schedule_is_pytorchs(epochs: int, lr: float, warmup: int, warmup_lr: float) -> None:
    expected = [rate for rate in scheduled(epochs, lr, warmup, warmup_lr) for _ in range(3)]
    assert learning_rates(epochs, 3, lr, warmup, warmup_lr) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("final", [0.0, 1e-4])
def test_cosine_by_step_is_pytorchs(final: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, 17, final)
    expected = []
    for _ in range(17):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert cosine_by_step(17, 0.01, final=final) == pytest.approx(expected, rel=1e-9)
    for linear, warm in ((False, [1e-5, 1e-5, 1e-5]), (True, [1e-5, 0.01 / 3, 0.02 / 3])):
        rates = cosine_by_step(17, 0.01, 3, 1e-5, linear, final)
        assert rates == pytest.approx(warm + expected[:14], rel=1e-9)


def test_schedule_of_a_published_log() -> None:
    """The rate of the 50th epoch as a user of the original printed it (CoOp issue 26)."""
    rates = learning_rates(50, 1)
    assert rates[0] == 1e-5 and rates[1] == 0.002
    assert rates[-1] == pytest.approx(7.885299e-06, abs=5e-13)
    assert all(a > b > 0 for a, b in pairwise(rates[1:]))
    assert learning_rates(0, 4) == []


@pytest.mark.parametrize("n", [1, 8, 31, 32, 33, 63, 64, 160])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_number_of_batches_is_the_loaders(n: int, batch_size: int) -> None:
    """As the original: a last incomplete batch is dropped, unless the set is smaller than one batch."""
    assert steps_per_epoch(n, batch_size) == len(DataLoader(range(n), batch_size, drop_last=n >= batch_size))
    assert steps_per_epoch(n, batch_size, drop_last=False) == len(DataLoader(range(n), batch_size))


@pytest.mark.parametrize("shots, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200), ("all", 200)])
def test_epochs_by_shots(shots: int | str, epochs: int) -> None:
    assert protocol_epochs(shots, "eurosat") == epochs
    assert protocol_epochs(shots, "imagenet") == 50
    assert CoOpOptions().resolved(shots, "dtd") == CoOpOptions(epochs=epochs)
    assert CoOpOptions(epochs=0).resolved(shots, "dtd").epochs == 0


def numbered(n: int, views: int, fresh: bool = False) -> Samples:
    """Return features (view, image): 0 is the test view."""
    table = torch.stack(torch.meshgrid(torch.arange(views + 1.0), torch.arange(float(n)), indexing="ij"), dim=-1)
    return Samples(torch.arange(n), table[0], table[1:], fresh)


def epochs_of(data: Samples, epochs: int, batch_size: int, seed: int = 0) -> list[list[Tensor]]:
    """Return the batches, by epoch, after checking that labels go with their images."""
    random = torch.Generator().manual_seed(seed)
    batches = list(epoch_batches(data, epochs, batch_size, random))
    assert all(torch.equal(features[:, 1].long(), labels) for features, labels in batches)
    steps = len(batches) // epochs
    return [[features for features, _ in batches[i * steps : (i + 1) * steps]] for i in range(epochs)]


@pytest.mark.parametrize("n, batch_size, used", [(10, 4, 8), (3, 4, 3), (8, 4, 8)])
def test_an_epoch_takes_every_image_at_most_once(n: int, batch_size: int, used: int) -> None:
    state = torch.get_rng_state()
    epochs = epochs_of(numbered(n, 0), 6, batch_size)
    orders = [tuple(torch.cat(batches)[:, 1].tolist()) for batches in epochs]
    assert all(len(order) == len(set(order)) == used for order in orders)
    assert len(set(orders)) > 1
    assert [[b.tolist() for b in e] for e in epochs] == [
        [b.tolist() for b in e] for e in epochs_of(numbered(n, 0), 6, batch_size)
    ]
    assert torch.equal(state, torch.get_rng_state())


def test_views_are_drawn_for_each_image_and_epoch() -> None:
    epochs = [torch.cat(batches) for batches in epochs_of(numbered(20, 3), 8, 20)]
    views = torch.stack([rows[rows[:, 1].argsort(), 0] for rows in epochs])
    assert set(views.unique().tolist()) == {1, 2, 3}  # never the test view
    assert all(len(column.unique()) > 1 for column in views.T) and all(len(row.unique()) > 1 for row in views)


def test_fresh_views_belong_to_their_epoch_and_no_views_are_the_test_view() -> None:
    for data, expected in ((numbered(5, 4, fresh=True), [1, 2, 3, 4]), (numbered(5, 0), [0, 0, 0, 0])):
        epochs = epochs_of(data, 4, 5)
        assert [set(torch.cat(batches)[:, 0].tolist()) for batches in epochs] == [{view} for view in expected]


def backward_of(w: torch.nn.Parameter) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the backward pass of the loss sum(w f)."""

    def backward(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = (w * inputs).sum()
        loss.backward()
        return loss.detach()

    return backward


def test_optimiser_is_the_protocols() -> None:
    """Two steps against momentum and weight decay written out."""
    w = torch.nn.Parameter(torch.tensor([2.0]))
    options, rates = Training(), [0.1, 0.05]
    train(sgd([w], options), backward_of(w), [(torch.tensor([[3.0]]), torch.zeros(1).long())] * 2, rates)
    value, velocity = 2.0, 0.0
    for rate in rates:
        velocity = 0.9 * velocity + (3.0 + 5e-4 * value)
        value -= rate * velocity
    assert w.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("bad", [0, 3, 64, 99])
def test_a_loss_that_is_not_finite_stops_with_step_and_rate(bad: int) -> None:
    w = torch.nn.Parameter(torch.ones(1))
    batches = [(torch.full((1, 1), math.inf if i == bad else 1.0), torch.zeros(1).long()) for i in range(100)]
    rates = [0.001 * (i + 1) for i in range(100)]
    said = rf"not finite at step {bad + 1} of 100 \(learning rate {rates[bad]:g}\): lower lr"
    with pytest.raises(CoopError, match=said):
        train(sgd([w], Training()), backward_of(w), batches, rates)


def test_too_high_a_rate_is_told(tiny_backbone: Backbone) -> None:
    """From a whole method, with the rate of the step where it happened."""
    method = CoOp(tiny_backbone, CLASSES, CoOpOptions(epochs=4, lr=1e38, n_ctx=2, batch_size=5))
    with pytest.raises(CoopError, match=r"the loss is not finite at step \d+ of 4 .*lower lr, or use precision=fp32"):
        method.fit(sample(tiny_backbone, shots=1), sample(tiny_backbone, shots=1))


def test_no_epochs_leave_the_prompt_as_it_was(tiny_backbone: Backbone) -> None:
    method = CoOp(tiny_backbone, CLASSES, CoOpOptions(epochs=0, ctx_init="a photo of a"))
    data = sample(tiny_backbone, shots=2)
    assert method.fit(data, data) == {"n_ctx": 4, "steps": 0}
    ids = tiny_backbone.tokenizer(["a photo of a"])[0, 1:5]
    words = tiny_backbone.model.token_embedding(ids)
    assert torch.equal(method.learner.ctx.detach(), words)
    cosines = torch.nn.functional.normalize(data.test_view, dim=-1) @ with_context(tiny_backbone, words).T
    torch.testing.assert_close(method.logits(data.test_view), tiny_backbone.model.logit_scale.exp() * cosines)


@pytest.mark.parametrize("wrong", [
    {"epochs": -1}, {"batch_size": 0}, {"lr": -0.1}, {"lr": math.nan}, {"momentum": -1.0}, {"warmup_epochs": -1},
])  # fmt: skip
def test_options_that_no_training_can_have(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(CoopError, match=f"{name}={value}: give"):
        Training(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("views", [-1, "epoch"])
def test_views_that_cannot_be(views: object) -> None:
    with pytest.raises(CoopError, match=f"augment.views={views}: give 0, a number of views"):
        Augment(views)  # type: ignore[arg-type]
