"""GDA: a Gaussian discriminant analysis of the shots, added to zero-shot CLIP (Wang et al., ICLR 2024)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.io import track
from coop.methods.base import Classes, accuracy, class_means, load_parameters, scaled_cosine, text_features
from coop.methods.class_weights import PerClassMethod, all_views, prompts_of, unit
from coop.options import GdaOptions

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
NEIGHBOURS = 64  # base features that stand for a new class's images, and
TEXT_COPIES = 16  # copies of its text feature


class Gda(PerClassMethod):
    """logits = exp(logit scale) * f . t_c + alpha (f . w_c + b_c), w_c = P mu_c, b_c = log(1 / C) - mu_c . w_c / 2.

    mu_c is the mean unit feature of the class over all views, n features in all, d wide. P is
    d pinv((n - 1) Sigma + tr(Sigma) I) with Sigma = sum_i (f_i - mu_{y_i}) (f_i - mu_{y_i})^T / (n - 1)
    (`covariance=pooled`, the few-shot code), or the pinv of the mean of the classes' own covariances
    (`covariance=per_class`, the base-to-new code). alpha is the first best of `ALPHAS` on validation.
    A new class takes the 64 base features nearest to its text u for its images: mu = (their sum + 16 u) / 80, their
    covariance centred at u, as released, shrunk as above, averaged over the new classes; alpha is the base classes'.
    Departures from the released code: fewer than 64 base features all count, where it fails; exp(logit scale) where it
    has 100, the same for OpenAI's weights; a class without images has mu = 0; alpha is never chosen on test images.
    """

    name = "gda"
    Options = GdaOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: GdaOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = text_features(backbone, *prompts_of(self))
        self.weight, self.bias = torch.zeros_like(self.text), self.text.new_zeros(len(self.text))
        self.alpha = torch.zeros((), device=self.text.device)
        self.features = self.text.new_empty(0, self.text.shape[1])

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the zero-shot logits plus the weighted Gaussian ones."""
        f = unit(features.to(self.text.device))
        return scaled_cosine(self.backbone, f, self.text) + self.alpha * (f @ self.weight.T + self.bias)

    @torch.no_grad()
    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Compute means and covariance, then choose alpha on `val`."""
        if self.options.alpha is None and not len(val):
            raise CoopError("method=gda chooses alpha on validation images, and there are none: give alpha")
        views, labels = all_views(train)
        self.features, labels = unit(views.to(self.text.device)), labels.to(self.text.device)
        means = class_means(self.features, labels, len(self.text))
        if self.options.covariance == "pooled":
            inverse = shrunk_inverse(self.features - means[labels])
        else:
            inverse = torch.linalg.pinv(mean_covariance(self.features, labels, len(self.text)))
        self.weight, self.bias = discriminant(means, inverse)
        return self.choose_alpha(val)

    def choose_alpha(self, val: Samples) -> dict[str, Any]:
        """Take the given alpha, or the first best on `val`."""
        if self.options.alpha is not None:
            self.alpha.fill_(self.options.alpha)
            return {"alpha": self.options.alpha}
        accuracies = []
        for alpha in ALPHAS:
            self.alpha.fill_(alpha)
            accuracies.append(accuracy(self, val))
        best = max(range(len(ALPHAS)), key=accuracies.__getitem__)
        self.alpha.fill_(ALPHAS[best])
        found = {"val_accuracy": accuracies[best], "val_accuracies": accuracies, "settings_tried": len(ALPHAS)}
        return {"alpha": ALPHAS[best], **found}

    @torch.no_grad()
    def for_classes(self, classes: Classes) -> PerClassMethod:
        """Return the logits of some of the learned classes, or of new ones, by the base features near their texts."""
        if set(classes.names) <= set(self.classes.names):
            return super().for_classes(classes)
        new = Gda(self.backbone, classes, self.options, self.seed)
        new.alpha, new.features = self.alpha, self.features
        if not len(self.features):  # nothing is learned yet
            return new
        near = (new.text @ self.features.T).topk(min(NEIGHBOURS, len(self.features)), dim=1).indices
        k = near.shape[1]
        means = (self.features[near].sum(dim=1) + TEXT_COPIES * new.text) / (k + TEXT_COPIES)
        inverse = torch.zeros_like(means[0].outer(means[0]))
        for text, rows in zip(new.text, track(near, "covariances of new classes", len(near)), strict=True):
            inverse += shrunk_inverse(self.features[rows] - text) / len(near)
        new.weight, new.bias = discriminant(means, inverse)
        return new

    def state(self) -> dict[str, Tensor]:
        """Return `weight` (c, e), `bias` (c,), `alpha` (), and the unit `features` (n, e) that new classes draw on."""
        return {"weight": self.weight, "bias": self.bias, "alpha": self.alpha, "features": self.features}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of `state`. Raises CoopError where a name or a shape does not fit."""
        n = len(state["features"]) if "features" in state else 0
        expected = {**self.state(), "features": self.features.new_empty(n, self.text.shape[1])}
        load_parameters(self.name, expected, state)
        self.features = expected["features"]


def shrunk_inverse(centred: Float[Tensor, "n e"]) -> Float[Tensor, "e e"]:
    """Return e pinv(S + tr(S) / (n - 1) I) with S = Z^T Z of centred features Z: the empirical Bayes ridge."""
    n, e = centred.shape
    scatter = centred.T @ centred
    shrinkage = scatter.trace() / max(n - 1, 1)
    return e * torch.linalg.pinv(scatter + shrinkage * torch.eye(e, device=scatter.device))


def mean_covariance(features: Float[Tensor, "n e"], labels: Int[Tensor, " n"], n_classes: int) -> Float[Tensor, "e e"]:
    """Return the mean of the classes' covariances, each divided by its n_c - 1.

    Classes with less than two features do not count. Raises CoopError if there are no others.
    """
    of_class = [features[labels == c] for c in range(n_classes)]
    covariances = [f.T.cov() for f in of_class if len(f) > 1]
    if not covariances:
        raise CoopError("covariance=per_class needs two views of a class's images: give more shots or augment.views")
    return torch.stack(covariances).mean(dim=0)


def discriminant(
    means: Float[Tensor, "c e"], inverse: Float[Tensor, "e e"]
) -> tuple[Float[Tensor, "c e"], Float[Tensor, " c"]]:
    """Return the weights and biases of classes with these means, a common inverse covariance and equal priors."""
    weight = means @ inverse
    return weight, -math.log(len(means)) - (means * weight).sum(dim=1) / 2
