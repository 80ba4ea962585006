"""KgCoOp: CoOp held near the hand-written prompts (Yao et al., CVPR 2023)."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coop.errors import CoopError
from coop.methods.coop import CoOpOptions
from coop.methods.guided import GuidedCoOp
from coop.methods.zero_shot import scaled_cosine


@dataclass(frozen=True)
class KgCoOpOptions(CoOpOptions):
    """`kg_weight` is the paper's lambda; `template` (None: the dataset's) makes the features to stay near."""

    epochs: int | None = 100
    batch_size: int = 128
    ctx_init: str | None = "a photo of a"
    kg_weight: float = 8.0
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kg_weight >= 0:
            raise CoopError(f"kg_weight={self.kg_weight}: give 0 or more")


class KgCoOp(GuidedCoOp):
    """CoOp with the loss CE + lambda (1 - mean_c cos(w_c, w_c^clip)), w^clip the hand-written prompts' features.

    For normalised features the second term is half of the paper's mean_c |w_c - w_c^clip|^2: as the released code.
    """

    name = "kgcoop"
    Options = KgCoOpOptions

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy plus the weighted distance to the hand-written prompts."""
        learned = self.learner.class_features()
        distance = 1 - (learned * self.hand_written).sum(dim=1).mean()
        cross_entropy = F.cross_entropy(scaled_cosine(self.backbone, features, learned), labels.to(learned.device))
        return cross_entropy + self.options.kg_weight * distance
