"""What every method is: an object over image features that can be fitted, asked for logits, saved and loaded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from coop.backbone import Backbone
from coop.errors import CoopError
from coop.features import LabelledFeatures


@dataclass(frozen=True)
class Classes:
    """The classes to tell apart: their names, and how their dataset writes them by hand."""

    names: tuple[str, ...]
    template: str = "a photo of a {}."
    dataset: str = ""


class Method(ABC):
    """A classifier of image features.

    A method is made for `classes`, fitted on a few-shot sample (unless `trains` is false), and then answers `logits`.
    Its learned tensors are `state()`; the same constructor call and `load_state` give the same logits again.
    `seed` is the only randomness.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    trains: ClassVar[bool] = True  # whether shots and seed are part of what a run is
    selects_on: ClassVar[str] = "val"  # the part that `fit` gets to choose on: "test" only for published protocols

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        self.backbone, self.classes, self.options, self.seed = backbone, classes, options, seed

    def fit(self, train: LabelledFeatures, val: LabelledFeatures) -> dict[str, Any]:
        """Learn from `train`, tuning hyper-parameters on `val` only; return what is worth recording in the result."""
        return {}

    @abstractmethod
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return the logits, scaled, of image features as the backbone gives them (not normalised)."""

    def state(self) -> dict[str, Tensor]:
        """Return the learned tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take learned tensors back. Raises CoopError where a name or a shape does not fit."""
        if state:
            raise CoopError(f"method {self.name} learns nothing, but the file holds {', '.join(sorted(state))}")

    def for_classes(self, classes: Classes) -> "Method":
        """Return this method, as learned, for other classes. Raises CoopError if what it learned does not move."""
        raise CoopError(f"method={self.name} learns something for each class: it cannot be moved to other classes")


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for one purpose of one run."""
    return torch.Generator().manual_seed(seed)
