"""The training loop, learning-rate schedules and batches; the defaults are CoOp's (trainers/coop.py and Dassl)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.errors import CoopError
from coop.features import Samples
from coop.io import track
from coop.options import Training

Batch = tuple[Tensor, Int[Tensor, " b"]]  # inputs of a tap, labels


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


def cosine_by_step(
    steps: int, lr: float, warmup_steps: int = 0, warmup_lr: float = 1e-5, linear: bool = False, final: float = 0.0
) -> list[float]:
    """Return the learning rate of every step: cosine annealing by step from `lr` towards `final`, after a warm-up.

    Step k (from 0) has final + (lr - final) (1 + cos(pi (k - warmup_steps) / steps)) / 2: without a warm-up PyTorch's
    CosineAnnealingLR over `steps`, with one its beginning. A warm-up step has `warmup_lr`; with `linear`, lr k /
    warmup_steps, and `warmup_lr` at step 0 alone.
    """
    rates = []
    for k in range(steps):
        if k < warmup_steps:
            rates.append(lr * k / warmup_steps if linear and k else warmup_lr)
        else:
            rates.append(final + (lr - final) * (1 + math.cos(math.pi * (k - warmup_steps) / steps)) / 2)
    return rates


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches; `drop_last` drops an incomplete last one, unless it is the only one."""
    return max(n // batch_size, 1) if drop_last else math.ceil(n / batch_size)


def epoch_batches(
    data: Samples,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    drop_last: bool = True,
    first_view: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of all epochs: each epoch draws a view of each image, then an order.

    Where views belong to epochs (`data.fresh`), epoch t shows view `first_view` + t.
    """
    for epoch in range(epochs):
        drawn = data.draw(first_view + epoch, generator)
        order = torch.randperm(len(data), generator=generator)
        for step in range(steps_per_epoch(len(data), batch_size, drop_last)):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            yield data.batch(chosen, drawn), data.labels[chosen.to(data.labels.device)]


def sgd(parameters: Iterable[nn.Parameter], options: Training) -> torch.optim.Optimizer:
    """Return the protocol's optimiser."""
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)


def train(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor, Int[Tensor, " b"]], Float[Tensor, ""]],
    batches: Iterable[Batch],
    rates: list[float],
    description: str = "training",
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Take one step per batch at the given learning rates; return every step's loss.

    `backward` computes a batch's gradients and returns its loss; `after_step` gets the number of each step, from 0.

    Raises CoopError, with the step and its learning rate, when a loss is not finite.
    """
    losses: list[Tensor] = []
    checked = 0
    steps = zip(rates, batches, strict=True)
    for step, (rate, (inputs, labels)) in enumerate(track(steps, description, len(rates))):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(inputs, labels).detach())
        optimizer.step()
        if step % 64 == 63 or step == len(rates) - 1:  # asking after every step would make a GPU wait for it
            _check_finite(losses[checked:], checked, rates)
            checked = len(losses)
        if after_step is not None:
            after_step(step)
    return [float(loss) for loss in losses]


def _check_finite(losses: list[Tensor], first: int, rates: list[float]) -> None:
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        step = first + int((~finite).nonzero()[0])
        raise CoopError(
            f"the loss is not finite at step {step + 1} of {len(rates)} (learning rate {rates[step]:g}): "
            "lower lr, or use precision=fp32"
        )
