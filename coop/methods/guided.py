"""What KgCoOp and ProGrad share: CoOp that learns with the hand-written prompts in sight."""

from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from coop.methods.coop import CoOp
from coop.methods.zero_shot import hand_written_features
from coop.text.templates import expand_template


class GuidedCoOp(CoOp):
    """CoOp whose loss looks at the hand-written prompts of `template` (None: the dataset's), one of its options."""

    @cached_property
    def hand_written(self) -> Float[Tensor, "c e"]:
        """The normalised features of the hand-written prompts."""
        templates = expand_template(self.options.template, self.classes.template, self.classes.dataset)
        return hand_written_features(self.backbone, templates, self.classes.names)
