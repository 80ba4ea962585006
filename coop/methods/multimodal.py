"""Both towers changed by what they share: MMA (Yang et al., CVPR 2024) and MMRL (Guo and Gu, CVPR 2025)."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.clip.towers import Change, Changes
from coop.errors import CoopError
from coop.methods.base import Classes, generator, linear
from coop.methods.tower_method import TowerMethod, check_depth
from coop.options import MmaOptions, MmrlOptions


def layers_of(method: TowerMethod, first: int, last: int | None) -> range:
    """Return the layers, counted from 1, that both towers have. Raises CoopError beyond a tower."""
    assert method.images is not None
    layers = {"text": method.backbone.tower.layers, "image": method.images.layers}
    last = min(layers.values()) if last is None else last
    for tower, count in layers.items():
        check_depth(method.name, "last_layer", last, count, tower)
    if first > last:
        raise CoopError(f"method={method.name}: first_layer={first}, but the last one is {last}: give {last} or less")
    return range(first, last + 1)


def low_precision(layer: nn.Module, h: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return a float32 linear layer's output in the precision of its input."""
    assert isinstance(layer, nn.Linear)
    return F.linear(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))


class MMA(TowerMethod):
    """y = x' + mlp(ln_2(x')) + k U relu(M relu(D ln_1(x))) in layers 5 to 12 of both towers, M shared by them.

    Layer 0 adds k U relu(M relu(D x)) to the token embeddings (text) and to ln_pre's output (image). Weights start
    kaiming-normal by fan-out, biases at 0. Cross-entropy; SGD without warm-up. As released: the gradients of the
    adapters of layers above 0 are multiplied by 1 / k, while those handed down are the true ones. Departure: learned
    tensors are float32.
    """

    name = "mma"
    Options = MmaOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: MmaOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        assert self.images is not None
        self.layers = layers_of(self, options.first_layer, options.last_layer)
        widths, m, random = {"text": backbone.width, "image": self.images.width}, options.width, generator(seed)
        self.adapters = nn.ModuleDict()
        for layer in self.layers:
            self.adapters[f"shared {layer}"] = _kaiming(m, m, random)
            for tower, width in widths.items():
                self.adapters[f"{tower} {layer} down"] = _kaiming(width, m, random)
                self.adapters[f"{tower} {layer} up"] = _kaiming(m, width, random)
        self.adapters.to(backbone.device)
        self.prompts = self.template_encoder(classes, options.template)

    def changes(self, tower: str) -> Changes:
        """Return the adapters of one tower."""

        def adapter(layer: int, h: Tensor) -> Tensor:
            down, shared, up = (
                self.adapters[f"{tower} {layer} down"],
                self.adapters[f"shared {layer}"],
                self.adapters[f"{tower} {layer} up"],
            )
            hidden = low_precision(shared, low_precision(down, h).relu()).relu()
            return self.options.scale * low_precision(up, hidden)

        def bound(layer: int) -> Any:
            return lambda h: adapter(layer, h)

        blocks = {layer - 1: Change(adapter=bound(layer)) for layer in self.layers if layer}
        return Changes(embedding=bound(0) if 0 in self.layers else None, blocks=blocks)

    def text_changes(self) -> Changes:
        """Return the text tower's adapters."""
        return self.changes("text")

    def image_changes(self) -> Changes:
        """Return the image tower's adapters."""
        return self.changes("image")

    def backward(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Compute the gradients of one step, those of layers above 0 multiplied by 1 / k; return its loss."""
        loss = super().backward(inputs, labels)
        for name, parameter in self.parameters().items():
            if name.split(".")[1] != "0" and parameter.grad is not None:
                parameter.grad /= self.options.scale
        return loss

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `tower.layer.down` and `.up`, and `shared.layer`, each with `.weight` and `.bias`."""
        return {name.replace(" ", "."): p for name, p in self.adapters.named_parameters()}


RELEASED_WEIGHTS = {  # of the regularisation, by dataset
    "stanford_cars": 7.0, "fgvc_aircraft": 6.0, "sun397": 6.0, "dtd": 6.0, "food101": 5.0, "oxford_flowers": 4.0,
    "ucf101": 3.0, "imagenet": 0.5, "caltech101": 0.5, "oxford_pets": 0.2, "eurosat": 0.01,
}  # fmt: skip
RELEASED_WIDTHS = {"eurosat": 2048}


class MMRL(TowerMethod):
    """Tokens R G_j^v and R G_j^t of a shared space R (K, r) inserted in the upper layers of both towers.

    f is the class token's feature, g = unit(mean_K(ln_post(token)) Q) that of the inserted tokens, Q (d_v, e) learned.
    Loss: a CE(s f.t) + (1 - a) CE(s g.t) + w [(1 - mean f.f*) + (1 - mean_c t.t*)], starred features those of the
    frozen model. Test: a s f.t + (1 - a) s g.t for trained classes, s f.t for others. AdamW.
    As released: all G^v start equal, all G^t too, Q at random. Departures: learned tensors are float32; the scale s is
    the model's; the weight by dataset is an option (`setting=released_per_dataset`), not the default.
    """

    name = "mmrl"
    Options = MmrlOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: MmrlOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        assert self.images is not None
        self.layers = layers_of(self, options.first_layer, options.last_layer)
        self.weight, width = options.reg_weight, options.token_width
        if options.setting == "released_per_dataset":
            if classes.dataset not in RELEASED_WEIGHTS:
                raise CoopError(
                    f"setting=released_per_dataset was asked for {classes.dataset or 'a dataset without a name'}, but "
                    f"the authors chose for {', '.join(RELEASED_WEIGHTS)}: use setting=fixed"
                )
            self.weight, width = RELEASED_WEIGHTS[classes.dataset], RELEASED_WIDTHS.get(classes.dataset, width)
        random, device, image_width = generator(seed), backbone.device, self.images.width
        self.tokens = nn.Parameter((torch.randn(options.n_tokens, width, generator=random) * 0.02).to(device))
        self.maps = nn.ModuleDict()
        for tower, out in {"text": backbone.width, "image": image_width}.items():
            start = linear(width, out, generator=random)
            for layer in self.layers:
                self.maps[f"{tower} {layer}"] = nn.Linear(width, out)
                self.maps[f"{tower} {layer}"].load_state_dict(start.state_dict())
        self.maps.to(device)
        projection = torch.randn(image_width, backbone.joint_width, generator=random) * image_width**-0.5
        self.projection = nn.Parameter(projection.to(device))
        self.prompts = self.template_encoder(classes, options.template, insert=(self.layers[0] - 1, options.n_tokens))
        self.teacher = self.text_features()
        self.trained_names = classes.names

    def changes(self, tower: str) -> Changes:
        """Return the tokens of one tower, inserted at the first layer and replaced at the others."""
        tokens = {layer: self.maps[f"{tower} {layer}"](self.tokens) for layer in self.layers}
        first = self.layers[0]
        return Changes(blocks={i - 1: Change(tokens=t, insert=i == first) for i, t in tokens.items()})

    def text_changes(self) -> Changes:
        """Return the text tower's tokens."""
        return self.changes("text")

    def image_changes(self) -> Changes:
        """Return the image tower's tokens."""
        return self.changes("image")

    def both_features(self, inputs: Shaped[Tensor, "b *row"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"]]:
        """Return f and g, normalised."""
        assert self.images is not None
        tower, k = self.images, self.options.n_tokens
        states = self.image_states(inputs, 1 + k)
        f = tower.project(tower.pool(states, inserted=k))
        g = tower.project(tower.post_norm(states[:, 1 : 1 + k]).mean(dim=1), self.projection)
        return F.normalize(f, dim=-1), F.normalize(g, dim=-1)

    def image_features(self, inputs: Shaped[Tensor, "b *row"]) -> Float[Tensor, "b e"]:
        """Return f, normalised."""
        return self.both_features(inputs)[0]

    def terms(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted terms of the loss: `ce`, `ce_rep`, `image`, `text`."""
        (f, g), t, labels = self.both_features(inputs), self.class_features(), labels.to(self.backbone.device)
        return {
            "ce": F.cross_entropy(self.cosine_logits(f, t), labels),
            "ce_rep": F.cross_entropy(self.cosine_logits(g, t), labels),
            "image": 1 - (f * self.frozen_features(inputs)).sum(dim=1).mean(),
            "text": 1 - (t * self.teacher).sum(dim=1).mean(),
        }

    def loss(self, inputs: Shaped[Tensor, "b *row"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the weighted sum of the terms."""
        terms, a = self.terms(inputs, labels), self.options.alpha
        return a * terms["ce"] + (1 - a) * terms["ce_rep"] + self.weight * (terms["image"] + terms["text"])

    def test_scores(
        self, inputs: Shaped[Tensor, "b *row"], class_features: Float[Tensor, "c e"]
    ) -> Float[Tensor, "b c"]:
        """Return the mixture of both features' logits for trained classes, f's for others."""
        (f, g), a = self.both_features(inputs), self.options.alpha
        own, representation = self.cosine_logits(f, class_features), self.cosine_logits(g, class_features)
        trained = [name in self.trained_names for name in self.classes.names]
        known = torch.tensor(trained, device=own.device)
        return torch.where(known, a * own + (1 - a) * representation, own)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.trainable(), lr=self.options.lr, weight_decay=self.options.weight_decay)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `tokens` (K, r), `projection` (d_v, e), and `tower.layer.weight`, `.bias` of the maps."""
        maps = {name.replace(" ", "."): p for name, p in self.maps.named_parameters()}
        return {"tokens": self.tokens, "projection": self.projection, **maps}

    def for_classes(self, classes: Classes) -> "MMRL":
        """Return the same tokens for other classes, with the mixture for those that were trained."""
        fixed = replace(self.options, setting="fixed", token_width=self.tokens.shape[1], reg_weight=self.weight)
        method = MMRL(self.backbone, classes, fixed, self.seed)
        method.load_state(self.state())
        method.trained_names = self.trained_names
        return method


def _kaiming(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    """Return a linear layer with normal weights of variance 2 / outputs, and biases of 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=random) * (2 / outputs) ** 0.5)
        layer.bias.zero_()
    return layer
