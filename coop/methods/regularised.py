"""CoOp held near the hand-written prompts: KgCoOp (Yao et al., CVPR 2023) and ProGrad (Zhu et al., ICCV 2023)."""

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coop.methods.base import scaled_cosine
from coop.methods.coop import CoOp
from coop.options import KgCoOpOptions, ProGradOptions


class GuidedCoOp(CoOp):
    """CoOp whose training also reads the features of the hand-written prompts (option `template`)."""

    @cached_property
    def template_features(self) -> Float[Tensor, "c e"]:
        """The normalised features of the hand-written prompts."""
        return self.text_features()


class KgCoOp(GuidedCoOp):
    """CoOp with the loss CE + lambda (1 - mean_c cos(w_c, w_c^clip)), w^clip the hand-written prompts' features.

    For normalised features the second term is half of the paper's mean_c |w_c - w_c^clip|^2: as the released code.
    """

    name = "kgcoop"
    Options = KgCoOpOptions

    def loss(self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the batch's cross-entropy plus the weighted distance to the hand-written prompts."""
        learned = self.class_features()
        distance = 1 - (learned * self.template_features).sum(dim=1).mean()
        cross_entropy = F.cross_entropy(scaled_cosine(self.backbone, features, learned), labels.to(learned.device))
        return cross_entropy + self.options.kg_weight * distance


class ProGrad(GuidedCoOp):
    """CoOp along G = G_d - lambda min(G_d . G_g, 0) G_g / |G_g|^2.

    G_d is the gradient of the cross-entropy; G_g, the general direction, that of T^2 KL(p_zs || p), with p_zs the
    zero-shot prediction and both at temperature T. One dot product is taken over the whole context.
    Departure from the released code: there the initial words fill the last of 16 slots, the others being zero; here
    `ctx_init` alone is the context (`ctx_init=null` gives CoOp's random vectors).
    """

    name = "prograd"
    Options = ProGradOptions

    def backward(self, inputs: Float[Tensor, "b e"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Set the context's gradient to G; return the cross-entropy."""
        ctx, t = self.learner.ctx, self.options.temperature
        logits = self.scores(inputs)
        teacher = (scaled_cosine(self.backbone, inputs, self.template_features) / t).log_softmax(dim=1)
        cross_entropy = F.cross_entropy(logits, labels.to(logits.device))
        general = t * t * F.kl_div((logits / t).log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)
        (g_d,) = torch.autograd.grad(cross_entropy, ctx, retain_graph=True)
        (g_g,) = torch.autograd.grad(general, ctx)
        ctx.grad = projected(g_d, g_g, self.options.prograd_lambda)
        return cross_entropy.detach()


def projected(g_d: Float[Tensor, "*k"], g_g: Float[Tensor, "*k"], strength: float) -> Float[Tensor, "*k"]:
    """Return `g_d` without (`strength` times) its part along -`g_g`, if it has one."""
    dot = (g_d * g_g).sum()
    return torch.where(dot < 0, g_d - strength * dot / (g_g * g_g).sum() * g_g, g_d)
