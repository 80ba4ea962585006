"""ProLIP and the regularised linear adapter: a linear map of image features, held near where it starts."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.clip.backbone import Backbone, Projection
from coop.features import Samples
from coop.methods.base import Classes, TrainedMethod, accuracy, scaled_cosine, text_features
from coop.methods.class_weights import prompts_of
from coop.options import LinearAdapterOptions, ProLipOptions
from coop.train import Batch, cosine_by_step

LRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 0.0)
LR = 1e-5  # without validation
EPSILON = 1e-4  # Adam's, as released


class FeatureMap(TrainedMethod):
    """logits = exp(logit scale) * cos(x, t_c), x a linear map A of what is read; loss = CE + lambda |A - A_0|_F^2.

    Each of `steps` steps sees one stored view of all images: views 1, 2, ..., V - 1, 0, 1, ..., as released. Adam with
    eps = 1e-4, cosine by step to 0. With validation images (as released, as many as shots: validation=shots), lr and
    lambda (`penalty`) that are not given are the first best of the grid `LRS` x `PENALTIES`, lr the outer loop, and a
    fresh start is trained with them. Without, lr = 1e-5 and lambda = 1 / shots, the shots being the largest number of
    images of a class. A moves to any classes.
    Departures from the released code: float32 where it trains in float16; exp(logit scale) where it has 100, the same
    for OpenAI's weights.
    """

    def __init__(self, backbone: Backbone, classes: Classes, options: LinearAdapterOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = text_features(backbone, *prompts_of(self))
        self.start = self.initial().to(self.text.device)
        self.map = nn.Parameter(self.start.clone())
        self.lr, self.penalty = LR, 0.0

    @abstractmethod
    def initial(self) -> Float[Tensor, "p q"]:
        """Return A_0."""

    @abstractmethod
    def mapped(self, inputs: Float[Tensor, "b p"]) -> Float[Tensor, "b e"]:
        """Return the image features under A."""

    def scores(self, inputs: Float[Tensor, "b p"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in A."""
        return scaled_cosine(self.backbone, self.mapped(inputs.to(self.text.device).float()), self.text)

    def loss(self, inputs: Float[Tensor, "b p"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy plus the penalty, a sum over A's entries."""
        return super().loss(inputs, labels) + self.penalty * (self.map - self.start).square().sum()

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Choose lr and lambda, then train."""
        o, notes = self.options, dict[str, Any]()
        shots = int(train.labels.bincount().max())
        lr, penalty = LR if o.lr is None else o.lr, 1 / shots if o.penalty is None else o.penalty
        if o.uses_validation and len(val):
            tried = []
            for lr, penalty in product(
                LRS if o.lr is None else (o.lr,), PENALTIES if o.penalty is None else (o.penalty,)
            ):
                self.train_once(train, val, lr, penalty)
                tried.append((lr, penalty, accuracy(self, val)))
            lr, penalty, found = max(tried, key=lambda row: row[2])
            notes = {"settings_tried": len(tried), "val_accuracy": found, "search": tried}
        losses = self.train_once(train, val, lr, penalty)
        ends = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
        return {**ends, "lr": lr, "penalty": penalty, **notes}

    def train_once(self, train: Samples, val: Samples, lr: float, penalty: float) -> list[float]:
        """Train from A_0 with one setting; return every step's loss."""
        self.lr, self.penalty = lr, penalty
        self.load_state({"map": self.start})
        return self.run_training(train, val)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.trainable(), lr=self.lr, eps=EPSILON)

    def steps_per_epoch(self, train_set: Samples) -> int:
        """Return 1: each step sees all images."""
        return 1

    def rates(self, per_epoch: int) -> list[float]:
        """Return the cosine by step, without a warm-up."""
        return cosine_by_step(self.options.steps, self.lr)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield all images, in one view after another, the first one last."""
        views = train_set.views if len(train_set.views) else train_set.test_view[None]
        for step in range(self.options.steps):
            yield views[(step + 1) % len(views)], train_set.labels

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `map` (p, e), A."""
        return {"map": self.map}

    @abstractmethod
    def merged_projection(self) -> Projection:
        """Return the image tower's projection with A in it. Raises CoopError for a tower that ends in none."""

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Return the model's state_dict with A merged into its projection: a checkpoint for open_clip."""
        return self.backbone.state_with_projection(self.merged_projection())

    def for_classes(self, classes: Classes) -> "FeatureMap":
        """Return the same map with other classes' text features."""
        return self.moved(classes)


class ProLip(FeatureMap):
    """ProLIP (Fahes et al. 2024): x = h A + b, h the features before the image tower's last projection.

    A starts at that projection; its bias b, where there is one (ResNet), stays. See `FeatureMap`.
    """

    name = "prolip"
    Options = ProLipOptions

    def initial(self) -> Float[Tensor, "p e"]:
        """Return the tower's projection."""
        weight, self.bias = self.backbone.projection
        return weight

    def mapped(self, inputs: Float[Tensor, "b p"]) -> Float[Tensor, "b e"]:
        """Return h A + b."""
        x = inputs @ self.map
        return x if self.bias is None else x + self.bias

    def merged_projection(self) -> Projection:
        """Return A and b."""
        return Projection(self.map, self.bias)


class LinearAdapter(FeatureMap):
    """The regularised linear adapter of ProLIP's paper: x = f A^T, f the image features; A (e, e) starts at identity.

    See `FeatureMap`.
    """

    name = "linear_adapter"
    Options = LinearAdapterOptions

    def initial(self) -> Float[Tensor, "e e"]:
        """Return the identity."""
        return torch.eye(self.backbone.joint_width)

    def mapped(self, inputs: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """Return f A^T."""
        return inputs @ self.map.T

    def merged_projection(self) -> Projection:
        """Return W A^T and b A^T of the tower's projection h W + b."""
        weight, bias = self.backbone.projection
        return Projection(weight @ self.map.T, None if bias is None else bias @ self.map.T)
