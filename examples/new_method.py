"""A method of another package: the class means of the shots, mixed with the hand-written prompts.

Its package declares it in pyproject.toml; the name is then one of `coop run method=...`, as are its options' keys:

    [project.entry-points."coop.methods"]
    class_means = "new_method:ClassMeans"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import Samples
from coop.methods.base import Classes, CosineClassifier, load_parameters
from coop.options import MethodOptions


@dataclass(frozen=True)
class ClassMeansOptions(MethodOptions):
    """`share`: how much of the class features are the prompts', from 0 to 1."""

    share: float = 0.5
    template: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise CoopError(f"share={self.share}: give a number from 0 to 1")


class ClassMeans(CosineClassifier):
    """w_c = unit(share t_c + (1 - share) mean of the class's unit features); logits are scaled cosines with w."""

    name = "class_means"
    Options = ClassMeansOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: ClassMeansOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.means = torch.zeros_like(self.text_features())

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        features = F.normalize(train.test_view, dim=-1)
        self.means.index_add_(0, train.labels, features)
        self.means /= train.labels.bincount(minlength=len(self.means)).clamp(min=1)[:, None]
        return {}

    def class_features(self) -> Tensor:
        share = self.options.share
        return F.normalize(share * self.text_features() + (1 - share) * self.means, dim=-1)

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_parameters(self.name, self.state(), state)
