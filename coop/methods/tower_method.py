"""What the methods that train inside the towers share: changed towers in place of features, and frozen rows kept.

A method states its `text_changes` and `image_changes` (`coop.clip.towers.Changes`); the towers run with them, and the
shared backbone's own tensors are never written to. Methods that change the text tower alone read final features.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.clip.encode_deep import DeepPromptEncoder
from coop.clip.prompts import Row, context_slot, expand_template, learned_rows, template_rows
from coop.clip.towers import Changes, ImageTower
from coop.errors import CoopError
from coop.features import Rows, Samples
from coop.io import track
from coop.methods.base import Classes, TrainedMethod, generator
from coop.train import Batch, cosine_by_step, epoch_batches

KEPT_BYTES = 2 * 2**30  # of frozen states that a fit keeps in memory
TEST_BATCH = {"cpu": 64, "cuda": 256}
FLOOR = 1e-6  # the learning rate that a cosine by step ends at


class FrozenRows:
    """What is frozen below a method's first change, computed once for each row of a sample, while it fits in memory.

    `numbers` is the sample with row numbers in place of its rows; `self(name, numbers, compute)` returns `compute` of
    those rows' pixels, from memory where it is there. Fresh views are shown once: nothing of them is kept.
    """

    def __init__(self, sample: Samples, budget: int = KEPT_BYTES) -> None:
        n, v = len(sample), len(sample.views)
        self.sample, self.budget = sample, budget
        order = torch.arange((v + 1) * n)
        self.numbers = replace(sample, labels=sample.labels.cpu(), test_view=order[:n], views=order[n:].view(v, n))
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._too_large: set[str] = set()

    def __call__(
        self, name: str | None, numbers: Int[Tensor, " b"], compute: Callable[[Tensor], Float[Tensor, "b *row"]]
    ) -> Float[Tensor, "b *row"]:
        """Return `compute` of the rows with these numbers, kept under `name` (None: not kept)."""
        numbers = numbers.cpu()
        if name is None or self.sample.fresh or name in self._too_large:
            return compute(self._pixels(numbers))
        if name not in self._kept:
            rows = compute(self._pixels(numbers))
            total = (len(self.sample.views) + 1) * len(self.sample)
            size = total * rows[0].numel() * rows.element_size()
            if size > self.budget:
                self._too_large.add(name)
                return rows
            self.budget -= size
            self._kept[name] = (rows.new_empty(total, *rows.shape[1:]), torch.zeros(total, dtype=torch.bool))
        rows, known = self._kept[name]
        missing = numbers[~known[numbers]]
        if len(missing):
            rows[missing.to(rows.device)] = compute(self._pixels(missing))
            known[missing] = True
        return rows[numbers.to(rows.device)]

    def _pixels(self, numbers: Int[Tensor, " b"]) -> Shaped[Tensor, "b *row"]:
        n = len(self.sample)
        view, item = numbers // n, numbers % n
        if (view == 0).all():
            return self.sample.test_view[item.to(self.sample.test_view.device)]
        device = self.sample.views.device
        return self.sample.views[(view - 1).to(device), item.to(device)]


class TowerMethod(TrainedMethod):
    """A method whose `text_changes` and `image_changes` are learned; logits = exp(logit scale) * cos(f, t_c).

    `prompts` is the encoder of its classes. Learned tensors are float32; they are rounded where a tower of lower
    precision uses them. Raises CoopError for an image tower without visual tokens, where the method needs them.
    """

    prompts: DeepPromptEncoder
    kept_bytes: int = KEPT_BYTES

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        if not classes.names:
            raise CoopError("there are no class names: give at least one")
        self.images = ImageTower(backbone.model) if self.options.reads == "pixels" else None
        self.frozen_rows: FrozenRows | None = None
        self._class_features: Tensor | None = None

    def text_changes(self) -> Changes:
        """Return what is changed in the text tower."""
        return Changes()

    def image_changes(self) -> Changes:
        """Return what is changed in the image tower."""
        return Changes()

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the class features, normalised, differentiable in what is learned."""
        return F.normalize(self.prompts(self.text_changes()), dim=-1)

    def image_features(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b e"]:
        """Return image features, normalised, differentiable in what is learned.

        `inputs` are final features where the method reads those; else uint8 pixels, preprocessed images, or the
        numbers of rows of the training sample.
        """
        if self.images is None:
            return F.normalize(inputs.to(self.backbone.device), dim=-1)
        if self.image_changes().first >= self.images.layers:
            return self.frozen_features(inputs)
        return F.normalize(self.images.project(self.images.pool(self.image_states(inputs, 1))), dim=-1)

    def image_states(self, inputs: Shaped[Tensor, "b *row"], keep: int) -> Float[Tensor, "b k d"]:
        """Return the first `keep` tokens' states after the last block of the changed image tower."""
        assert self.images is not None
        tower, changes = self.images, self.image_changes()
        block = changes.first
        name = f"block {block}" if block > 0 else None  # below block 0 there is little to save
        x = self.frozen(name, inputs, lambda images: tower.frozen(images, block))
        return tower.run(x, changes, block, keep)

    @torch.no_grad()
    def frozen_features(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b e"]:
        """Return the unchanged image tower's features, normalised."""
        return F.normalize(self.frozen("features", inputs, self.backbone.encode_images), dim=-1)

    def frozen(
        self, name: str | None, inputs: Shaped[Tensor, "b *row"], compute: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b *row2"]:
        """Return `compute` of preprocessed images; of row numbers, from what the fit keeps under `name`."""

        def prepared(images: Tensor) -> Tensor:
            return compute(images if images.is_floating_point() else self.backbone.normalise_pixels(images))

        if inputs.ndim > 1:
            return prepared(inputs)
        assert self.frozen_rows is not None
        return self.frozen_rows(name, inputs, prepared)

    def cosine_logits(
        self, features: Float[Tensor, "b e"], class_features: Float[Tensor, "c e"]
    ) -> Float[Tensor, "b c"]:
        """Return CLIP's logits of normalised features."""
        return self.backbone.logit_scale * features @ class_features.T + self.backbone.logit_bias

    def scores(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in what is learned."""
        return self.cosine_logits(self.image_features(inputs), self.class_features())

    @torch.no_grad()
    def logits(self, inputs: Shaped[Tensor, "n *row"] | Rows) -> Float[Tensor, "n c"]:
        """Return the logits of images, in large batches; class features are computed once."""
        if self._class_features is None:
            self._class_features = self.test_class_features()
        size = TEST_BATCH.get(self.device.type, 64) if self.images else max(len(inputs), 1)
        parts = track(inputs.split(size), "classifying images", -(-len(inputs) // size))
        return torch.cat([self.test_scores(part, self._class_features) for part in parts])

    def test_class_features(self) -> Float[Tensor, "c e"]:
        """Return the class features at test."""
        return self.class_features()

    def test_scores(
        self, inputs: Shaped[Tensor, "b *row"], class_features: Float[Tensor, "c e"]
    ) -> Float[Tensor, "b c"]:
        """Return the logits of one batch of test images."""
        return self.cosine_logits(self.image_features(inputs), class_features)

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train (`val` is not used); return the number of steps and the first and last loss."""
        if self.images is None:
            return super().fit(train, val)
        self.frozen_rows = FrozenRows(train, self.kept_bytes)
        try:
            return super().fit(self.frozen_rows.numbers, val)
        finally:
            self.frozen_rows = None

    def reset_cache(self) -> None:
        """Drop the class features."""
        self._class_features = None

    def for_classes(self, classes: Classes) -> "TowerMethod":
        """Return the same changes of the towers before other classes."""
        return self.moved(classes)

    def template_encoder(self, classes: Classes, template: str | None, **options: Any) -> DeepPromptEncoder:
        """Return the encoder of one hand-written template. Raises CoopError for an ensemble of templates."""
        templates = expand_template(template, classes.template, classes.dataset)
        if len(templates) != 1:
            raise CoopError(f"template={template}: method={self.name} runs one prompt a class; give one text with {{}}")
        backbone = self.backbone
        rows = template_rows(backbone.vocabulary, templates[0], classes.names, backbone.tower.context_length)
        return self.encoder(rows, **options)

    def encoder(self, rows: list[Row], **options: Any) -> DeepPromptEncoder:
        """Return the encoder of prompts, with tokens placed after the start token."""
        vocabulary = self.backbone.vocabulary
        return DeepPromptEncoder(self.backbone.tower, rows, vocabulary.pad, len(vocabulary.head), **options)


class StepTrainedTowerMethod(TowerMethod):
    """A tower method trained for a number of steps in proportion to the shots: AdamW, cosine by step to 1e-6.

    Incomplete last batches are used; the last pass over the sample ends where the steps do.
    """

    drop_last = False

    def rates(self, per_epoch: int) -> list[float]:
        """Return the learning rate of every step."""
        return cosine_by_step(self.options.steps or 0, self.options.lr, final=FLOOR)

    def batches(self, train_set: Samples) -> Iterator[Batch]:
        """Yield the batches of as many passes as the steps take."""
        return self.passes(train_set, self.options.steps or 0, generator(self.seed))

    def passes(self, train_set: Samples, steps: int, random: torch.Generator) -> Iterator[Batch]:
        """Yield `steps` batches of passes over the sample."""
        passes = -(-steps // self.steps_per_epoch(train_set))
        return islice(epoch_batches(train_set, passes, self.options.batch_size, random, drop_last=False), steps)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.trainable(), lr=self.options.lr, weight_decay=self.options.weight_decay)


def context_rows(
    backbone: Backbone, class_names: tuple[str, ...], n_ctx: int, ctx_init: str | None
) -> tuple[list[Row], Float[Tensor, "m d"] | None]:
    """Return prompts whose first `n_ctx` tokens are context, and the embeddings that these start from.

    The tokens of `ctx_init` behind the first n_ctx stay as words. None, and "X" for each token, if it has fewer.
    """
    vocabulary, length = backbone.vocabulary, backbone.tower.context_length
    ids, words = backbone.encode_words(ctx_init) if ctx_init else ([], None)
    if words is None or len(ids) < n_ctx:
        return learned_rows(vocabulary, class_names, n_ctx, "end", False, length), None
    rows = template_rows(vocabulary, f"{ctx_init} {{}}.", class_names, length)
    return with_context(rows, len(vocabulary.head), n_ctx), words[:n_ctx].clone()


def with_context(rows: list[Row], start: int, n_ctx: int) -> list[Row]:
    """Return prompts with context in place of the `n_ctx` tokens from `start` on."""
    slots = tuple(context_slot(k) for k in range(n_ctx))
    return [row[:start] + slots + row[start + n_ctx :] for row in rows]


def check_depth(method: str, key: str, depth: int, most: int, tower: str) -> None:
    """Raise CoopError, with the value to give, for an option that counts blocks beyond the tower."""
    if depth > most:
        raise CoopError(f"method={method}: {key}={depth} is beyond the {tower} tower: give {key}={most} or less")
