"""The locked image side, from the trunk's own classifier: no picture is seen."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.clip.lit_lite import trunk_tensors


@dataclass(frozen=True)
class ImageSide:
    """A projection of the trunk's feature, and where it takes the rows of the ImageNet classifier."""

    weight: Float[Tensor, "e trunk"]
    bias: Float[Tensor, " e"]
    targets: Float[Tensor, "c e"]  # normalised, in ImageNet's order of classes


def project_classifier(width: int) -> ImageSide:
    """Project on the `width` leading right singular directions of the centred classifier.

    A feature's cosine with a class's row then ranks the classes nearly as the classifier does. The mean feature goes
    to the origin, so that a feature points to where it differs from the others.
    """
    tensors = trunk_tensors()
    rows = tensors["_fc.weight"]
    centred = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:width]
    mean = mean_feature(tensors["_bn1.weight"], tensors["_bn1.bias"])
    return ImageSide(directions, -directions @ mean, F.normalize(centred @ directions.T, dim=-1))


def mean_feature(gain: Float[Tensor, " trunk"], bias: Float[Tensor, " trunk"]) -> Float[Tensor, " trunk"]:
    """Return E[relu6(x)], x ~ N(bias, gain^2): the mean feature, as the last batch norm leaves its channels."""
    spread = gain.abs().clamp(min=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0)

    def rectified(mean: Tensor) -> Tensor:
        ratio = mean / spread
        return mean * normal.cdf(ratio) + spread * normal.log_prob(ratio).exp()

    return rectified(bias) - rectified(bias - 6)
