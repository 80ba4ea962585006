"""CoCoOp: a context that depends on the image (Zhou et al., CVPR 2022)."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coop.clip.backbone import Backbone
from coop.features import Samples
from coop.io import track
from coop.methods.base import Classes, Method, TrainedMethod, generator, linear
from coop.methods.coop import PromptLearner
from coop.options import CoCoOpOptions

FEATURES_AT_ONCE = 2**16  # class features held for one chunk of test images: images x classes


class CoCoOp(TrainedMethod):
    """p(y = i | x) = softmax_i(exp(logit scale) * cos(f(x), g(t_i(x)))), t_i(x) = [V_1 + pi(x)] .. [V_M + pi(x)] [i].

    The meta-net pi(x) = W_2 relu(W_1 f(x)/|f(x)| + b_1) + b_2, with e/16 hidden units, is learned together with V.
    Every image has class features of its own, in training and at test. Within an image all classes share the context,
    so it is computed once for them; images and classes are chunked to the encoder's budget of memory.
    Departures from the released code: everything learned is float32; batches of any size; any `ctx_position`.
    """

    name = "cocoop"
    Options = CoCoOpOptions

    def __init__(self, backbone: Backbone, classes: Classes, options: CoCoOpOptions, seed: int = 1) -> None:
        super().__init__(backbone, classes, options, seed)
        random = generator(seed)
        self.learner = PromptLearner(
            backbone,
            classes.names,
            options.n_ctx or 0,
            options.ctx_position,
            ctx_init=options.ctx_init,
            generator=random,
        )
        e, hidden = backbone.joint_width, max(backbone.joint_width // 16, 1)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=linear(e, hidden, generator=random),
                relu=nn.ReLU(),
                linear2=linear(hidden, backbone.width, generator=random),
            )
        ).to(backbone.device)

    def class_features(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c e"]:
        """Return each image's normalised class features, differentiable in what is learned."""
        shift = self.meta_net(F.normalize(features, dim=-1))
        return F.normalize(self.learner.encoder(self.learner.ctx + shift[:, None]), dim=-1)

    def scores(self, features: Float[Tensor, "b e"]) -> Float[Tensor, "b c"]:
        """Return scaled cosine similarities, differentiable in what is learned."""
        features = features.to(self.backbone.device).float()
        cosines = torch.einsum("be,bce->bc", F.normalize(features, dim=-1), self.class_features(features))
        return self.backbone.logit_scale * cosines + self.backbone.logit_bias

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n c"]:
        """Return scaled cosine similarities; the text tower runs for every image."""
        parts = features.split(max(FEATURES_AT_ONCE // len(self.classes.names), 1))
        return torch.cat([self.scores(part) for part in track(parts, "classifying images", len(parts))])

    def fit(self, train: Samples, val: Samples) -> dict[str, Any]:
        """Train context and meta-net; the last epoch is the result (`val` is not used)."""
        return {"n_ctx": self.learner.n_ctx, **super().fit(train, val)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `ctx` (m, d) and the meta-net's layers, named as in the released code."""
        return {"ctx": self.learner.ctx, **{f"meta_net.{k}": p for k, p in self.meta_net.named_parameters()}}

    def for_classes(self, classes: Classes) -> Method:
        """Return the same context and meta-net before other class names."""
        return self.moved(classes)
