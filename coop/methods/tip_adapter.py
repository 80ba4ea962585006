"""The few shots as a key-value cache: Tip-Adapter (Zhang et al., ECCV 2022) and APE (Zhu et al., ICCV 2023).

logits = exp(logit scale) * f . W + alpha * exp(-beta (1 - f . K)) V, with f the unit image feature, W (c, e) the unit
features of the hand-written prompts, K (k, e) those of the shots, V (k, c) their labels, one-hot.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from coop.methods.base import Classes, TrainedMethod, accuracy, class_sums, generator, scaled_cosine
from coop.methods.class_weights import PerClassMethod
from coop.options import ApeOptions, ApeTOptions, MethodOptions, TipAdapterFOptions, TipAdapterOptions
from coop.train import Batch, cosine_by_step, epoch_batches

ELEMENTS = 2**24  # numbers in one intermediate tensor
SMALL = 1e-6  # in the divergence of APE


def geometric(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` numbers from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def even(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` evenly spaced numbers from `low`, `high` not among them, as the released codes do."""
    return [low + i * (high - low) / steps for i in range(steps)]


ALPHAS = geometric(0.1, 1000.0, 40)
BETAS = geometric(0.1, 50.0, 40)
GAMMAS = even(0.0, 1.0, 5)


class TipAdapter(PerClassMethod):
    """The cache as it is: K holds the mean of each shot's random views, normalised; alpha and beta are searched for.

    alpha weighs the cache, beta sharpens it. The pair with the best accuracy on validation wins, the lower
    cross-entropy deciding between equals.
    Departures from the released code: one grid for every dataset, spaced by ratio, where it has ranges chosen by hand
    (alpha goes as far as the prompts no longer count: they are no help where zero-shot CLIP is at chance), unless
    `setting=released`; the views are those of training (crops of 8 % of the image and more, not 50 %), unless so; the
    validation sample is the few-shot one (it searches on the whole validation set, and ImageNet's on the test set),
    unless `validation` says so; the zero-shot scale is the model's, not 100.
    """

    name = "tip_adapter"
    Options: ClassVar[type[MethodOptions]] = TipAdapterOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = self.text_features()
        self.alpha, self.beta, self.gamma = 0.0, 1.0, 0.0
        self.load_cache(self.text.new_empty(0, self.text.shape[1]), torch.empty(0, dtype=torch.int64))

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fill the cache and choose alpha and beta."""
        self.resolve_options(train)
        self.fill_cache(train)
        return self.choose(val)

    def fill_cache(self, train_set: Samples) -> None:
        """Take the keys and their labels from the shots."""
        views = train_set.views[: self.options.key_views] if train_set.fresh else train_set.views
        shots = views.mean(dim=0) if len(views) else train_set.test_view
        self.load_cache(F.normalize(shots.to(self.device).float(), dim=-1), train_set.labels)

    def load_cache(self, keys: Float[Tensor, "k e"], labels: Int[Tensor, " k"]) -> None:
        """Take keys and labels, and what follows from them."""
        self.keys = nn.Parameter(keys.to(self.device).float())
        self.key_labels = labels.to(self.device)
        self.one_hot = F.one_hot(self.key_labels, len(self.classes.names)).float()

    def prompt_logits(self, f: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the hand-written prompts' logits of unit features."""
        return scaled_cosine(self.backbone, f, self.text)

    def affinity(self, f: Float[Tensor, "b e"]) -> Float[Tensor, "b k"]:
        """Return f . K for unit features."""
        return f @ self.keys.T

    def values(self, gammas: Sequence[float]) -> Float[Tensor, "g k c"]:
        """Return V for each gamma; here it is the same for all."""
        return self.one_hot[None]

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in what is learned."""
        f = F.normalize(features.to(self.device).float(), dim=-1)
        cached = torch.exp(-self.beta * (1 - self.affinity(f))) @ self.values([self.gamma])[0]
        return self.prompt_logits(f) + self.alpha * cached

    @torch.no_grad()
    def logits(self, inputs: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return the scores, computed in parts."""
        parts = inputs.split(max(ELEMENTS // max(len(self.keys), 1), 1))
        return torch.cat([super(TipAdapter, self).logits(part) for part in parts])

    def choose(self, val: Samples) -> dict[str, Any]:
        """Take the given numbers (alpha, beta, for APE also gamma), or search for them on `val`."""
        o = self.options
        given = {name: getattr(o, name) for name in ("alpha", "beta", "gamma") if hasattr(o, name)}
        if o.alpha is not None:
            self.set_numbers(**given)
            return given
        best = self.search(val)
        self.set_numbers(best.alpha, best.beta, best.gamma)
        return {name: getattr(best, name) for name in given} | {"val_accuracy": best.accuracy, "tried": best.tried}

    def set_numbers(self, alpha: float, beta: float, gamma: float = 0.0) -> None:
        """Set alpha, beta and gamma."""
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    @torch.no_grad()
    def search(self, val: Samples) -> "Found":
        """Return the best alpha, beta and gamma on `val`."""
        f = F.normalize(val.test_view.to(self.device).float(), dim=-1)
        o = self.options
        gammas = GAMMAS if hasattr(o, "gamma") else [0.0]
        if o.search_scale is None:
            grid, by_loss = (ALPHAS, BETAS, gammas), True
        else:
            lows = (0.1, 0.1, 0.0)
            beta, alpha, *gamma = (even(*x) for x in zip(lows, o.search_scale, o.search_step, strict=False))
            grid, by_loss = (alpha, beta, gamma[0] if gamma else gammas), False
        return search(self.prompt_logits(f), self.affinity(f), self.values(grid[2]), val.labels, grid, by_loss)

    def tensors(self, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the learned tensors for a cache of `k` shots."""
        return {"keys": (k, self.text.shape[1]), "labels": (k,), "alpha_beta": (2,)}

    def state(self) -> dict[str, Tensor]:
        """Return `keys` (k, e), their `labels` (k,), and `alpha_beta` (2,)."""
        pair = torch.tensor([self.alpha, self.beta], dtype=torch.float64)
        return {"keys": self.keys.detach(), "labels": self.key_labels, "alpha_beta": pair}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a cache. Raises CoopError where it is not one of this method, width and classes."""
        c = len(self.classes.names)
        expected = self.tensors(len(state.get("labels", ())))
        if set(state) != set(expected):
            raise CoopError(f"method={self.name} expected {', '.join(expected)}, found {', '.join(sorted(state))}")
        if any(tuple(state[name].shape) != shape for name, shape in expected.items()) or (state["labels"] >= c).any():
            raise CoopError(
                f"method={self.name}: a cache of shape {tuple(state['keys'].shape)} with {len(state['labels'])} labels "
                f"does not fit {c} classes and features of width {self.text.shape[1]}"
            )
        self.load_cache(state["keys"], state["labels"])
        self.set_numbers(*(float(x) for x in state["alpha_beta"]))


class TrainedCache(TipAdapter, TrainedMethod):
    """What Tip-Adapter-F and APE-T share: AdamW with a cosine by step, and how alpha, beta and the epoch are chosen.

    While training, alpha and beta are `train_alpha` and `train_beta`, or those that the untrained cache finds on
    validation; after it they are searched for again.
    """

    drop_last = False

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fill the cache, train, then choose alpha and beta."""
        self.resolve_options(train)
        o = self.options
        if o.keep == "best" and not len(val):
            raise CoopError("keep=best chooses the epoch on validation images, and there are none: use keep=last")
        self.fill_cache(train)
        if o.train_alpha is not None:
            self.set_numbers(o.train_alpha, o.train_beta)
        else:
            self.choose(val)
        pair = (self.alpha, self.beta)
        self.best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
        notes = TrainedMethod.fit(self, train, val) | {"train_alpha": pair[0], "train_beta": pair[1]}
        accuracy_of_best, epoch, parameters = self.best
        if not parameters:
            return notes | self.choose(val)
        for name, parameter in self.parameters().items():
            parameter.data.copy_(parameters[name])
        notes |= self.choose(val) | {"best_epoch": epoch, "best_epoch_accuracy": accuracy_of_best}
        if accuracy(self, val) < accuracy_of_best:
            self.set_numbers(*pair)
        return notes | {"alpha": self.alpha, "beta": self.beta}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the released epsilon, which half precision asked for."""
        o = self.options
        return torch.optim.AdamW(self.trainable(), lr=o.lr, eps=o.eps, weight_decay=o.weight_decay)

    def rates(self, per_epoch: int) -> list[float]:
        """Return a cosine by step."""
        o = self.options
        return cosine_by_step((o.epochs or 0) * per_epoch, o.lr, o.warmup_epochs * per_epoch, o.warmup_lr)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield the batches of all epochs; where each epoch has its own view, those after the keys'."""
        o = self.options
        first = o.key_views if train_set.fresh else 0
        return epoch_batches(train_set, o.epochs or 0, o.batch_size, generator(self.seed), self.drop_last, first)

    def after_epoch(self, epoch: int, val: Samples) -> None:
        """Remember the parameters if they are the best on `val` so far, where `keep=best`."""
        if self.options.keep == "best":
            now = accuracy(self, val)
            if now > self.best[0]:
                self.best = (now, epoch, {name: p.detach().clone() for name, p in self.parameters().items()})


class TipAdapterF(TrainedCache):
    """Tip-Adapter whose keys K are trained by cross-entropy, starting as the cache, and not normalised again.

    Departures from the released code: it keeps the epoch with the best test accuracy, and trains with beta = 1 and an
    alpha from 1.17 to 10 chosen by hand for each dataset; `setting=released validation=test` does so too, with its
    crops, grid and numbers of epochs, alpha and beta then being searched for on the test set as well (released: on the
    validation set; ImageNet: on the test set).
    """

    name = "tip_adapter_f"
    Options = TipAdapterFOptions

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `keys` (k, e)."""
        return {"keys": self.keys}


class Ape(TipAdapter):
    """Adaptive prior refinement without training: the cache on the feature channels that tell classes apart.

    Kept are the channels with the largest -w_0 sim_j + w_1 var_j: sim_j the mean over pairs of members of different
    classes (their prompt feature and their keys) of the product of entries j, var_j the variance of entry j over the
    prompt features. Affinities are cosines on the kept channels. Shot i has the value exp(gamma D_i), with D_i the
    divergence of its label from the softmax of its cosines with the prompts there (no temperature), in bits.
    alpha, beta and gamma are searched for on validation. The prompts' part keeps all channels.
    Departures from the released code: the share of kept channels, their weights and the grid are the same for all
    datasets, unless `setting=released`; shots need not be equal in number or sorted. Its text features also average
    sentences of a language model (CuPL): template="a photo of a {}.+file:prompts.json".
    """

    name = "ape"
    Options: ClassVar[type[MethodOptions]] = ApeOptions
    keys_count: ClassVar[bool] = True  # whether the criterion also looks at the keys

    def load_cache(self, keys: Float[Tensor, "k e"], labels: Int[Tensor, " k"]) -> None:
        """Take keys and labels; choose the channels and weigh the shots."""
        super().load_cache(keys, labels)
        o = self.options
        members, of_class = self.text, torch.arange(len(self.text), device=self.device)
        if self.keys_count:
            members = torch.cat([members, self.keys.detach()])
            of_class = torch.cat([of_class, self.key_labels])
        criterion = o.variance_weight * self.text.var(dim=0) - o.similarity_weight * similarity(members, of_class)
        kept = max(round(o.channels * self.text.shape[1]), 1)
        self.channels = criterion.topk(kept).indices
        p = (self.kept(self.keys.detach()) @ self.kept(self.text).T).softmax(dim=1)
        divergence = (self.one_hot * torch.log2((self.one_hot + SMALL) / (p + SMALL))).sum(dim=1)
        self.divergence = divergence

    def kept(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n q"]:
        """Return the kept channels, normalised."""
        return F.normalize(features[:, self.channels], dim=-1)

    def affinity(self, f: Float[Tensor, "b e"]) -> Float[Tensor, "b k"]:
        """Return the cosines with the keys on the kept channels."""
        return self.kept(f) @ self.kept(self.keys).T

    def values(self, gammas: Sequence[float]) -> Float[Tensor, "g k c"]:
        """Return exp(gamma D_i) at each shot's label."""
        weights = torch.exp(self.divergence.new_tensor(gammas)[:, None] * self.divergence)
        return weights[:, :, None] * self.one_hot

    def tensors(self, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the learned tensors for a cache of `k` shots."""
        return {name: (3,) if name == "alpha_beta" else shape for name, shape in super().tensors(k).items()}

    def state(self) -> dict[str, Tensor]:
        """Return `keys` (k, e), their `labels` (k,), and `alpha_beta` (3,): alpha, beta and gamma."""
        numbers = torch.tensor([self.alpha, self.beta, self.gamma], dtype=torch.float64)
        return super().state() | {"alpha_beta": numbers}


class ApeT(TrainedCache, Ape):
    """APE with a trained residual r (c, q) on the kept channels of prompts and keys, and a trained value v (k).

    logits = exp(logit scale) * f . (W + r) + alpha * exp(-beta (1 - f . (K + r))) (v Y), on all channels: a key gets
    the residual of its class, and nothing is normalised again. r starts at 0, v at 1; the prompts alone give the
    channels. AdamW with weight decay 0.1, cosine by step.
    Departures from the released code: where it fails (its number of trained channels must be that of APE's) the share
    `channels` counts; alpha, the learning rate and the epochs are the same for all datasets, unless `setting=released`.
    """

    name = "ape_t"
    Options = ApeTOptions
    keys_count = False

    def load_cache(self, keys: Float[Tensor, "k e"], labels: Int[Tensor, " k"]) -> None:
        """Take keys and labels, choose the channels, and start the residual and the values."""
        super().load_cache(keys, labels)
        self.residual = nn.Parameter(self.text.new_zeros(len(self.text), len(self.channels)))
        self.value_weights = nn.Parameter(self.text.new_ones(len(self.keys)))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `residual` (c, q) and `value_weights` (k,)."""
        return {"residual": self.residual, "value_weights": self.value_weights}

    def prompt_logits(self, f: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits of the prompts with their residual."""
        return scaled_cosine(self.backbone, f, self.text.index_add(1, self.channels, self.residual))

    def affinity(self, f: Float[Tensor, "b e"]) -> Float[Tensor, "b k"]:
        """Return the products with the keys and their classes' residuals."""
        return f @ self.keys.detach().index_add(1, self.channels, self.residual[self.key_labels]).T

    def values(self, gammas: Sequence[float]) -> Float[Tensor, "g k c"]:
        """Return each shot's trained value at its label."""
        return (self.value_weights[:, None] * self.one_hot)[None]

    def tensors(self, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the learned tensors for a cache of `k` shots."""
        own = {"residual": tuple(self.residual.shape), "value_weights": (k,)}
        return TipAdapter.tensors(self, k) | own

    def state(self) -> dict[str, Tensor]:
        """Return Tip-Adapter's tensors and the parameters."""
        return TipAdapter.state(self) | {name: p.detach() for name, p in self.parameters().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a cache and the parameters."""
        super().load_state(state)
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])


def similarity(members: Float[Tensor, "m e"], labels: Int[Tensor, " m"]) -> Float[Tensor, " e"]:
    """Return, for each channel, the mean product of two members' entries over all pairs of different classes."""
    n_classes = int(labels.max()) + 1
    sums = class_sums(members, labels, n_classes)
    counts = labels.bincount(minlength=n_classes).float()
    pairs = counts.sum().square() - counts.square().sum()
    return (sums.sum(dim=0).square() - sums.square().sum(dim=0)) / pairs.clamp(min=1)


@dataclass(frozen=True)
class Found:
    """What a search found: alpha, beta and gamma, how well they did, and how many settings were tried."""

    alpha: float
    beta: float
    gamma: float
    accuracy: float
    cross_entropy: float
    tried: int


@torch.no_grad()
def search(
    prompt_logits: Float[Tensor, "n c"],
    affinity: Float[Tensor, "n k"],
    values: Float[Tensor, "g k c"],
    labels: Int[Tensor, " n"],
    grid: tuple[Sequence[float], Sequence[float], Sequence[float]],
    by_loss: bool = True,
) -> Found:
    """Return the alpha, beta and gamma of the grid with the highest accuracy.

    Among equals the lowest cross-entropy decides (`by_loss`), and then the first in the order beta, alpha, gamma.
    `values` are those of each gamma. The settings are computed in blocks of `ELEMENTS` numbers. Raises CoopError if
    there is nothing to score on.
    """
    if not len(labels):
        raise CoopError("searching alpha and beta needs validation images, and there are none: give alpha and beta")
    alphas, betas, gammas = grid
    labels = labels.to(prompt_logits.device)
    numbers = torch.tensor(alphas, device=prompt_logits.device)
    correct, losses = [], []
    for beta in track(betas, "searching alpha and beta", len(betas)):
        cached = torch.exp(-beta * (1 - affinity)) @ values
        for some in numbers.split(max(ELEMENTS // cached.numel(), 1)):
            logits = (prompt_logits + some[:, None, None, None] * cached).flatten(0, 1)
            correct.append((logits.argmax(dim=2) == labels).sum(dim=1))
            if by_loss:
                true = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0]
                losses.append((logits.logsumexp(dim=2) - true).mean(dim=1))
    hits = torch.cat(correct)
    cross_entropy = torch.cat(losses) if by_loss else torch.zeros_like(hits, dtype=torch.float32)
    best = int(torch.where(hits == hits.max(), cross_entropy, torch.inf).argmin())
    b, rest = divmod(best, len(alphas) * len(gammas))
    a, g = divmod(rest, len(gammas))
    accuracy = int(hits[best]) / len(labels)
    return Found(alphas[a], betas[b], gammas[g], accuracy, float(cross_entropy[best]), len(hits))
