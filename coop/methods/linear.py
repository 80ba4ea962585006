"""Linear classifiers on image features: the linear probe, LP++, CLAP and the cross-modal probe."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.io import progress
from coop.methods.base import (
    Classes,
    accuracy,
    class_means,
    generator,
    linear,
    load_parameters,
    prompt_features,
    scaled_cosine,
    text_features,
)
from coop.methods.class_weights import (
    ClassWeightsMethod,
    PerClassMethod,
    all_views,
    prompts_of,
    unit,
)
from coop.options import ClapOptions, CrossModalOptions, LinearProbeOptions, LpPlusPlusOptions
from coop.train import Batch, cosine_by_step

GRID = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)  # powers of ten
BISECTIONS = 8
NEVER = -1e4  # the logit of a class without training images


class LinearProbe(PerClassMethod):
    """logits = f A + b with the A, b that minimise sum_i CE(f_i A + b, y_i) + |A|^2 / (2 C): scikit-learn's L-BFGS.

    f is the test view, not normalised, as released. C maximises the accuracy on validation: the best of a grid from
    1e6 to 1e-6, then 8 bisections between C/10 and 10 C; each C is fitted once. Departure: the few-shot sample is the
    one that every method gets.
    """

    name = "linear_probe"
    Options = LinearProbeOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: LinearProbeOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        c, e = len(classes.names), backbone.joint_width
        self.weight, self.bias = torch.zeros(c, e), torch.zeros(c)

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Fit the regression, choosing C on `val`."""
        x, y = train.test_view[:].cpu().numpy(), train.labels.cpu().numpy()
        if len(np.unique(y)) < 2:
            raise CoopError("method=linear_probe needs training images of at least 2 classes")
        probes = _Probes(x, y, self.options)
        if self.options.C is not None:
            power, notes = math.log10(self.options.C), {}
        elif not len(val):
            raise CoopError("method=linear_probe searches C on validation images, and there are none: give C")
        else:
            power, found = self._search(probes, val)
            notes = {"val_accuracy": found, "settings_tried": len(probes.known)}
        self.weight, self.bias = _rows(probes(power), len(self.classes.names))
        return {"C": 10.0**power, **notes}

    def _search(self, probes: "_Probes", val: Samples) -> tuple[float, float]:
        x, y = val.test_view[:].cpu().numpy(), val.labels.cpu().numpy()
        with progress("searching C", len(GRID) + BISECTIONS + 1) as show:

            def fitted(power: float) -> LogisticRegression:
                probe = probes(power)
                show(len(probes.known))
                return probe

            for power in sorted(GRID):  # the strongest penalty is the easiest, and with warm starts begins the path
                fitted(power)
            return search_c(lambda power: float(fitted(power).score(x, y)))

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the regression's scores."""
        return features.to(self.weight.device).float() @ self.weight.T + self.bias

    def state(self) -> dict[str, Tensor]:
        """Return `weight` (c, e) and `bias` (c,)."""
        return {"weight": self.weight, "bias": self.bias}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the regression back. Raises CoopError where it is not for these classes and this width."""
        load_parameters(self.name, self.state(), state)


def search_c(accuracy: Callable[[float], float]) -> tuple[float, float]:
    """Return the power of ten of the C that the protocol's search finds, and its accuracy.

    The first best of `GRID` gives the bracket C/10 .. 10 C. Each of 8 times the better end is kept, the lower one if
    both are equal, and the other moves to the middle (in powers of ten).
    """
    at = cache(accuracy)
    peak = max(GRID, key=at)
    left, right = peak - 1, peak + 1
    for _ in range(BISECTIONS):
        middle = (left + right) / 2
        if at(left) < at(right):
            kept, left = right, middle
        else:
            kept, right = left, middle
    return kept, at(kept)


class _Probes:
    """The regression for C = 10^power, fitted once; with warm starts, from the nearest solution with a smaller C."""

    def __init__(self, x: np.ndarray, y: np.ndarray, options: LinearProbeOptions) -> None:
        self.x, self.y, self.options = x, y, options
        self.known: dict[float, LogisticRegression] = {}

    def __call__(self, power: float) -> LogisticRegression:
        if power not in self.known:
            warm = self.options.warm_start
            probe = LogisticRegression(C=10.0**power, max_iter=self.options.max_iter, warm_start=warm)
            below = [p for p in self.known if warm and p < power]
            if below:
                start = self.known[max(below)]
                probe.classes_, probe.coef_, probe.intercept_ = start.classes_, start.coef_, start.intercept_
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # `max_iter` ends it, as in the protocol
                self.known[power] = probe.fit(self.x, self.y)
        return self.known[power]


def _rows(probe: LogisticRegression, n_classes: int) -> tuple[Float[Tensor, "c e"], Float[Tensor, " c"]]:
    """Return a row for every class, also of two classes and of those that the shots do not show."""
    coef, intercept = torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float()
    if len(coef) == 1:  # scikit-learn keeps one row for two classes: that of the second against the first
        coef, intercept = torch.cat([torch.zeros_like(coef), coef]), torch.cat([torch.zeros_like(intercept), intercept])
    shown = torch.from_numpy(probe.classes_).long()
    weight, bias = torch.zeros(n_classes, coef.shape[1]), torch.full((n_classes,), NEVER)
    weight[shown], bias[shown] = coef, intercept
    return weight, bias


class LpPlusPlus(ClassWeightsMethod):
    """LP++: logits = f W^T + b + alpha_c (f . t_c), unit f and t, no temperature (Huang et al., CVPR 2024).

    W_c starts at the sum of the class's features, b as PyTorch's linear layer, every alpha_c at 250 times the mean over
    classes of the mean f . t_c. Each of `steps` steps sees all images, F (n, e): (W, b) by SGD with momentum and
    lr = 4 n / lambda_max(F^T F); at every `alpha_every`-th, alpha -= n / (4 max_c sum_i (f_i . t_c)^2) * G.
    As released, G is the sum of alpha's gradients of all steps so far, since nothing clears it, and W starts at a sum
    where the paper has a mean. With validation images the step with the best accuracy is kept, the last of equals, as
    released (which draws as many as there are shots: validation=shots); without, the last.
    Departures from the released code: float32 where it trains in float16; no image is drawn twice for validation; a
    class without images does not count for the first alpha.
    """

    name = "lp_plus_plus"
    Options = LpPlusPlusOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: LpPlusPlusOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = text_features(backbone, *prompts_of(self))
        c, e = self.text.shape
        self.weight = nn.Parameter(torch.zeros_like(self.text))
        self.bias = nn.Parameter(linear(e, c, generator=generator(seed)).bias.detach().to(self.text.device))
        self.alpha = nn.Parameter(self.text.new_zeros(c))
        self.lr, self.lr_alpha = 0.0, 0.0
        self.best: tuple[float, int, dict[str, Tensor]] = (-1.0, -1, {})  # accuracy, step, state

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in W, b and alpha."""
        f = unit(features.to(self.text.device))
        return f @ self.weight.T + self.bias + self.alpha * (f @ self.text.T)

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Set the start and the learning rates from the data, train, keep the best step on `val`."""
        inputs, labels = all_views(train)
        self.start(unit(inputs.to(self.text.device)), labels.to(self.text.device))
        losses = self.run_training(train, val)
        notes: dict[str, Any] = {"lr": self.lr, "lr_alpha": self.lr_alpha, "last_loss": losses[-1]}
        if len(val):
            best_accuracy, step, best = self.best
            self.load_state(best)
            notes |= {"step": step + 1, "val_accuracy": best_accuracy, "settings_tried": len(losses)}
        self.mix()
        return {"steps": len(losses), "first_loss": losses[0], **notes}

    @torch.no_grad()
    def start(self, f: Float[Tensor, "n e"], labels: Int[Tensor, " n"]) -> None:
        """Set W, alpha and both learning rates from unit features; forget an earlier training."""
        self.best, self.alpha.grad = (-1.0, -1, {}), None
        counts = labels.bincount(minlength=len(self.alpha))
        cosines = f @ self.text.T
        of_class = class_means(cosines, labels, len(counts)).diagonal()
        self.weight.copy_(class_means(f, labels, len(counts)) * counts[:, None])
        self.alpha.fill_(250 * of_class[counts > 0].mean())
        self.lr = 4 * len(f) / float(torch.linalg.matrix_norm(f, 2)) ** 2
        self.lr_alpha = len(f) / (4 * float(cosines.square().sum(dim=0).max()))

    def optimizer(self) -> torch.optim.Optimizer:
        """Return SGD for W and b; alpha is none of its parameters, so that its gradient adds up."""
        return torch.optim.SGD([self.weight, self.bias], lr=self.lr, momentum=self.options.momentum)

    def steps_per_epoch(self, train_set: Samples) -> int:
        """Return 1: each step sees all images."""
        return 1

    def rates(self, per_epoch: int) -> list[float]:
        """Return the constant rate of (W, b)."""
        return [self.lr] * self.options.steps

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield all images at every step."""
        return repeat(all_views(train_set), self.options.steps)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move alpha after every `alpha_every`-th step."""
        if (step + 1) % self.options.alpha_every == 0 and self.alpha.grad is not None:
            self.alpha.sub_(self.lr_alpha * self.alpha.grad)

    def after_epoch(self, epoch: int, val: Samples) -> None:
        """Keep the parameters that are best on validation."""
        if len(val) and (found := accuracy(self, val)) >= self.best[0]:
            self.best = found, epoch, {name: tensor.clone() for name, tensor in self.state().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `weight` (c, e), `bias` (c,) and `alpha` (c,)."""
        return {"weight": self.weight, "bias": self.bias, "alpha": self.alpha}

    def zero_shot(self) -> dict[str, Tensor]:
        """Return W = 0, b = 0, alpha = exp(logit scale)."""
        scale = torch.full_like(self.alpha, self.backbone.logit_scale)
        return {"weight": torch.zeros_like(self.weight), "bias": torch.zeros_like(self.bias), "alpha": scale}


class Clap(ClassWeightsMethod):
    """CLAP: logits = exp(logit scale) * cos(f, w_c), loss = CE + mean_c lambda_c |w_c - T_c|^2; w starts at T.

    (Silva-Rodriguez et al., CVPR 2024.) T_c is the mean text feature of the class's prompts, not normalised, with the
    underscores of its name, as released; lambda_c the mean probability that zero-shot CLIP gives to class c on the
    views of its images: classes that CLIP knows well stay near its weights. A batch is drawn from all views of all
    images: each epoch shuffles them and takes max(1, n // batch_size) batches. Nothing is chosen on validation.
    Follows the released code (trainers/adapters.py, constraint "l2"); the paper writes a sum for its mean over classes.
    Departure: lambda of a class without shots is 0 (there it is undefined).
    """

    name = "clap"
    Options = ClapOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ClapOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = text_features(backbone, *prompts_of(self), "raw", underscores=True)
        self.weights = nn.Parameter(self.text.clone())
        self.strength = torch.zeros(len(classes.names), device=self.text.device)

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in the weights."""
        return scaled_cosine(self.backbone, features, unit(self.weights))

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy plus the weighted distance to the zero-shot weights."""
        distance = (self.weights - self.text).square().sum(dim=1)
        return super().loss(features, labels) + (self.strength * distance).mean()

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Measure how well zero-shot CLIP knows each class, then train (`val` is not used)."""
        if self.options.constraint:
            self.strength = self.zero_shot_strength(train)
        return super().fit(train, val)

    @torch.no_grad()
    def zero_shot_strength(self, train_set: Samples) -> Float[Tensor, " c"]:
        """Return lambda: each class's mean zero-shot probability on its own views."""
        inputs, labels = all_views(train_set)
        labels = labels.to(self.text.device)
        probabilities = scaled_cosine(self.backbone, inputs, unit(self.text)).softmax(dim=1)
        return class_means(probabilities, labels, len(self.text)).diagonal().clone()

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield the batches of all epochs, from the views of all images."""
        inputs, labels = all_views(train_set)
        random, size = generator(self.seed), self.options.batch_size
        for _ in range(self.options.epochs or 0):
            order = torch.randperm(len(labels), generator=random).to(labels.device)
            for chosen in order.split(size)[: self.steps_per_epoch(train_set)]:
                yield inputs[chosen], labels[chosen]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `weights` (c, e)."""
        return {"weights": self.weights}

    def zero_shot(self) -> dict[str, Tensor]:
        """Return the text features."""
        return {"weights": self.text}


class Setting(NamedTuple):
    """One cell of the cross-modal probe's grid."""

    lr: float
    weight_decay: float
    batch_size: int


LRS, WEIGHT_DECAYS, BATCH_SIZES = (1e-3, 1e-4), (0.0, 1e-2, 1e-4), (8, 32)


class CrossModal(ClassWeightsMethod):
    """logits = exp(logit scale) * W unit(f), W trained on images and prompts alike (Lin et al., CVPR 2023).

    A training sample is an image's feature (test view or mirror image) or the feature of one prompt of a class; W_c
    starts at the unit mean of the class's prompts (features averaged as they are). Half of a batch is images, half
    prompts, each from its own shuffled list, which starts again when less than a batch is left. AdamW, linear warm-up,
    cosine by step. With validation images, the accuracy after steps 0, `eval_every`, ... decides which weights are
    kept, the first of equals, then which setting of the grid of lr, weight_decay and batch_size, in this order; a
    batch_size whose half is not smaller than both sets is left out. Without them all three must be given, and the last
    step is the result. Departures from the released code: where no batch_size of the grid fits, the largest that does
    is taken; its shell script starts from random weights, the README's commands and the evaluation from these.
    """

    name = "cross_modal"
    Options = CrossModalOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: CrossModalOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.prompts, self.prompt_labels = prompt_features(backbone, *prompts_of(self))
        self.text = unit(class_means(self.prompts, self.prompt_labels, len(classes.names)))
        self.weight = nn.Parameter(self.text.clone())
        self.setting = Setting(0.0, 0.0, 0)
        self.best: tuple[float, int, Tensor] = (-1.0, -1, self.text)  # accuracy, step, weight of one setting

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in W."""
        return scaled_cosine(self.backbone, features, self.weight)

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train with every setting, keep the best step of the best one."""
        settings = self.settings(train)
        if not len(val) and len(settings) > 1:
            raise CoopError(
                "method=cross_modal chooses lr, weight_decay and batch_size on validation images, and there are none: "
                "give all three"
            )
        kept: tuple[float, dict[str, Any], Tensor] | None = None
        for self.setting in settings:
            self.best = (-1.0, -1, self.text)
            self.load_state({"weight": self.text})
            losses = self.run_training(train, val)
            found, step, weight = self.best if len(val) else (-1.0, len(losses) - 1, self.weight.detach().clone())
            if kept is None or found > kept[0]:
                ends = {"first_loss": losses[0], "last_loss": losses[-1]}
                kept = found, {**self.setting._asdict(), "step": step + 1, "steps": len(losses), **ends}, weight
        assert kept is not None
        best_accuracy, notes, weight = kept
        self.load_state({"weight": weight})
        self.mix()
        looks = len(range(0, self.options.steps, self.options.eval_every))
        chosen = {"settings_tried": len(settings) * looks, "val_accuracy": best_accuracy} if len(val) else {}
        return {**notes, **chosen}

    def settings(self, train_set: Samples) -> list[Setting]:
        """Return the settings to try. Raises CoopError where a given batch size does not fit the sample."""
        n_images, o = len(all_views(train_set)[1]), self.options
        smallest = min(n_images, len(self.prompts)) if o.texts else n_images
        lrs = LRS if o.lr is None else (o.lr,)
        weight_decays = WEIGHT_DECAYS if o.weight_decay is None else (o.weight_decay,)
        batch_sizes = [size for size in BATCH_SIZES if self.part(size) < smallest]
        largest = (smallest - 1) * (2 if o.texts else 1)
        if o.batch_size is not None:
            batch_sizes = [o.batch_size]
        elif not batch_sizes:
            batch_sizes = [largest]
        if not 0 < batch_sizes[0] <= largest:
            prompts = f" and {len(self.prompts)} prompts" if o.texts else ""
            raise CoopError(
                f"method=cross_modal: a batch_size of {batch_sizes[0]} does not fit {n_images} views of images{prompts}"
                f": give {largest} or less, or more shots or templates"
            )
        return [Setting(*values) for values in product(lrs, weight_decays, batch_sizes)]

    def part(self, batch_size: int) -> int:
        """Return the number of images in a batch; with texts there are as many prompts."""
        return batch_size // 2 if self.options.texts else batch_size

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW; fused, since the steps are many and small."""
        lr, weight_decay = self.setting.lr, self.setting.weight_decay
        return torch.optim.AdamW(self.trainable(), lr=lr, weight_decay=weight_decay, fused=True)

    def steps_per_epoch(self, train_set: Samples) -> int:
        """Return 1: the length is given in steps."""
        return 1

    def rates(self, per_epoch: int) -> list[float]:
        """Return the warm-up (its first step at `warmup_lr`) and a cosine that stops before 0."""
        o = self.options
        return cosine_by_step(o.steps, self.setting.lr, o.warmup_steps, o.warmup_lr, linear=True)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield images and prompts, half and half."""
        inputs, labels = all_views(train_set)
        random, size = generator(self.seed), self.part(self.setting.batch_size)
        images, prompts = (_endless(len(of), size, random) for of in (labels, self.prompt_labels))
        for _ in range(self.options.steps):
            i = next(images).to(labels.device)
            if not self.options.texts:
                yield inputs[i], labels[i]
                continue
            t = next(prompts).to(self.prompts.device)
            features = torch.cat([inputs[i].to(self.prompts.device).float(), self.prompts[t]])
            yield features, torch.cat([labels[i].to(self.prompts.device), self.prompt_labels[t]])

    def after_epoch(self, epoch: int, val: Samples) -> None:
        """Keep the weights that are best on validation, at steps 0, `eval_every`, ..."""
        if len(val) and epoch % self.options.eval_every == 0 and (found := accuracy(self, val)) > self.best[0]:
            self.best = found, epoch, self.weight.detach().clone()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `weight` (c, e)."""
        return {"weight": self.weight}

    def zero_shot(self) -> dict[str, Tensor]:
        """Return the unit text features."""
        return {"weight": self.text}


def _endless(n: int, size: int, random: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Yield `size` of n rows at a time, in shuffled passes; less than `size` at the end of a pass is dropped."""
    while True:
        yield from torch.randperm(n, generator=random)[: n - n % size].split(size)
