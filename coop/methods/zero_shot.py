"""Zero-shot CLIP: hand-written prompts, one or an ensemble (Radford et al. 2021, section 3.1)."""

from jaxtyping import Float
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.methods.base import Classes, CosineClassifier
from coop.options import ZeroShotOptions


class ZeroShot(CosineClassifier):
    """logits = exp(logit scale) * f . w_c, with w_c the mean text feature of the class over the templates."""

    name = "zero_shot"
    Options = ZeroShotOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ZeroShotOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = self.text_features()

    def class_features(self) -> Float[Tensor, "c e"]:
        """Return the hand-written prompts' features."""
        return self.text

    def for_classes(self, classes: Classes) -> "ZeroShot":
        """Return the same templates for other classes."""
        return self.moved(classes)
