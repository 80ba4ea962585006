"""Prompts at the input of several blocks: text-only, VPT (Jia et al., ECCV 2022), IVLP and MaPLe (CVPR 2023).

A depth of J means tokens at the input and at that of blocks 1 to J - 1, where they take the place of those before;
behind the last one they flow on. Visual tokens stand after the patches, without positions, those of the input before
ln_pre. Released code: muzairkhattak/multimodal-prompt-learning.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.towers import Change, Changes
from coop.methods.base import Classes, generator, linear
from coop.methods.tower_method import TowerMethod, check_depth, context_rows
from coop.options import DeepTextOptions, IvlpOptions, MapleOptions, VptOptions

DEVIATION = 0.02  # of prompts that start at random


def prompt_changes(tokens: list[nn.Parameter] | list[Tensor]) -> Changes:
    """Return the changes of a tower with `tokens[i]` at the input of block i."""
    if not tokens:
        return Changes()
    return Changes(tokens[0], blocks={i: Change(tokens=t) for i, t in enumerate(tokens) if i})


class DeepPrompts(TowerMethod):
    """Learned tokens P_i (m, d) at the text tower's blocks and V_i (m, d_v) at the image tower's, from N(0, 0.02).

    P_0 starts as the first words of `ctx_init`. Trained by cross-entropy with the protocol's SGD.
    Departure from the released code: every learned tensor is float32.
    """

    def __init__(self, backbone: Backbone, classes: Classes, options: Any, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.random = generator(seed)
        (m, depth), (n, image_depth) = self.text_shape(), self.image_shape()
        keys = ("depth", "depth") if hasattr(options, "depth") else ("depth_text", "depth_image")
        check_depth(self.name, keys[0], depth, len(backbone.tower.blocks) or depth, "text")
        self.text = self.prompts_of(depth if m else 0, m, backbone.width)
        if m:
            rows, start = context_rows(backbone, classes.names, m, options.ctx_init)
            if start is not None:
                self.text[0].data.copy_(start)
            self.prompts = self.encoder(rows)
        else:
            self.prompts = self.template_encoder(classes, options.template)
        self.image: list[nn.Parameter] = []
        if self.images is not None:
            check_depth(self.name, keys[1], image_depth, self.images.layers, "image")
            self.image = self.prompts_of(image_depth if n else 0, n, self.images.width)

    @abstractmethod
    def text_shape(self) -> tuple[int, int]:
        """Return the number of text tokens and their depth."""

    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """Return the number of free visual tokens and their depth."""

    def prompts_of(self, depth: int, count: int, width: int) -> list[nn.Parameter]:
        """Return `depth` learned tensors (count, width)."""
        starts = (torch.randn(count, width, generator=self.random) * DEVIATION for _ in range(depth))
        return [nn.Parameter(start.to(self.backbone.device)) for start in starts]

    def text_changes(self) -> Changes:
        """Return P_i at the input of block i."""
        return prompt_changes(self.text)

    def image_changes(self) -> Changes:
        """Return V_i at the input of block i."""
        return prompt_changes(self.image)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `text.i` (m, d) and `image.i` (m, d_v)."""
        return {f"text.{i}": p for i, p in enumerate(self.text)} | {f"image.{i}": p for i, p in enumerate(self.image)}


class DeepText(DeepPrompts):
    """Deep prompts in the text tower alone, on final features: 4 tokens at 12 blocks."""

    name = "deep_text"
    Options = DeepTextOptions

    def text_shape(self) -> tuple[int, int]:
        """Return `n_ctx` and `depth`."""
        return self.options.n_ctx, self.options.depth

    def image_shape(self) -> tuple[int, int]:
        """Return none."""
        return 0, 0


class Vpt(DeepPrompts):
    """Visual prompts alone, shallow (`depth=1`) or deep; class features of `template` are computed once."""

    name = "vpt"
    Options = VptOptions

    def text_shape(self) -> tuple[int, int]:
        """Return none."""
        return 0, 0

    def image_shape(self) -> tuple[int, int]:
        """Return `n_ctx` and `depth`."""
        return self.options.n_ctx, self.options.depth


class Ivlp(DeepPrompts):
    """Independent vision-language prompts: free tokens in both towers, of lengths and depths of their own."""

    name = "ivlp"
    Options = IvlpOptions

    def text_shape(self) -> tuple[int, int]:
        """Return `n_ctx_text` and `depth_text`."""
        return self.options.n_ctx_text, self.options.depth_text

    def image_shape(self) -> tuple[int, int]:
        """Return `n_ctx_image` and `depth_image`."""
        return self.options.n_ctx_image, self.options.depth_image


class Maple(DeepPrompts):
    """Multi-modal prompts: text tokens P_i, and visual tokens V_i = F_i(P_i) with linear maps F_i (d -> d_v).

    As released, F_1 .. F_{J-1} start as copies of one random map, F_0 as another, and with 2 tokens only the first two
    of "a photo of a" are learned. Gradients reach P_i from both towers.
    """

    name = "maple"
    Options = MapleOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: MapleOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        assert self.images is not None
        check_depth(self.name, "depth", options.depth, self.images.layers, "image")
        first, other = (linear(backbone.width, self.images.width, generator=self.random) for _ in range(2))
        copies = [linear(backbone.width, self.images.width, generator=self.random) for _ in range(options.depth - 1)]
        for copy in copies:
            copy.load_state_dict(other.state_dict())
        self.maps = nn.ModuleList([first, *copies]).to(backbone.device)

    def text_shape(self) -> tuple[int, int]:
        """Return `n_ctx` and `depth`."""
        return self.options.n_ctx, self.options.depth

    def image_shape(self) -> tuple[int, int]:
        """Return none: the visual tokens are not free."""
        return 0, 0

    def image_changes(self) -> Changes:
        """Return F_i(P_i) at the input of block i."""
        return prompt_changes([f(p) for f, p in zip(self.maps, self.text, strict=True)])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `text.i` (m, d), and `maps.i.weight` (d_v, d) and `maps.i.bias` (d_v,) of F_i."""
        return super().parameters() | {f"maps.{name}": p for name, p in self.maps.named_parameters()}
