"""TaskRes: a residual on the zero-shot class weights (Yu et al., CVPR 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.methods.base import Classes, scaled_cosine, text_features
from coop.methods.class_weights import ClassWeightsMethod, prompts_of, unit
from coop.options import TaskResOptions


class TaskRes(ClassWeightsMethod):
    """logits = exp(logit scale) * cos(f, T_c + alpha x_c); the residual x (c, e) starts at 0.

    T_c is the mean text feature of the class's prompts, not normalised, with the underscores of its name, as released.
    Adam with L2 decay, CoOp's schedule, a new random view of each image in every epoch; the last epoch is the result.
    Departures from the released code: no enhanced base (a text projection tuned before); ImageNet has eight templates
    however often a model is built in one process.
    """

    name = "taskres"
    Options = TaskResOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: TaskResOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        self.text = text_features(backbone, *prompts_of(self), "raw", underscores=True)
        self.residual = nn.Parameter(torch.zeros_like(self.text))

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return the logits, differentiable in the residual."""
        return scaled_cosine(self.backbone, features, unit(self.text + self.options.alpha * self.residual))

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam; its weight decay is added to the gradient."""
        o = self.options
        return torch.optim.Adam(self.trainable(), lr=o.lr, betas=(o.momentum, 0.999), weight_decay=o.weight_decay)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `residual` (c, e)."""
        return {"residual": self.residual}

    def zero_shot(self) -> dict[str, Tensor]:
        """Return no residual."""
        return {"residual": torch.zeros_like(self.residual)}
