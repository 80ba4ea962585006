"""CLIP-LoRA: low-rank updates of the attention's weights (Zanella and Ben Ayed, CVPR workshops 2024)."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.towers import Change, Changes, LowRank
from coop.errors import CoopError
from coop.methods.base import Classes, generator
from coop.methods.tower_method import StepTrainedTowerMethod
from coop.options import LORA_PLACES, ClipLoraOptions

Key = tuple[str, int, str]  # tower, block, weight


class ClipLora(StepTrainedTowerMethod):
    """y = W h + b + (alpha / sqrt(r)) B A drop(h) for q, k, v (and o) of chosen blocks of both towers.

    A starts uniform within 1/sqrt(width), B at zero; q, k and v drop different entries of the same h. Cross-entropy,
    AdamW, cosine by step, one template for all datasets. Departures from the released code: without dropout the
    gradient is exact (the released branch for rate 0 misses the update in what it hands to lower layers); learned
    tensors are float32; the scale of the logits is the model's. With `share_prefix` one mask is drawn for the tokens
    that all prompts begin with, instead of one for each class: another noise of the same kind.
    """

    name = "clip_lora"
    Options = ClipLoraOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ClipLoraOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        assert self.images is not None
        towers = {"text": (backbone.tower.layers, backbone.width), "image": (self.images.layers, self.images.width)}
        random = generator(seed)
        self.pairs: dict[Key, tuple[nn.Parameter, nn.Parameter]] = {}
        for tower, (layers, width) in towers.items():
            for block in blocks_of(options.place, layers, tower) if options.towers in ("both", tower) else ():
                for weight in options.weights:
                    down = (torch.rand(options.rank, width, generator=random) * 2 - 1) * width**-0.5
                    up = torch.zeros(width, options.rank)
                    self.pairs[tower, block, weight] = (
                        nn.Parameter(down.to(backbone.device)),
                        nn.Parameter(up.to(backbone.device)),
                    )
        self.scale = options.alpha / options.rank**0.5
        self.prompts = self.template_encoder(classes, options.template, share_prefix=options.share_prefix)
        self.noise = torch.Generator(backbone.device).manual_seed(seed)
        self.masks: dict[Key, Tensor] | None = None  # of one training step

    def changes(self, tower: str) -> Changes:
        """Return the updates of one tower."""
        blocks: dict[int, dict[str, LowRank]] = {}
        for (where, block, weight), (down, up) in self.pairs.items():
            if where == tower:
                drop = None if self.masks is None else self.dropout((tower, block, weight))
                blocks.setdefault(block, {})[weight] = LowRank(down, up, self.scale, drop)
        return Changes(blocks={block: Change(low_rank=updates) for block, updates in blocks.items()})

    def text_changes(self) -> Changes:
        """Return the text tower's updates."""
        return self.changes("text")

    def image_changes(self) -> Changes:
        """Return the image tower's updates."""
        return self.changes("image")

    def dropout(self, key: Key) -> Callable[[Tensor], Tensor]:
        """Return the dropout of one weight's input, with one mask a step (activations may be computed again)."""

        def drop(h: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
            assert self.masks is not None
            if key not in self.masks:
                self.masks[key] = self.draw_mask(key, h.shape)
            return h * self.masks[key] / (1 - self.options.dropout)

        return drop

    def draw_mask(self, key: Key, shape: torch.Size) -> Bool[Tensor, "*b d"]:
        """Return which entries of one weight's input are kept."""
        return torch.rand(shape, generator=self.noise, device=self.noise.device) >= self.options.dropout

    def backward(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Compute the gradients of one step, with dropout; return its loss."""
        self.masks = {} if self.options.dropout else None
        try:
            return super().backward(inputs, labels)
        finally:
            self.masks = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `tower.block.weight.down` (r, width) and `.up` (width, r)."""
        out: dict[str, nn.Parameter] = {}
        for (tower, block, weight), (down, up) in self.pairs.items():
            out |= {f"{tower}.{block}.{weight}.down": down, f"{tower}.{block}.{weight}.up": up}
        return out

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Return the model's state_dict with the updates added to its weights: a checkpoint for open_clip."""
        state = {name: tensor.clone() for name, tensor in self.backbone.model.state_dict().items()}
        prefixes = {"text": self.backbone.tower.prefix, "image": "visual."}
        for (tower, block, weight), (down, up) in self.pairs.items():
            attention = f"{prefixes[tower]}transformer.resblocks.{block}.attn."
            target = state[attention + ("out_proj.weight" if weight == "o" else "in_proj_weight")]
            if weight != "o":
                target = target.chunk(3)["qkv".index(weight)]
            target.copy_(target.float() + LowRank(down, up, self.scale).weight())
        return state


def blocks_of(place: str, layers: int, tower: str) -> range:
    """Return the blocks, from 0, that a place names. Raises CoopError if the tower has none of them."""
    if place == "all":
        return range(layers)
    if place in ("half-bottom", "half-up") and layers > 12:
        return range(layers // 2) if place == "half-bottom" else range(layers // 2, layers)
    first, last = LORA_PLACES.get(place) or (int(number) for number in place.split("-"))
    if first >= layers or (place in LORA_PLACES and layers > 12) or (place not in LORA_PLACES and last >= layers):
        raise CoopError(
            f"method=clip_lora: place={place} was asked for, but the {tower} tower has {layers} blocks: "
            f"name blocks from 0 to {layers - 1}, as place={layers // 2}-{layers - 1}"
        )
    return range(first, min(last + 1, layers))
