"""Tip-Adapter-F: Tip-Adapter with fine-tuned keys (Zhang et al., ECCV 2022)."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.features import LabelledFeatures
from coop.methods.base import generator
from coop.methods.tip_adapter import TipAdapter, check_pair
from coop.train import Batch, Training, epoch_batches, steps_per_epoch, train

EPSILON = 1e-4  # AdamW's, as released


@dataclass(frozen=True)
class TipAdapterFOptions(Training):
    """`alpha` and `beta` are None to be searched for on validation, or both given; so are `train_alpha`, `train_beta`.

    The latter two hold while the keys are trained; None takes Tip-Adapter's, before training.
    AdamW has no `momentum`, and there is no warm-up unless `warmup_epochs` asks for one.
    """

    epochs: int | None = 20
    lr: float = 0.001
    batch_size: int = 256
    weight_decay: float = 0.01
    warmup_epochs: int = 0
    train_alpha: float | None = None
    train_beta: float | None = None
    alpha: float | None = None
    beta: float | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair(self.alpha, self.beta)
        check_pair(self.train_alpha, self.train_beta, "train_")


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys K are trained by cross-entropy, starting as the cache; alpha and beta are searched after.

    AdamW with a cosine by step, as released. The trained keys are not normalised again.
    Departures from the released code: the last epoch is the result, where it keeps the epoch with the best test
    accuracy (as `tip_adapter_f_test_selected` does); alpha and beta while training are those that Tip-Adapter finds on
    validation, where it has beta = 1 and an alpha from 1.17 to 10 chosen by hand for each dataset.
    """

    name = "tip_adapter_f"
    Options = TipAdapterFOptions

    def fit(self, train_set: LabelledFeatures, val: LabelledFeatures) -> dict[str, Any]:
        """Fill the cache, train its keys, then choose alpha and beta."""
        self.fill_cache(train_set)
        alpha, beta = self.training_pair(val)
        keys = nn.Parameter(self.keys.clone())
        o = self.options
        optimizer = torch.optim.AdamW([keys], lr=o.lr, eps=EPSILON, weight_decay=o.weight_decay)

        def loss(features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
            return F.cross_entropy(self.scores(features, keys, alpha, beta), labels.to(keys.device))

        per_epoch = steps_per_epoch(len(train_set), o.batch_size, drop_last=False)
        rates = cosine_by_step(o.epochs, per_epoch, o.lr, o.warmup_epochs, o.warmup_lr)
        batches = epoch_batches(train_set, o.epochs, o.batch_size, generator(self.seed), drop_last=False)
        self.keys = keys.detach()  # the same numbers as they change
        watched = _with_epoch_ends(batches, per_epoch, lambda: self.end_epoch(val))
        losses = train(optimizer, loss, watched, rates, self.name)
        ends = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        return {"steps": len(losses), **ends, "train_alpha": alpha, "train_beta": beta, **self.finish(val)}

    def end_epoch(self, val: LabelledFeatures) -> None:
        """Look at the keys after an epoch; nothing here."""

    def finish(self, val: LabelledFeatures) -> dict[str, Any]:
        """Settle on keys, alpha and beta: the last epoch's, and the best on `val`."""
        return self.choose_pair(val)

    def training_pair(self, val: LabelledFeatures) -> tuple[float, float]:
        """Return alpha and beta while the keys are trained."""
        if self.options.train_alpha is not None:
            return self.options.train_alpha, self.options.train_beta
        self.choose_pair(val)
        return self.alpha, self.beta


def _with_epoch_ends(batches: Iterable[Batch], per_epoch: int, end_epoch: Callable[[], None]) -> Iterator[Batch]:
    """Yield the batches; asking for one means that the steps before it are done."""
    for i, batch in enumerate(batches):
        if i and i % per_epoch == 0:
            end_epoch()
        yield batch
    end_epoch()


def cosine_by_step(epochs: int, per_epoch: int, lr: float, warmup_epochs: int, warmup_lr: float) -> list[float]:
    """Return the learning rate of every step: lr (1 + cos(pi t / T)) / 2 at step t of T."""
    steps = epochs * per_epoch
    cosine = [lr * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
    return [warmup_lr if t < warmup_epochs * per_epoch else rate for t, rate in enumerate(cosine)]
