"""CLIP-Adapter: a bottleneck on the features, mixed with what they were (Gao et al., IJCV 2024)."""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.io import track
from coop.methods.base import Classes, Method, TrainedMethod, accuracy, generator, linear, scaled_cosine
from coop.options import ADAPTER_BRANCHES, ClipAdapterOptions

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # those that the paper compares (its table 4); 0 is zero-shot CLIP


class ClipAdapter(TrainedMethod):
    """logits = exp(logit scale) * cos(f*, W*), with f* = r A_v(f) + (1 - r) f and W* = r A_t(W) + (1 - r) W.

    A(x) = relu(relu(x W_1) W_2) narrows the width e to e / reduction and back; a branch not chosen is left as it is.
    f is the image feature before normalisation, as in the released code; W the normalised feature of each class's
    hand-written prompts. Text features are computed once. Departures from the released code: the text branch and the
    ways to find the ratio are only in the paper; a learned ratio is one number (sigmoid of a weight that starts at
    0.2), not a network's output; both branches share it.
    """

    name = "clip_adapter"
    Options = ClipAdapterOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ClipAdapterOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = self.text_features()
        self._start(0.2 if isinstance(options.ratio, str) else options.ratio)

    def _start(self, ratio: float) -> None:
        """Take fresh adapters, from the seed, and this ratio."""
        random = generator(self.seed)
        width = self.text.shape[1]
        hidden = max(width // self.options.reduction, 1)
        adapters = {branch: _adapter(width, hidden, random) for branch in ADAPTER_BRANCHES[self.options.branch]}
        self.adapters = nn.ModuleDict(adapters).to(self.text.device)
        weight = math.log(ratio / (1 - ratio)) if self.options.ratio == "learned" else ratio
        self.ratio_weight = nn.Parameter(torch.tensor(float(weight), device=self.text.device))

    @property
    def ratio(self) -> Float[Tensor, ""]:
        """The weight of the adapted features."""
        return torch.sigmoid(self.ratio_weight) if self.options.ratio == "learned" else self.ratio_weight.detach()

    def _adapted(self, branch: str, x: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        if branch not in self.adapters:
            return x
        return self.ratio * self.adapters[branch](x) + (1 - self.ratio) * x

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in what is learned."""
        features = self._adapted("visual", features.to(self.text.device).float())
        return scaled_cosine(self.backbone, features, F.normalize(self._adapted("text", self.text), dim=-1))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the layers of each branch, and `ratio` (its logit where it is learned)."""
        layers = {f"{name}.{k}": p for name, adapter in self.adapters.items() for k, p in adapter.named_parameters()}
        return {**layers, "ratio": self.ratio_weight}

    def trainable(self) -> list[nn.Parameter]:
        """Return the layers, and the ratio where it is learned."""
        learned = self.options.ratio == "learned"
        return [p for name, p in self.parameters().items() if learned or name != "ratio"]

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train the adapter; with `ratio=search` once for every ratio, keeping the smallest that is best on `val`."""
        if self.options.ratio != "search":
            return {**super().fit(train, val), "ratio": float(self.ratio.detach())}
        if not len(val):
            raise CoopError("ratio=search needs validation images, and there are none: give a ratio, or 'learned'")
        best: tuple[float, dict[str, Tensor], dict[str, Any]] = (-1, {}, {})
        accuracies: dict[str, float] = {}
        for ratio in track(RATIOS, "searching the ratio", len(RATIOS)):
            self._start(ratio)
            notes = super().fit(train, val)
            accuracies[str(ratio)] = accuracy(self, val)
            if accuracies[str(ratio)] > best[0]:
                best = (accuracies[str(ratio)], self.state(), notes)
        self.load_state(best[1])
        return {**best[2], "ratio": float(self.ratio), "val_accuracy_by_ratio": accuracies}

    def for_classes(self, classes: Classes) -> Method:
        """Return the same adapters and ratio over the prompts of other classes."""
        return self.moved(classes)


def _adapter(width: int, hidden: int, random: torch.Generator) -> nn.Sequential:
    """Return relu(relu(x W_1) W_2)."""
    return nn.Sequential(
        OrderedDict(
            down=linear(width, hidden, bias=False, generator=random),
            relu=nn.ReLU(),
            up=linear(hidden, width, bias=False, generator=random),
            out=nn.ReLU(),
        )
    )
