"""Tip-Adapter and Tip-Adapter-F: the few shots as a key-value cache (Zhang et al., ECCV 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.io import track
from coop.methods.base import Classes, Method, TrainedMethod, scaled_cosine
from coop.options import TipAdapterFOptions, TipAdapterOptions
from coop.train import cosine_by_step

ELEMENTS = 2**24  # numbers in one intermediate tensor


def geometric(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` numbers from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


ALPHAS = geometric(0.1, 1000.0, 40)
BETAS = geometric(0.1, 50.0, 40)


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
        self.text = self.text_features()
        self.keys = nn.Parameter(self.text.new_empty(0, self.text.shape[1]))
        self.key_labels = torch.empty(0, dtype=torch.int64, device=self.text.device)
        self.alpha, self.beta = 0.0, 1.0

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fill the cache and choose alpha and beta."""
        self.fill_cache(train)
        return self.choose_pair(val)

    def fill_cache(self, train_set: Samples) -> None:
        """Take the keys and their labels from the shots."""
        shots = train_set.views.mean(dim=0) if len(train_set.views) else train_set.test_view
        self.keys = nn.Parameter(F.normalize(shots.to(self.text.device).float(), dim=-1))
        self.key_labels = train_set.labels.to(self.text.device)

    def choose_pair(self, val: Samples) -> dict[str, Any]:
        """Take the given alpha and beta, or search for them."""
        if self.options.alpha is not None:
            self.alpha, self.beta = self.options.alpha, self.options.beta
            return {"alpha": self.alpha, "beta": self.beta}
        f = F.normalize(val.test_view.to(self.text.device).float(), dim=-1)
        keys = self.keys.detach()
        best = search(scaled_cosine(self.backbone, f, self.text), f @ keys.T, self.values, val.labels, ALPHAS, BETAS)
        self.alpha, self.beta = best.alpha, best.beta
        return {"alpha": best.alpha, "beta": best.beta, "val_accuracy": best.accuracy}

    @property
    def values(self) -> Float[Tensor, "k c"]:
        """V: each key's label, one-hot."""
        return one_hot(self.key_labels, len(self.classes.names))

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the prompts' logits plus the cache's, differentiable in `keys`."""
        f = F.normalize(features.to(self.device).float(), dim=-1)
        (cached,) = cache_logits(f @ self.keys.T, self.values, f.new_tensor([self.beta]))
        return scaled_cosine(self.backbone, f, self.text) + self.alpha * cached

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return the scores, computed in parts."""
        parts = features.split(max(ELEMENTS // max(len(self.keys), 1), 1))
        return torch.cat([self.scores(part) for part in parts])

    def state(self) -> dict[str, Tensor]:
        """Return `keys` (k, e), their `labels` (k,), and `alpha_beta` (2,)."""
        pair = torch.tensor([self.alpha, self.beta], dtype=torch.float64)
        return {"keys": self.keys.detach(), "labels": self.key_labels, "alpha_beta": pair}

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
        self.keys, self.key_labels = nn.Parameter(keys.to(self.text.device).float()), labels.to(self.text.device)
        self.alpha, self.beta = (float(x) for x in pair)


class TipAdapterF(TipAdapter, TrainedMethod):
    """Tip-Adapter whose keys K are trained by cross-entropy, starting as the cache; alpha and beta are searched after.

    AdamW with a cosine by step, as released. The trained keys are not normalised again.
    Departures from the released code: the last epoch is the result, where it keeps the epoch with the best test
    accuracy; alpha and beta while training are those that Tip-Adapter finds on
    validation, where it has beta = 1 and an alpha from 1.17 to 10 chosen by hand for each dataset.
    """

    name = "tip_adapter_f"
    Options = TipAdapterFOptions
    drop_last = False

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fill the cache, train its keys, then choose alpha and beta."""
        self.fill_cache(train)
        self.alpha, self.beta = self.training_pair(val)
        pair = {"train_alpha": self.alpha, "train_beta": self.beta}
        notes = TrainedMethod.fit(self, train, val)
        return {**notes, **pair, **self.choose_pair(val)}

    def training_pair(self, val: Samples) -> tuple[float, float]:
        """Return alpha and beta while the keys are trained."""
        if self.options.train_alpha is not None:
            return self.options.train_alpha, self.options.train_beta
        self.choose_pair(val)
        return self.alpha, self.beta

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `keys` (k, e)."""
        return {"keys": self.keys}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the released epsilon, which half precision asked for."""
        o = self.options
        return torch.optim.AdamW(self.trainable(), lr=o.lr, eps=1e-4, weight_decay=o.weight_decay)

    def rates(self, per_epoch: int) -> list[float]:
        """Return a cosine by step."""
        o = self.options
        return cosine_by_step((o.epochs or 0) * per_epoch, o.lr, o.warmup_epochs * per_epoch, o.warmup_lr)


@dataclass(frozen=True)
class Pair:
    """`alpha` weighs the cache against the prompts, `beta` sharpens its similarities; how well they did."""

    alpha: float
    beta: float
    accuracy: float
    cross_entropy: float


def cache_logits(
    affinity: Float[Tensor, "n k"], values: Float[Tensor, "k c"], betas: Float[Tensor, " g"]
) -> Float[Tensor, "g n c"]:
    """Return exp(-beta (1 - affinity)) @ values for each beta."""
    return torch.exp(-betas[:, None, None] * (1 - affinity)) @ values


@torch.no_grad()
def search(
    prompt_logits: Float[Tensor, "n c"],
    affinity: Float[Tensor, "n k"],
    values: Float[Tensor, "k c"],
    labels: Int[Tensor, " n"],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Pair:
    """Return the pair with the highest accuracy, among equals the lowest cross-entropy; the first of equals in both.

    All pairs are computed together, in blocks of `ELEMENTS` numbers. Raises CoopError if there is nothing to score on.
    """
    if not len(labels):
        raise CoopError("searching alpha and beta needs validation images, and there are none: give alpha and beta")
    device = prompt_logits.device
    all_alphas, all_betas = torch.tensor(alphas, device=device), torch.tensor(betas, device=device)
    labels = labels.to(device)
    n, c = prompt_logits.shape
    beta_blocks = all_betas.split(max(ELEMENTS // affinity.numel(), 1))
    correct, losses = [], []
    for block in track(beta_blocks, "searching alpha and beta", len(beta_blocks)):
        for cached in cache_logits(affinity, values, block):
            for some in all_alphas.split(max(ELEMENTS // (n * c), 1)):
                logits = prompt_logits + some[:, None, None] * cached
                correct.append((logits.argmax(dim=2) == labels).sum(dim=1))
                true = logits.gather(2, labels.expand(len(some), -1)[:, :, None])[:, :, 0]
                losses.append((logits.logsumexp(dim=2) - true).mean(dim=1))
    hits, cross_entropy = torch.cat(correct), torch.cat(losses)
    best = int(torch.where(hits == hits.max(), cross_entropy, torch.inf).argmin())
    b, a = divmod(best, len(alphas))
    return Pair(alphas[a], betas[b], int(hits[best]) / n, float(cross_entropy[best]))


def one_hot(labels: Int[Tensor, " k"], n_classes: int) -> Float[Tensor, "k c"]:
    """Return the cache's values."""
    return F.one_hot(labels, n_classes).float()
