"""CoOp's optimiser, schedule and batches (protocol of trainers/coop.py and Dassl)."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.data.few_shot import Shots
from coop.errors import CoopError
from coop.features import LabelledFeatures
from coop.progress import track

Batch = tuple[Float[Tensor, "b e"], Int[Tensor, " b"]]
T = TypeVar("T")


@dataclass(frozen=True)
class Augment:
    """`views`: 0: the test view; V > 0: one of V random views, drawn per image and epoch; `epochs`: a fresh one."""

    views: int | str = 10

    def __post_init__(self) -> None:
        if self.views != "epochs" and not (isinstance(self.views, int) and self.views >= 0):
            raise CoopError(f"augment.views={self.views}: give 0, a number of views, or 'epochs'")


@dataclass(frozen=True)
class Training:
    """How a method is trained. `epochs=None` is the protocol's number for the shots; 0 leaves it untrained."""

    epochs: int | None = None
    lr: float = 0.002
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 0:
            raise CoopError(f"epochs={self.epochs}: give 0 or more")
        if self.batch_size < 1:
            raise CoopError(f"batch_size={self.batch_size}: give 1 or more")
        for name in ("lr", "momentum", "weight_decay", "warmup_lr", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise CoopError(f"{name}={value}: give 0 or more")


def resolved(options: T, shots: Shots, dataset: str) -> T:
    """Return a method's options with the protocol's number of epochs filled in, if it is trained by epochs."""
    if isinstance(options, Training) and options.epochs is None:
        return replace(options, epochs=protocol_epochs(shots, dataset))
    return options


def protocol_epochs(shots: Shots, dataset: str) -> int:
    """Return CoOp's epochs: 50 for 1 shot, 100 for 2 and 4, 200 for more; 50 for ImageNet whatever the shots."""
    if dataset == "imagenet" or shots == 1:
        return 50
    return 100 if isinstance(shots, int) and shots <= 4 else 200


def learning_rates(
    epochs: int, steps_per_epoch: int, lr: float = 0.002, warmup_epochs: int = 1, warmup_lr: float = 1e-5
) -> list[float]:
    """Return the learning rate of every step: constant warm-up, then cosine annealing by epoch.

    Epoch t (from 0) runs at `warmup_lr` while t < warmup_epochs, then at lr (1 + cos(pi (t - warmup_epochs) / T)) / 2
    with T = epochs, as Dassl's scheduler with WARMUP_RECOUNT: the rate never reaches 0.
    """
    rates = []
    for epoch in range(epochs):
        angle = math.pi * (epoch - warmup_epochs) / epochs
        rates += [warmup_lr if epoch < warmup_epochs else lr * (1 + math.cos(angle)) / 2] * steps_per_epoch
    return rates


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches; `drop_last` drops an incomplete last one, unless it is the only one."""
    return max(n // batch_size, 1) if drop_last else math.ceil(n / batch_size)


def epoch_batches(
    data: LabelledFeatures, epochs: int, batch_size: int, generator: torch.Generator, drop_last: bool = True
) -> Iterator[Batch]:
    """Yield the batches of all epochs: each epoch draws its views, then an order."""
    for epoch in range(epochs):
        features = data.epoch(epoch, generator)
        order = torch.randperm(len(data), generator=generator).to(features.device)
        for step in range(steps_per_epoch(len(data), batch_size, drop_last)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            yield features[chosen], data.labels[chosen]


def sgd(parameters: Iterable[nn.Parameter], options: Training) -> torch.optim.Optimizer:
    """Return the protocol's optimiser."""
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)


def train(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Float[Tensor, "b e"], Int[Tensor, " b"]], Float[Tensor, ""]],
    batches: Iterable[Batch],
    rates: list[float],
    description: str = "training",
) -> list[float]:
    """Take one step per batch at the given learning rates; return every step's loss.

    Raises CoopError, with the step and its learning rate, when a loss is not finite.
    """
    losses: list[Tensor] = []
    checked = 0
    steps = zip(rates, batches, strict=True)
    for step, (rate, (features, labels)) in enumerate(track(steps, description, len(rates))):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(features, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 64 == 63 or step == len(rates) - 1:  # asking after every step would make a GPU wait for it
            _check_finite(losses[checked:], checked, rates)
            checked = len(losses)
    return [float(loss) for loss in losses]


def _check_finite(losses: list[Tensor], first: int, rates: list[float]) -> None:
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        step = first + int((~finite).nonzero()[0])
        raise CoopError(
            f"the loss is not finite at step {step + 1} of {len(rates)} (learning rate {rates[step]:g}): "
            "lower lr, or use precision=fp32"
        )
