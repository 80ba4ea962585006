"""Tip-Adapter: the few shots as a key-value cache, without training (Zhang et al., ECCV 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.backbone import Backbone
from coop.errors import CoopError
from coop.features import LabelledFeatures
from coop.methods.base import Classes, Method
from coop.methods.cache_search import ELEMENTS, cache_logits, geometric, one_hot, search
from coop.methods.zero_shot import hand_written_features, scaled_cosine
from coop.text.templates import expand_template
from coop.train import Augment

ALPHAS = geometric(0.1, 1000.0, 40)
BETAS = geometric(0.1, 50.0, 40)


@dataclass(frozen=True)
class TipAdapterOptions:
    """`alpha` and `beta`: both None to search for them on validation, or both given."""

    alpha: float | None = None
    beta: float | None = None
    template: str | None = None
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        check_pair(self.alpha, self.beta)
        if self.augment.views == "epochs":
            raise CoopError("method=tip_adapter has no epochs: give augment.views a number")


class TipAdapter(Method):
    """logits = exp(logit scale) * f . W + alpha * exp(-beta (1 - f . K)) V.

    K (k, e) holds the shots' features - the mean over their random views, normalised - V their labels, one-hot, and
    W the hand-written prompts' features; alpha weighs the cache, beta sharpens it. The pair with the best accuracy on
    validation wins, the lower cross-entropy deciding between equals.
    Departures from the released code: one grid for every dataset, spaced by ratio, where it has ranges chosen by hand
    (alpha goes as far as the prompts no longer count: they are no help where zero-shot CLIP is at chance); the views
    are those of training (crops of 8 % of the image and more, not 50 %); the validation sample is the few-shot one (it
    searches on the whole validation set, and ImageNet's on the test set).
    """

    name = "tip_adapter"
    Options: ClassVar[type] = TipAdapterOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        templates = expand_template(options.template, classes.template, classes.dataset)
        self.text = hand_written_features(backbone, templates, classes.names)
        self.keys: Tensor = self.text.new_empty(0, self.text.shape[1])
        self.key_labels = torch.empty(0, dtype=torch.int64, device=self.text.device)
        self.alpha, self.beta = 0.0, 1.0

    def fit(self, train_set: LabelledFeatures, val: LabelledFeatures) -> dict[str, Any]:
        """Fill the cache and choose alpha and beta."""
        self.fill_cache(train_set)
        return self.choose_pair(val)

    def fill_cache(self, train_set: LabelledFeatures) -> None:
        """Take the keys and their labels from the shots."""
        shots = train_set.views.mean(dim=0) if len(train_set.views) else train_set.test_view
        self.keys = F.normalize(shots.to(self.text.device).float(), dim=-1)
        self.key_labels = train_set.labels.to(self.text.device)

    def choose_pair(self, val: LabelledFeatures) -> dict[str, Any]:
        """Take the given alpha and beta, or search for them."""
        if self.options.alpha is not None:
            self.alpha, self.beta = self.options.alpha, self.options.beta
            return {"alpha": self.alpha, "beta": self.beta}
        f = F.normalize(val.test_view.to(self.text.device).float(), dim=-1)
        best = search(
            scaled_cosine(self.backbone, f, self.text), f @ self.keys.T, self.values, val.labels, ALPHAS, BETAS
        )
        self.alpha, self.beta = best.alpha, best.beta
        return {"alpha": best.alpha, "beta": best.beta, "val_accuracy": best.accuracy}

    @property
    def values(self) -> Float[Tensor, "k c"]:
        """V: each key's label, one-hot."""
        return one_hot(self.key_labels, len(self.classes.names))

    def scores(
        self, features: Float[Tensor, "b e"], keys: Float[Tensor, "k e"], alpha: float, beta: float
    ) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in `keys`."""
        f = F.normalize(features.to(self.text.device).float(), dim=-1)
        (cached,) = cache_logits(f @ keys.T, self.values, f.new_tensor([beta]))
        return scaled_cosine(self.backbone, f, self.text) + alpha * cached

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return the prompts' logits plus the cache's."""
        parts = features.split(max(ELEMENTS // max(len(self.keys), 1), 1))
        return torch.cat([self.scores(part, self.keys, self.alpha, self.beta) for part in parts])

    def state(self) -> dict[str, Tensor]:
        """Return `keys` (k, e), their `labels` (k,), and `alpha_beta` (2,)."""
        pair = torch.tensor([self.alpha, self.beta], dtype=torch.float64)
        return {"keys": self.keys, "labels": self.key_labels, "alpha_beta": pair}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the cache back. Raises CoopError where it is not one of this method, width and classes."""
        c = len(self.classes.names)
        keys, labels, pair = (state.get(name) for name in ("keys", "labels", "alpha_beta"))
        if keys is None or labels is None or pair is None or len(state) != 3:
            raise CoopError(f"method={self.name} expected keys, labels, alpha_beta, found {', '.join(sorted(state))}")
        if keys.shape != (len(labels), self.text.shape[1]) or pair.shape != (2,) or (labels >= c).any():
            raise CoopError(
                f"method={self.name}: a cache of shape {tuple(keys.shape)} with {len(labels)} labels does not fit "
                f"{c} classes and features of width {self.text.shape[1]}"
            )
        self.keys, self.key_labels = keys.to(self.text.device).float(), labels.to(self.text.device)
        self.alpha, self.beta = (float(x) for x in pair)


def check_pair(alpha: float | None, beta: float | None, prefix: str = "") -> None:
    """Raise CoopError unless both are numbers from 0 on, or both are left out."""
    if (alpha is None) != (beta is None):
        given = f"{prefix}alpha={alpha} and {prefix}beta={beta}"
        raise CoopError(f"{given}: give both, or neither to search for them on validation")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and not value >= 0:
            raise CoopError(f"{prefix}{name}={value}: give 0 or more")
