"""CLAP: a linear probe held near the zero-shot weights, where it starts (Silva-Rodriguez et al., CVPR 2024)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.methods.base import Classes, TrainedMethod, scaled_cosine
from coop.options import ClapOptions


class Clap(TrainedMethod):
    """logits = exp(logit scale) * cos(f, w_c), with the loss CE + mean_c lambda_c |w_c - t_c|^2; w starts at t.

    t_c is the mean of the text features of the class's hand-written prompts, before normalisation; lambda_c the mean
    probability that zero-shot CLIP gives to class c on the images of c among the shots, all their views included:
    classes that CLIP knows well stay near its weights. Nothing is chosen on validation.
    Follows the released code (trainers/adapters.py, constraint "l2"); the paper writes a sum for its mean over classes.
    Departure: lambda of a class without shots is 0 (there it is undefined).
    """

    name = "clap"
    Options = ClapOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ClapOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = self.text_features("raw")
        self.weights = nn.Parameter(self.text.clone())
        self.strength = torch.zeros(len(classes.names), device=self.text.device)

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in the weights."""
        return scaled_cosine(self.backbone, features, F.normalize(self.weights, dim=-1))

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy plus the weighted distance to the zero-shot weights."""
        distance = (self.weights - self.text).square().sum(dim=1)
        return F.cross_entropy(self.scores(features), labels.to(distance.device)) + (self.strength * distance).mean()

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Measure how well zero-shot CLIP knows each class, then train (`val` is not used)."""
        if self.options.constraint:
            self.strength = self.zero_shot_strength(train)
        return super().fit(train, val)

    @torch.no_grad()
    def zero_shot_strength(self, train_set: Samples) -> Float[Tensor, " c"]:
        """Return lambda: each class's mean zero-shot probability on its own shots."""
        views = train_set.views if len(train_set.views) else train_set.test_view[None]
        labels = train_set.labels.to(self.text.device)
        text = F.normalize(self.text, dim=-1)
        probabilities = torch.stack([scaled_cosine(self.backbone, view, text).softmax(dim=1) for view in views])
        own = probabilities.mean(dim=0).gather(1, labels[:, None])[:, 0]
        total = torch.zeros_like(self.strength).index_add(0, labels, own)
        return total / labels.bincount(minlength=len(total)).clamp(min=1)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return scaled cosine similarities with the learned weights."""
        return self.scores(features)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `weights` (c, e)."""
        return {"weights": self.weights}
