"""What methods with a weight vector for each class share: answers for some of the classes, and WiSE-FT."""

from abc import abstractmethod
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes, Method, TrainedMethod


class PerClassMethod(Method):
    """A method that learns something for each class: it answers for its own classes, or for some of them.

    Where a name stands for several classes (two of ImageNet's are called missile), the best score among them counts.
    """

    rows: list[list[int]] | None = None  # for each class, its columns of `scores`; None: column c is class c

    @abstractmethod
    def scores(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b c"]:
        """Return the logits of all classes that were learned."""

    @torch.no_grad()
    def logits(self, inputs: Shaped[Tensor, "n *row"]) -> Float[Tensor, "n k"]:
        """Return the logits of this method's classes, k of those c that were learned."""
        scores = self.scores(inputs)
        return scores if self.rows is None else torch.stack([scores[:, rows].amax(dim=1) for rows in self.rows], dim=1)

    def for_classes(self, classes: Classes) -> "PerClassMethod":
        """Return the logits of some of the classes (ImageNet-A has 200 of ImageNet's).

        Raises CoopError for a class that was not learned.
        """
        own = self.rows or [[c] for c in range(len(self.classes.names))]
        columns: dict[str, list[int]] = {}
        for name, of_class in zip(self.classes.names, own, strict=True):
            columns.setdefault(name, []).extend(of_class)
        missing = [name for name in classes.names if name not in columns]
        if missing:
            raise CoopError(
                f"method={self.name} learns something for each class: it cannot be moved to other classes than its "
                f"own, and '{missing[0]}' is none of them"
            )
        some = copy(self)
        some.classes, some.rows = classes, [columns[name] for name in classes.names]
        return some


class ClassWeightsMethod(PerClassMethod, TrainedMethod):
    """A trained method that ends in one weight vector for each class, and so allows WiSE-FT (Wortsman et al. 2022).

    The option `wise_ft` is a share r: after training, each parameter becomes (1 - r) trained + r zero-shot.
    """

    @abstractmethod
    def zero_shot(self) -> dict[str, Tensor]:
        """Return the values of the parameters with which this method is zero-shot CLIP."""

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train, then mix with the zero-shot weights."""
        notes = super().fit(train, val)
        self.mix()
        return notes

    @torch.no_grad()
    def mix(self) -> None:
        """Mix the parameters with the zero-shot ones, where `wise_ft` says so."""
        if self.options.wise_ft is not None:
            start = self.zero_shot()
            for name, parameter in self.parameters().items():
                parameter.lerp_(start[name], self.options.wise_ft)
            self.reset_cache()


def prompts_of(method: Method) -> tuple[Classes, str | None]:
    """Return the classes and the template for `text_features`: `template=None` is the released ensemble on ImageNet."""
    if method.options.template is None and method.classes.dataset.startswith("imagenet"):
        return replace(method.classes, dataset="imagenet"), method.options.imagenet_template
    return method.classes, method.options.template


def all_views(samples: Samples) -> tuple[Float[Tensor, "s e"], Int[Tensor, " s"]]:
    """Return all training views of all images, row view * n + image, and their labels; else the test view."""
    views = samples.views[:] if len(samples.views) else samples.test_view[:][None]
    return views.flatten(0, 1), samples.labels.repeat(len(views))


def unit(features: Tensor) -> Tensor:
    """Return features divided by their length, in float32."""
    return F.normalize(features.float(), dim=-1)
