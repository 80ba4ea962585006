"""The contract of every method, and what methods share: class features, cosine logits, training on batches.

A method reads one kind of cached input (`reads`), is fitted on a few-shot sample, and answers logits. What it learns is
its own: the backbone, shared by all runs of a sweep, never changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.prompts import PROMPT_FILE, expand_template, read_prompt_file
from coop.errors import CoopError
from coop.features import Samples
from coop.io import track
from coop.options import MethodOptions, Training
from coop.train import Batch, epoch_batches, learning_rates, sgd, steps_per_epoch, train

Average = Literal["unit", "raw"]
M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Classes:
    """The classes to tell apart: their names, and the hand-written template of their dataset."""

    names: tuple[str, ...]
    template: str = "a photo of a {}."
    dataset: str = ""


class Method(ABC):
    """A classifier of images.

    A method is made for `classes`, fitted on a few-shot sample (unless `trains` is false), and then answers `logits`.
    Its learned tensors are `state()`; the same constructor call and `load_state` give the same logits again.
    `seed` is the only randomness. `Options` (coop/options.py) holds the settings, and says which tap of the cache the
    method reads, and whether it trains and uses a validation sample.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        self.backbone, self.classes, self.options, self.seed = backbone, classes, options, seed

    @property
    def device(self) -> torch.device:
        """The backbone's device, where the method computes."""
        return self.backbone.device

    def resolve_options(self, train_set: Samples) -> None:
        """Complete options that were made by hand; the shots are the number of images of the largest class."""
        shots = int(train_set.labels.bincount().max()) if len(train_set) else 0
        self.options = self.options.resolved(shots, self.classes.dataset)

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Learn from `train`, choosing hyper-parameters on `val` only; return what is worth recording in the result."""
        return {}

    @abstractmethod
    def logits(self, inputs: Shaped[Tensor, "n *row"]) -> Float[Tensor, "n c"]:
        """Return the scaled logits of images, given as the cache's rows of the tap that the method reads."""

    def state(self) -> dict[str, Tensor]:
        """Return the learned tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load learned tensors. Raises CoopError where a name or a shape does not fit."""
        if state:
            raise CoopError(f"method={self.name} learns nothing, but the file holds {', '.join(sorted(state))}")

    def for_classes(self, classes: Classes) -> "Method":
        """Return this method, as learned, for other classes. Raises CoopError if what it learned does not move."""
        raise CoopError(f"method={self.name} learns something for each class: it cannot be moved to other classes")

    def moved(self: M, classes: Classes) -> M:
        """Return a new method of the same options and learned tensors for other classes: a body for `for_classes`."""
        method = type(self)(self.backbone, classes, self.options, self.seed)
        method.load_state(self.state())
        return method

    def text_features(self, average: Average = "unit", underscores: bool = False) -> Float[Tensor, "c e"]:
        """Return the class features of the option `template`; see the function `text_features`."""
        return text_features(self.backbone, self.classes, self.options.template, average, underscores)


class CosineClassifier(Method):
    """A method with one feature per class: logits = exp(logit scale) * cos(f, w_c) + logit bias."""

    _class_features: Tensor | None = None

    @abstractmethod
    def class_features(self) -> Float[Tensor, "c e"]:
        """Return w, normalised, differentiable in what is learned."""

    def scores(self, inputs: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in what is learned."""
        return scaled_cosine(self.backbone, inputs, self.class_features())

    @torch.no_grad()
    def logits(self, inputs: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return scaled cosine similarities; the class features are computed once."""
        if self._class_features is None:
            self._class_features = self.class_features()
        return scaled_cosine(self.backbone, inputs, self._class_features)

    def reset_cache(self) -> None:
        """Drop the class features."""
        self._class_features = None


class TrainedMethod(Method):
    """A method whose `parameters` are trained on batches; its Options extend `coop.options.Training`.

    A method states `parameters` and `scores`; the loss is their cross-entropy unless it overrides `loss`. `fit` is
    CoOp's protocol: SGD, constant warm-up, cosine by epoch, the last epoch is the result. A method that departs
    overrides one part: `trainable`, `optimizer`, `steps_per_epoch`, `rates`, `batches`, `backward`, `after_step`,
    `after_epoch`. A method of several stages calls `run_training` once for each.
    """

    drop_last: ClassVar[bool] = True  # whether an incomplete last batch is left out, unless it is the only one

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the learned tensors by name: what is trained, saved and loaded."""

    @abstractmethod
    def scores(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in the parameters."""

    def loss(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy."""
        return F.cross_entropy(self.scores(inputs), labels.to(self.device))

    @torch.no_grad()
    def logits(self, inputs: Shaped[Tensor, "n *row"]) -> Float[Tensor, "n c"]:
        """Return the scores, without gradients."""
        return self.scores(inputs)

    def trainable(self) -> list[nn.Parameter]:
        """Return those of the parameters that training changes."""
        return list(self.parameters().values())

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser; the protocol's SGD."""
        return sgd(self.trainable(), self.options)

    def steps_per_epoch(self, train_set: Samples) -> int:
        """Return the number of batches in an epoch."""
        return steps_per_epoch(len(train_set), self.options.batch_size, self.drop_last)

    def rates(self, per_epoch: int) -> list[float]:
        """Return the learning rate of every step, for `per_epoch` steps in an epoch."""
        o: Training = self.options
        return learning_rates(o.epochs or 0, per_epoch, o.lr, o.warmup_epochs, o.warmup_lr)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield the batches of all epochs, as many as there are rates."""
        o: Training = self.options
        return epoch_batches(train_set, o.epochs or 0, o.batch_size, generator(self.seed), self.drop_last)

    def backward(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Compute the gradients of one step; return its loss."""
        loss = self.loss(inputs, labels)
        loss.backward()
        return loss.detach()

    def after_step(self, step: int) -> None:
        """Do what follows the optimiser's step, counted from 0."""

    def after_epoch(self, epoch: int, val: Samples) -> None:
        """Do what follows the last step of an epoch, counted from 0; `logits` answers with the current parameters."""

    def reset_cache(self) -> None:
        """Drop what was computed from the parameters' former values."""

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train; return the number of steps and the first and last loss."""
        losses = self.run_training(train, val)
        return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]} if losses else {"steps": 0}

    def run_training(self, train_set: Samples, val: Samples) -> list[float]:
        """Train with the parts that this method defines; return every step's loss."""
        self.resolve_options(train_set)
        per_epoch = self.steps_per_epoch(train_set)

        def after_step(step: int) -> None:
            self.after_step(step)
            if (step + 1) % per_epoch == 0:
                self.reset_cache()
                self.after_epoch(step // per_epoch, val)

        batches, rates = self.batches(train_set), self.rates(per_epoch)
        losses = train(self.optimizer(), self.backward, batches, rates, self.name, after_step)
        self.reset_cache()
        return losses

    def state(self) -> dict[str, Tensor]:
        """Return the parameters."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the parameters. Raises CoopError where a name or a shape is not this method's."""
        load_parameters(self.name, self.parameters(), state)
        self.reset_cache()


def prompt_features(
    backbone: Backbone, classes: Classes, template: str | None, underscores: bool = False
) -> tuple[Float[Tensor, "s e"], Int[Tensor, " s"]]:
    """Return the features, not normalised, of every prompt that `template` stands for, by class, and their classes.

    These are templates (see `expand_template`), the class's sentences in a file (`file:prompts.json`), or both
    (`a photo of a {}.+file:prompts.json`; with nothing before the +, the dataset's own template). `underscores` keeps
    the underscores of class names in templates; else they are spaces.
    """
    before, both, path = (template or "").partition(f"+{PROMPT_FILE}")
    file = PROMPT_FILE + path if both else template if template and template.startswith(PROMPT_FILE) else None
    each = torch.arange(len(classes.names), device=backbone.device)
    features, of_class = [], []
    if both or not file:
        templates = expand_template((before or None) if both else template, classes.template, classes.dataset)
        for text in track(templates, "encoding templates", len(templates)):
            features.append(backbone.encode_template(text, classes.names, underscores))
            of_class.append(each)
    if file:
        sentences = read_prompt_file(file, classes.names)
        features.append(backbone.encode_texts([text for texts in sentences for text in texts]))
        numbers = torch.tensor([len(texts) for texts in sentences], device=backbone.device)
        of_class.append(each.repeat_interleave(numbers))
    labels, order = torch.cat(of_class).sort(stable=True)
    return torch.cat(features)[order], labels


def text_features(
    backbone: Backbone,
    classes: Classes,
    template: str | None,
    average: Average = "unit",
    underscores: bool = False,
) -> Float[Tensor, "c e"]:
    """Return one feature per class: the average over its prompts; see `prompt_features`.

    Papers average in two ways. "unit": each prompt's feature made unit, their mean made unit again (CLIP, LP++, GDA,
    ProLIP, Tip-Adapter, APE). "raw": the mean of the features as they are, not normalised (TaskRes, CLAP; the
    cross-modal probe makes this mean unit). `underscores` keeps the underscores of class names (TaskRes, CLAP).
    """
    features, labels = prompt_features(backbone, classes, template, underscores)
    if average == "raw":
        return class_means(features, labels, len(classes.names))
    return F.normalize(class_sums(F.normalize(features, dim=-1), labels, len(classes.names)), dim=-1)


def class_sums(features: Float[Tensor, "s e"], labels: Int[Tensor, " s"], n_classes: int) -> Float[Tensor, "c e"]:
    """Return the sum of each class's features."""
    return features.new_zeros(n_classes, features.shape[1]).index_add(0, labels, features)


def class_means(features: Float[Tensor, "s e"], labels: Int[Tensor, " s"], n_classes: int) -> Float[Tensor, "c e"]:
    """Return the mean feature of each class; 0 for a class without features."""
    return class_sums(features, labels, n_classes) / labels.bincount(minlength=n_classes).clamp(min=1)[:, None]


@torch.no_grad()
def accuracy(method: Method, samples: Samples) -> float:
    """Return the share of the samples' test views whose highest logit is their label's."""
    predicted = method.logits(samples.test_view[:]).argmax(dim=1)
    return int((predicted == samples.labels.to(predicted.device)).sum()) / max(len(samples), 1)


def scaled_cosine(
    backbone: Backbone, features: Float[Tensor, "n e"], class_features: Float[Tensor, "c e"]
) -> Float[Tensor, "n c"]:
    """Return CLIP's logits: exp(logit scale) * cosine + logit bias; `class_features` are normalised already.

    Where nothing is trained, raises CoopError for class features without a direction: they would be a tie of all.
    """
    if not torch.is_grad_enabled():
        lost = int((~(class_features.norm(dim=-1) > 1e-6)).sum())
        if lost:
            raise CoopError(
                f"the features of {lost} of {len(class_features)} classes are all zero, or too large to be normalised: "
                "lower lr, or look at the backbone's weights"
            )
    cosines = F.normalize(features.to(class_features.device).float(), dim=-1) @ class_features.T
    return backbone.logit_scale * cosines + backbone.logit_bias


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own for one purpose of one run."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def linear(inputs: int, outputs: int, bias: bool = True, *, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with PyTorch's default distribution, uniform within 1/sqrt(inputs), from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = inputs**-0.5
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return layer


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
