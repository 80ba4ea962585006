"""What methods trained by epochs share: the loop, and their parameters as the learned state."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.errors import CoopError
from coop.features import LabelledFeatures
from coop.methods.base import Method, generator
from coop.train import epoch_batches, learning_rates, sgd, steps_per_epoch, train


class Trained(Method):
    """A method whose `parameters` are trained on batches by `loss`, with the protocol's SGD; `options` is a `Training`.

    `forget` drops what was computed from the parameters' former values.
    """

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, saved and loaded, by name."""

    @abstractmethod
    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's loss."""

    def trainable(self) -> list[nn.Parameter]:
        """Return those of the parameters that training changes."""
        return list(self.parameters().values())

    def forget(self) -> None:
        """Drop what was computed from the parameters."""

    def fit(self, train_set: LabelledFeatures, val: LabelledFeatures) -> dict[str, Any]:
        """Train; the last epoch is the result (`val` is not used)."""
        o = self.options
        rates = learning_rates(
            o.epochs, steps_per_epoch(len(train_set), o.batch_size), o.lr, o.warmup_epochs, o.warmup_lr
        )
        batches = epoch_batches(train_set, o.epochs, o.batch_size, generator(self.seed))
        losses = train(sgd(self.trainable(), o), self.loss, batches, rates, self.name)
        self.forget()
        return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]} if losses else {"steps": 0}

    def state(self) -> dict[str, Tensor]:
        """Return the parameters."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters back. Raises CoopError where a name or a shape is not this method's."""
        load_parameters(self.name, self.parameters(), state)
        self.forget()


@torch.no_grad()
def load_parameters(method: str, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `parameters`. Raises CoopError, before anything is changed, where they do not match."""
    expected, found = ({k: tuple(t.shape) for k, t in tensors.items()} for tensors in (parameters, state))
    if expected != found:
        raise CoopError(f"method={method} expected tensors of shapes {_listed(expected)}, found {_listed(found)}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"
