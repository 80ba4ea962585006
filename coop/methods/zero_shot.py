"""Zero-shot CLIP: hand-written prompts, one or an ensemble (Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.backbone import Backbone
from coop.methods.base import Classes, Method
from coop.progress import track
from coop.text.templates import expand_template


@dataclass(frozen=True)
class ZeroShotOptions:
    """`template`: None (the dataset's), `imagenet7`, `imagenet80`, or a text with {}."""

    template: str | None = None


class ZeroShot(Method):
    """logits = exp(logit scale) * f . w_c, with w_c the mean text feature of the class over the templates."""

    name = "zero_shot"
    Options = ZeroShotOptions
    trains = False

    def __init__(self, backbone: Backbone, classes: Classes, options: ZeroShotOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.templates = expand_template(options.template, classes.template, classes.dataset)
        self.class_features = hand_written_features(backbone, self.templates, classes.names)

    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return scaled cosine similarities."""
        return scaled_cosine(self.backbone, features, self.class_features)

    def for_classes(self, classes: Classes) -> "ZeroShot":
        """Return the same templates for other classes."""
        return ZeroShot(self.backbone, classes, self.options, self.seed)


def scaled_cosine(
    backbone: Backbone, features: Float[Tensor, "n e"], class_features: Float[Tensor, "c e"]
) -> Float[Tensor, "n c"]:
    """Return CLIP's logits: exp(logit scale) * cosine + logit bias; `class_features` are normalised already."""
    cosines = F.normalize(features.to(class_features.device).float(), dim=-1) @ class_features.T
    return backbone.logit_scale * cosines + backbone.logit_bias


@torch.no_grad()
def hand_written_features(
    backbone: Backbone, templates: Sequence[str], class_names: Sequence[str]
) -> Float[Tensor, "c e"]:
    """Return the normalised mean, over templates, of the classes' normalised text features."""
    features = [
        F.normalize(backbone.encode_template(template, class_names), dim=-1)
        for template in track(templates, "encoding templates", len(templates))
    ]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)
